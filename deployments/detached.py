"""Starts tasks that outlive the HTTP request in which they start."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any


def spawn_detached(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """Start a task outside the context of the current HTTP request.

    Otherwise Serve would cancel the task's calls together with the request.
    """
    return asyncio.create_task(coroutine, name=name, context=contextvars.Context())
