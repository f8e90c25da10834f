"""Which replica gets the next request: the one with the fewest in flight from here, and not one that just failed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

AVOID_S = 10.0
"""How long a replica that failed is passed over; Serve needs three failed health checks to replace it."""


class LoadBalancer:
    """Counts this process's requests in flight on each replica of one pool."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: Counter[str] = Counter()
        self._avoid_until: dict[str, float] = {}

    def pick(self, replicas: Collection[str], tried: Collection[str] = ()) -> str | None:
        """The least loaded of `replicas`, ties broken at random; None if all were `tried`.

        Replicas that failed lately come last rather than never: one that is suspect beats none.
        """
        candidates = [replica for replica in replicas if replica not in tried]
        if not candidates:
            return None
        now = self._clock()
        self._avoid_until = {replica: until for replica, until in self._avoid_until.items() if until > now}
        return min(candidates, key=lambda r: (r in self._avoid_until, self._in_flight[r], random.random()))

    def avoid(self, replica: str) -> None:
        """Pass over `replica` for AVOID_S seconds."""
        self._avoid_until[replica] = self._clock() + AVOID_S

    def is_avoided(self, replica: str) -> bool:
        return self._avoid_until.get(replica, 0.0) > self._clock()

    @contextmanager
    def track(self, replica: str) -> Iterator[None]:
        """Count one request on `replica` while the block runs."""
        self._in_flight[replica] += 1
        try:
            yield
        finally:
            self._in_flight[replica] -= 1
            if not self._in_flight[replica]:
                del self._in_flight[replica]
