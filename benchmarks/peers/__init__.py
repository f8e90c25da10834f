"""``python -m benchmarks.peers``: Baton and its peers, started and measured one after another under the same load."""
