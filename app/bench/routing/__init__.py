"""``baton bench-routing``: how well and how fast the router decides."""
