"""``baton bench``: Baton against plain vLLM and against Ray Serve LLM, under the same load on the same machine."""
