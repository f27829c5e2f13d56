"""Train EAGLE heads: data/ in, head/ out; run/ is one run of `vllm-eagle train`."""
