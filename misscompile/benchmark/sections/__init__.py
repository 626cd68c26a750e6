"""One file for each section of the benchmark: `run(settings)` measures and returns its tables."""
