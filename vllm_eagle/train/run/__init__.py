"""One training run: settings, loop, checkpoints, curves, run card; whole.py begins with data of the target's own."""
