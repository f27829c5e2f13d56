"""`vllm-eagle regenerate`: the target writes the answers of training dialogues, or whole dialogues, itself; resumable."""
