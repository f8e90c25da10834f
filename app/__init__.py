"""Baton: serves large language models with prefill and decode disaggregated, as one Ray Serve application."""

__version__ = "0.1.0"
