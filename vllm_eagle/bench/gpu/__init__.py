"""`vllm-eagle gpu-check`: kernels against their references, their times, then vLLM itself."""
