"""``baton bench`` puts load on OpenAI endpoints that already run, alone or side by side."""
