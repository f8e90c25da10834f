"""What a replica notices of its own speed while it works: how its time is shared, and how long its steps take.

All means are over a moving window with weights that fade exponentially.  The window is as long as sequences typically
decode here, because a limit on the mean time between tokens is one on just that long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from app.pace import Pace

SHORTEST_WINDOW_S, LONGEST_WINDOW_S = 0.5, 10.0
FIRST_WINDOW_S = 2.0
"""The window until a sequence has ended."""
FIRST_OUTPUT_TOKENS = 1024.0
"""How many tokens sequences are taken to get until some have ended.  It is rather many, as a replica that has taken too
many sequences cannot give them away."""
SMOOTHING = 0.1
"""The share of the newest sequence in the means over sequences."""
PRIOR_S = 1.0
"""How many seconds of one decoding sequence the measured pace weighs against what is noticed."""


class RecentLoad:
    """The recent past of one replica.  Call `update` whenever one of its arguments changes, and now and then."""

    def __init__(self, pace: Pace | None, clock: Callable[[], float] = time.monotonic) -> None:
        """With no `pace`, `slowness` stays 1."""
        self.window_s = FIRST_WINDOW_S
        self.output_tokens = FIRST_OUTPUT_TOKENS
        """How many tokens sequences typically get here."""
        self._pace = pace
        self._clock = clock
        self._at = clock()
        self._is_prefilling = False
        self._decoding = 0
        self._step_s = 0.0
        self._num_tokens = 0
        self._spent_s = self._expected_s = 0.0
        self._prefill_share = 0.0

    @property
    def prefill_share(self) -> float:
        """The share of the time that prompts take here.  What sequences get meanwhile, a token each step, is taken off:
        their time between tokens is that of a step over the rest of the share.
        """
        return min(1.0, max(0.0, self._prefill_share))

    @property
    def slowness(self) -> float:
        """How many times as long as by the pace a step without prompt tokens takes; near 1 if few were seen lately."""
        return (self._spent_s + PRIOR_S) / (self._expected_s + PRIOR_S)

    def growth_tokens(self, decoding: int, generated: int) -> int:
        """Return by how many tokens of KV the sequences that decode will be longer, on the mean over their time here.

        They have `generated` tokens by now.  Each is, on the mean, half as long as it will be.
        """
        return max(0, round(decoding * self.output_tokens / 2) - generated)

    def update(self, *, is_prefilling: bool, decoding: int, kv_tokens: int, num_tokens: int) -> None:
        """Take note of the state from now on; `num_tokens` counts all tokens that decoding ever gave out here."""
        now = self._clock()
        passed_s = now - self._at
        self._at = now
        kept = math.exp(-passed_s / self.window_s)
        expected_s = (num_tokens - self._num_tokens) * self._step_s
        self._prefill_share *= kept
        if self._is_prefilling:
            got = expected_s * self.slowness / (self._decoding * passed_s) if self._decoding and passed_s else 0.0
            self._prefill_share += (1 - kept) * (1 - got)
        self._spent_s *= kept
        self._expected_s *= kept
        if not self._is_prefilling and self._pace is not None:
            self._spent_s += self._decoding * passed_s
            self._expected_s += expected_s
        self._num_tokens = num_tokens
        self._is_prefilling, self._decoding = is_prefilling, decoding
        if self._pace is not None:
            self._step_s = self._pace.step_s(decoding, kv_tokens)

    def on_sequence_end(self, decoded_s: float, num_tokens: int) -> None:
        """Take note that a sequence has ended that decoded for so long and got `num_tokens` tokens."""
        self.output_tokens += SMOOTHING * (num_tokens - self.output_tokens)
        window_s = self.window_s + SMOOTHING * (decoded_s - self.window_s)
        self.window_s = min(LONGEST_WINDOW_S, max(SHORTEST_WINDOW_S, window_s))
