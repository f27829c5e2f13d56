"""Heads against each other: kinds of heads, and what each choice of the papers is worth in training."""
