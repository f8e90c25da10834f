"""The deployments around one engine: prefill, decode, and what both report."""
