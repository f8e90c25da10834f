"""How many times as long as expected something takes, learnt from requests, in a way that cannot lock itself out."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 9
"""The number of requests whose median counts.  So up to four that are absurd in a row change nothing (a first use, a
stall), and from whatever there was before, five are enough to learn the truth."""
PATIENCE = 16
"""After this many requests that went another way, nothing of what was learnt of this way is believed any more."""
MOST = 64.0
"""The largest ratio that is believed, and the inverse of the smallest.  Where the pace was measured, it is off by much
less.  Where it was not, that of a GPU is taken, and a CPU is 5 to 40 times as slow."""
SHORTEST_S = 1e-5
"""Nothing takes less, although a clock may say so."""


class LearntRatio:
    """The median of actual / expected over the latest requests.  It fades to 1 while requests avoid the way that it is
    about.  What made the way slow may have passed, and only a request can find that out.

    So a way that was believed to be hopeless is tried by one request in `patience`, or by more if it is nearly as good
    as the other one.  If it turns out to be so no longer, what was learnt before is dropped.
    """

    def __init__(self, most: float = MOST, patience: int = PATIENCE) -> None:
        self._most = math.log(most)
        self._patience = patience
        self._logs: deque[float] = deque(maxlen=WINDOW)
        self._num_avoided = 0

    @property
    def value(self) -> float:
        if not self._logs or self._num_avoided >= self._patience:
            return 1.0
        believed = median(self._logs) * (1 - self._num_avoided / self._patience)
        return math.exp(min(self._most, max(-self._most, believed)))

    def learn(self, expected_s: float, actual_s: float) -> None:
        """Take in one request."""
        if self._num_avoided >= self._patience // 2:
            self._logs.clear()
        self._num_avoided = 0
        self._logs.append(math.log(max(actual_s, SHORTEST_S) / max(expected_s, SHORTEST_S)))

    def avoid(self) -> None:
        """Take note that a request went another way."""
        self._num_avoided += 1
