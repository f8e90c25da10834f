"""Virtual time: what is due runs in the order of its moments, and no time passes in between."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Timeline:
    """Virtual time in seconds.  Calls run in the order of their moments, then in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_calls = 0

    def at(self, moment: float, call: Callable[..., None], *arguments: Any) -> None:
        self._num_calls += 1
        heappush(self._due, (moment, self._num_calls, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def run(self) -> None:
        """Run until nothing is due."""
        due = self._due
        while due:
            self.now, _, call, arguments = heappop(due)
            call(*arguments)
