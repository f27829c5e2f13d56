"""Tokens per target pass, and whether they are plain vLLM's: no clock. compare.py is `vllm-eagle compare`."""
