"""Work that outlives the HTTP request from which it was begun."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any


def spawn_detached(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A task outside the current HTTP request, with which Serve would otherwise cancel the task's calls."""
    return asyncio.create_task(coroutine, name=name, context=contextvars.Context())
