"""Calls those who only watch what others do: metrics, what the router learns, a frontend's state of its pools.

What goes wrong in them is theirs.  It is logged, and ends neither the sequence nor the connection that they watch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

logger = logging.getLogger("baton.observers")

SAY_AGAIN_S = 10.0
"""How often it is said that an observer fails: some are called for every token."""

P = ParamSpec("P")

_failures: dict[str, tuple[int, float]] = {}
"""How often each observer has failed since that was last said, and when it was."""


def tell(observer: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Call `observer`.  Returns whether it took it; if not, the error is logged."""
    try:
        observer(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever it is
        _say(getattr(getattr(observer, "func", observer), "__qualname__", type(observer).__name__))
        return False
    return True


def observing(method: Callable[P, object]) -> Callable[P, None]:
    """Make a method that only watches.  It is called as by `tell`."""

    @wraps(method)
    def observed(*args: P.args, **kwargs: P.kwargs) -> None:
        try:  # as `tell`, without another call for every token
            method(*args, **kwargs)
        except Exception:  # noqa: BLE001  whatever it is
            _say(method.__qualname__)

    return observed


def _say(name: str) -> None:
    now = time.monotonic()
    number, said_at = _failures.get(name, (0, -SAY_AGAIN_S))
    if now - said_at < SAY_AGAIN_S:
        _failures[name] = (number + 1, said_at)
        return
    _failures[name] = (0, now)
    logger.exception("observer=%s failed, and %d times more since this was last said", name, number)
