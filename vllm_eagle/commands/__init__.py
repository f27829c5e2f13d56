"""Subcommands of `vllm-eagle` that belong to no other room, and the arguments of all that have many."""
