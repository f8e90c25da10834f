"""Stands in for SGLang's kernel package, whose wheels are for GPUs.

On a CPU without that package SGLang computes with torch, but its modules still import helpers of speculative decoding
from here by name. Nothing that Baton asks for calls them, so each is a function that says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not there: Baton's SGLang for the CPU has no such kernel")

    return missing
