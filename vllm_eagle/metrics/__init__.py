"""What is counted in the worker, and the file through which the server sees it."""
