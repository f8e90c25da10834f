"""Lets the requests for a model whose pools sleep wait until it has woken.

1. The first one makes this frontend wish for the model, and the wish is repeated for as long as any waits.
2. Whenever a replica has joined, all of them look again whether they can be served.
3. Who has waited for `max_wake_s` is refused, and told when to come again by how long it took the last time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from app.background import watch
from app.errors import Asleep, NoReplica
from app.frontend import metrics

WISH_S = 1.0
"""How often a wish is repeated; deployments/autoscaling.py heeds it for some seconds."""

T = TypeVar("T")


class Waker:
    """Wakes one model.  There is one in each frontend, and many wishes wake it as one does."""

    def __init__(
        self,
        model: str,
        wish: Callable[[], Awaitable[object]],
        max_wake_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wish` tells the cluster once that the model is wanted.  `max_wake_s` is ``limits.max_wake_s``."""
        self.num_waiting = 0
        """The requests that wait for the model to wake."""
        self._wish = wish
        self._max_wake_s = max_wake_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._next_join: asyncio.Future[None] = self._loop.create_future()
        self._wishing: asyncio.Task[None] | None = None
        self._began_at: float | None = None
        """When the first of those that wait came."""
        self._last_wake_s: float | None = None
        self._waits = metrics.WAKE.labels(model)

    def on_join(self) -> None:
        """Take note that a replica has joined one of the model's pools."""
        self._next_join.set_result(None)
        self._next_join = self._loop.create_future()

    async def until_served(self, serve: Callable[[], Awaitable[T]]) -> T:
        """Return what `serve` returns; it is called again after a join if it raises NoReplica.

        Raises Asleep after `max_wake_s` seconds, and what else `serve` raises.
        """
        since = self._clock()
        self._begin(since)
        try:
            while True:
                next_join = self._next_join
                try:
                    served = await serve()
                except NoReplica:
                    await self._wait_for(next_join, since)
                else:
                    self._on_awake(since)
                    return served
        finally:
            self.num_waiting -= 1
            if not self.num_waiting:
                self._began_at = None

    def _begin(self, now: float) -> None:
        self.num_waiting += 1
        if self._began_at is None:
            self._began_at = now
        self._start_wishing()

    def _start_wishing(self) -> None:
        if self._wishing is None and self.num_waiting:
            self._wishing = asyncio.create_task(self._keep_wishing(), name="wake")
            # Ray's GCS may be away for a while.
            watch(self._wishing, lambda _: self._loop.call_later(WISH_S, self._start_wishing))

    async def _keep_wishing(self) -> None:
        try:
            while self.num_waiting:
                await self._wish()
                await asyncio.sleep(WISH_S)
        finally:
            self._wishing = None

    async def _wait_for(self, join: asyncio.Future[None], since: float) -> None:
        left_s = since + self._max_wake_s - self._clock()
        joined, _ = await asyncio.wait([join], timeout=max(0.0, left_s))
        if not joined:
            raise Asleep(self._retry_after_s())

    def _on_awake(self, since: float) -> None:
        now = self._clock()
        self._waits.observe(now - since)
        if self._began_at is not None:
            self._last_wake_s, self._began_at = now - self._began_at, None

    def _retry_after_s(self) -> float:
        """Return what is left of the time that waking took the last time.

        If that is not known, or was shorter than it takes now, this is as long as a request may wait.
        """
        waited_s = self._clock() - self._began_at if self._began_at is not None else 0.0
        left_s = (self._last_wake_s or 0.0) - waited_s
        return left_s if left_s > 0 else self._max_wake_s
