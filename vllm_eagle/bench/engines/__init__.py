"""What benchmarks run: engines of the sides that are compared, in this process or as servers, one after another."""
