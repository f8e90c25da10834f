"""Notices a replica whose process stands still: it has work, and nothing comes from it.

It may have nothing to do for that work: prefill until decode has the KV, decode until prefill is nearly done.  So one
that runs tells its load every second, even if it has none (deployments/replica/publisher.py) and whatever its engine
does.  How long it may be silent follows its own silences, within bounds, as for engines (app/engines/progress.py): on a
machine that is so busy that replicas are silent for a second or two, that is no reason to leave one.
"""

from __future__ import annotations

from collections import deque

LOOK_S = 0.5
"""The time between two looks."""
MIN_LOOKS, MAX_LOOKS = 8, 20
"""After so many looks in a row at which nothing had come, a replica with work counts as gone: at least 4 s, at most
10 s.  It is the most if no other replica can take over its sequences, as they are lost then."""
PATIENCE = 4
"""How many times its longest silence of late a replica may be silent."""
MEMORY_LOOKS = 600
"""How long a silence is remembered: five minutes."""


class Silence:
    """Counts the looks at one connection.

    It counts looks instead of comparing clocks: a frontend that stood still itself finds at its next look what came
    meanwhile, or at least blames nobody for the time in which it did not listen.
    """

    def __init__(self) -> None:
        self.num_looks = 0
        """The looks in a row at which nothing had come of a replica with work."""
        self._num_heard = 0
        self._num_looks_ever = 0
        self._ended: deque[tuple[int, int]] = deque()
        """The silences of late that ended by a word: at which look, and after how many."""

    def look(self, num_heard: int, *, has_work: bool, can_be_replaced: bool) -> bool:
        """Return whether the replica counts as gone.  `num_heard` is how often anything came on the connection.

        `can_be_replaced` says whether another replica can take over its sequences.
        """
        self._num_looks_ever += 1
        if has_work and num_heard == self._num_heard:
            self.num_looks += 1
        else:
            if self.num_looks:
                self._ended.append((self._num_looks_ever, self.num_looks))
            self.num_looks = 0
        self._num_heard = num_heard
        return self.num_looks >= (self._patience() if can_be_replaced else MAX_LOOKS)

    def _patience(self) -> int:
        while self._ended and self._ended[0][0] < self._num_looks_ever - MEMORY_LOOKS:
            self._ended.popleft()
        longest = max((num_looks for _, num_looks in self._ended), default=0)
        return min(MAX_LOOKS, max(MIN_LOOKS, PATIENCE * longest))
