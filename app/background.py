"""The tasks that run beside all requests, each with an owner who is told if it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

logger = logging.getLogger("baton.background")

_watched: WeakSet[asyncio.Task[Any]] = WeakSet()


def watch(task: asyncio.Task[Any], on_death: Callable[[BaseException], object]) -> None:
    """Log it if `task` ends by an error, and call `on_death` with that.  A task that is cancelled has not died."""

    def on_end(_: object) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task=%s died", task.get_name(), exc_info=error)
            on_death(error)

    _watched.add(task)
    task.add_done_callback(on_end)


def is_watched(task: asyncio.Task[Any]) -> bool:
    return task in _watched
