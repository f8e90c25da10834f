"""Notices a replica whose process stands still: it has work, and nothing comes from it."""

from __future__ import annotations

LOOK_S = 1.0
"""The time between two looks."""
MAX_LOOKS = 10
"""After so many looks in a row at which nothing had come, a replica with work counts as gone.  It may have nothing
to do for that work: prefill until decode has the KV, decode until prefill is nearly done.  So one that runs tells its
load every second, even if it has none (deployments/replica/publisher.py) and whatever its engine does.  A loop that is
held up for seconds by a busy machine is no reason yet."""


class Silence:
    """Counts the looks at one connection.

    It counts looks instead of comparing clocks: a frontend that stood still itself finds at its next look what came
    meanwhile, or at least blames nobody for the time in which it did not listen.
    """

    def __init__(self) -> None:
        self._num_heard = 0
        self._num_looks = 0

    def look(self, num_heard: int, *, has_work: bool) -> bool:
        """Return whether the replica counts as gone.  `num_heard` is how often anything came on the connection."""
        is_silent = has_work and num_heard == self._num_heard
        self._num_looks = self._num_looks + 1 if is_silent else 0
        self._num_heard = num_heard
        return self._num_looks >= MAX_LOOKS
