"""Measurements: compare.py (tokens per target pass), attention.py (kernels)."""
