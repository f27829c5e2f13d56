"""The frozen target, and its features on disk."""
