"""A Ray cluster of several machines on this one, for tests and benchmarks."""
