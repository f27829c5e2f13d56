"""`vllm-eagle regenerate`: the target writes the answers of training dialogues itself; resumable."""
