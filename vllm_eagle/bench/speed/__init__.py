"""Against the clock: `vllm-eagle bench` (throughput.py), the parts of a step (steps.py), attention (attention.py)."""
