"""Rows of data files, and the examples that a head learns from."""
