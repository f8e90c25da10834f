"""Starts tasks that outlive the HTTP request in which they start."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger("baton.detached")


def spawn_detached(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Start a task outside the context of the current HTTP request.

    Otherwise Serve would cancel the task's calls together with the request.  What the task raises is logged.
    """
    task = asyncio.create_task(coroutine, name=name, context=contextvars.Context())
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)
