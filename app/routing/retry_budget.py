"""How many requests a frontend may try again, so that retries never become the load that keeps replicas down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

SHARE = 0.1
"""The retries that are allowed, as a share of the recent requests."""
FLOOR = 10
"""So many recent retries are allowed at any load.  One replica that fails needs a few, until it is ejected
(app/routing/ejection.py)."""
WINDOW_S = 60.0
"""What is recent: requests and retries count less with time, by a factor of e in WINDOW_S seconds."""


class RetryBudget:
    """The budget of one frontend, over all models."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requests = self._retries = 0.0
        self._counted_at = clock()
        self.num_refused = 0
        """How many retries there was no budget for so far."""

    def count_request(self) -> None:
        self._fade()
        self._requests += 1

    def take(self) -> bool:
        """Take one retry out of the budget.  Returns whether there was one."""
        self._fade()
        if self._left() < 1:
            self.num_refused += 1
            return False
        self._retries += 1
        return True

    def _left(self) -> float:
        return max(FLOOR, SHARE * self._requests) - self._retries

    def describe(self) -> dict[str, float]:
        """Return the recent requests and retries, faded as WINDOW_S says, and how many retries are left."""
        self._fade()
        return {
            "recent_requests": round(self._requests, 1),
            "recent_retries": round(self._retries, 1),
            "retries_left": int(self._left()),
            "refused_so_far": self.num_refused,
        }

    def _fade(self) -> None:
        now = self._clock()
        kept = math.exp((self._counted_at - now) / WINDOW_S)
        self._counted_at = now
        self._requests *= kept
        self._retries *= kept
