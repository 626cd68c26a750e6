"""The sections of the benchmark: each measures what the settings ask for and returns its tables."""
