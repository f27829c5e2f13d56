"""One training run: settings, loop, checkpoints, curves, run card."""
