"""Plug-ins that vLLM and SGLang load in each of their processes."""

from __future__ import annotations

import os

_begun: set[str] = set()


def begins(switch: str) -> bool:
    """Return whether the environment variable `switch` is set, the first time in this process; later False.

    Engines may load a plug-in several times, and what it patches must be patched once.
    """
    if switch not in os.environ or switch in _begun:
        return False
    _begun.add(switch)
    return True
