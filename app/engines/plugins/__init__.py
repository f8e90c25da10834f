"""Plug-ins that vLLM and SGLang load in each of their processes."""
