"""Measurements. passes/: tokens per target pass; speed/: the clock; the other rooms say what they are."""
