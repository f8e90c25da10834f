"""``python -m benchmarks.routing``: how well and how fast the router decides."""
