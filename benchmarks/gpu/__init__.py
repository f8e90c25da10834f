"""What Baton costs and gains on real GPUs: ``make bench-gpu``, or ``python -m benchmarks.gpu``."""
