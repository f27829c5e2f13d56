"""`vllm-eagle gpu-check`: kernels against their references, their times, vLLM itself; in parts (stages.py)."""
