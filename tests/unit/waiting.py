"""Waiting for what other tasks of the same event loop do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE_S = 5.0


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` is true.  Raises TimeoutError after PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
