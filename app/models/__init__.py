"""Where a model's files are, and the tiny models that Baton makes itself."""
