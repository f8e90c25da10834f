"""Ends a sequence that takes too long: to its first token, to the next one, or in all."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Literal

from app.config import LimitsConfig
from app.errors import DeadlineExceeded
from app.frontend.sequence_progress import SequenceProgress


class Overdue:
    """What was not in time: a token, the end of the sequence, or nothing yet."""

    what: Literal["", "token", "end"] = ""


@asynccontextmanager
async def in_time(progress: SequenceProgress, limits: LimitsConfig, deadline: float) -> AsyncGenerator[Overdue, None]:
    """Cancel the block once a delta is overdue, and raise TimeoutError from it; at `deadline`, DeadlineExceeded.

    `deadline` is in seconds of the clock of `progress`.  What the block gets says why it was cancelled; if nothing is
    overdue, the client has gone.  No token of a sequence that is paused is overdue.

    Deltas cost nothing here: a timer checks now and then whether one is overdue.  It does so at least every
    `itl_timeout_s`, so that it is in time for the second delta too, whenever the first one comes.
    """
    loop, overdue = asyncio.get_running_loop(), Overdue()
    timer: asyncio.Handle

    def look() -> None:
        nonlocal timer
        if progress.is_paused:
            due = math.inf
        elif progress.has_first_token and not progress.waits_for_kv:
            due = progress.last_token_at + limits.itl_timeout_s
        else:
            due = progress.waits_since + limits.ttft_timeout_s
        if (remaining_s := min(due, deadline) - progress.now()) > 0:
            timer = loop.call_later(min(remaining_s, limits.itl_timeout_s), look)
        else:
            overdue.what = "end" if deadline <= due else "token"
            timeout.reschedule(loop.time())

    try:
        async with asyncio.timeout(None) as timeout:
            timer = loop.call_soon(look)
            try:
                yield overdue
            finally:
                timer.cancel()
    except TimeoutError:
        if overdue.what == "end":
            raise DeadlineExceeded from None
        raise
