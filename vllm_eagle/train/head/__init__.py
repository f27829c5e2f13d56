"""Heads as torch modules, and what they are trained for."""
