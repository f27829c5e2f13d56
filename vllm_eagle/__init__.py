"""EAGLE draft trees for vLLM."""
