"""Seam patches for vLLM: see patches/README.md."""
