"""A server under mixed load for a long time, checked against a plain server: `python -m vllm_eagle.bench.soak.run`."""
