"""``baton bench``: load on OpenAI endpoints that already run, alone or side by side."""
