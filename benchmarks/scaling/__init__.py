"""Waves of load on pools that scale: ``python -m benchmarks.scaling``."""
