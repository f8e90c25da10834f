"""Prefix caches as frontends know them: names of KV blocks, and changes of what an engine holds."""
