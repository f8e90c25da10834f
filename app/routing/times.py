"""Predicts how long a prompt's first token takes, from the pace that replicas measured and from what requests took.

    prefill  = (queue + prompt) * learnt            on a prefill replica
    handover = (BASE_S + S_PER_TOKEN * moved) * learnt     from prefill's end to the first token
    pull     = S_PER_TOKEN * moved * (learnt - 1)   from there to the second, if only that waits for the KV
    local    = (queue + prompt) * learnt            where the prompt is decoded

`queue` and `prompt` are seconds by the replica's pace (app/pace.py), measured when it started, by prompts that were not
its first.  What requests teach is only by how much the four are off (learnt_ratio.py).  So neither a first request nor
a stall makes a way look hopeless for long, and a cold frontend predicts as well as any other.
"""

from __future__ import annotations

import msgspec

from app.routing.learnt_ratio import LearntRatio

BASE_S = 0.008
"""Ray's call, the descriptor's way and a step: 5 to 7 ms (docs/benchmarks/2026-11-28-gpu.md), and some more on CPUs."""
S_PER_TOKEN = 1.3e-5
"""10 GB/s with 131,072 bytes of KV per token.  It is part of the handover if the first token waits for the KV, else of
the pull."""
MIN_MOVED, NOTICED_S = 1024, 0.05
"""What is learnt of a pull: from so many tokens on, and without the time in which an engine may notice the KV only when
its step ends."""
PULL_PATIENCE = 512
"""How many requests that went another way it takes until a slow way for KV is forgotten.  It rarely gets quicker, and
trying it costs a client seconds: 8 s for 30,000 tokens by TCP on one machine (docs/benchmarks/2026-11-29-gpu.md)."""
SMOOTHING = 0.3
"""The share of the newest request in the belief that first tokens wait for their KV."""


class PromptTimes(msgspec.Struct, frozen=True):
    """The times of one prompt on one replica, in seconds by the replica's pace."""

    queue_s: float
    """What the prompts before it take."""
    prompt_s: float

    @property
    def total_s(self) -> float:
        return self.queue_s + self.prompt_s


class TimePredictor:
    """Predicts the times of the ways in which a prompt can be prefilled, and learns from the times that they took."""

    def __init__(self) -> None:
        self.prefill = LearntRatio()
        self.local = LearntRatio()
        self.handover = LearntRatio()
        self.pull = LearntRatio(patience=PULL_PATIENCE)
        self._waits_for_kv = 0.0

    def handover_s(self, num_moved: int) -> float:
        """Predict the seconds from the end of a remote prefill to the first token."""
        return self.handover.value * self._expected_handover_s(num_moved)

    def _expected_handover_s(self, num_moved: int) -> float:
        return BASE_S + S_PER_TOKEN * num_moved * (self._waits_for_kv > 0.5)

    def pull_s(self, num_moved: int, slowness: float = 1.0) -> float:
        """Predict for how many seconds the second token waits for KV after a first that did not, on a slow way.

        `slowness` is that of the pair's nodes (topology.py).  What it takes on a quick way (S_PER_TOKEN) does not
        count: it is no longer than what one prompt on decode costs the others there, and goodput is no better with it.
        """
        if self._waits_for_kv > 0.5:
            return 0.0
        return max(0.0, self._slow_at_least_1 * slowness - 1) * S_PER_TOKEN * num_moved

    @property
    def _slow_at_least_1(self) -> float:
        return max(1.0, self.pull.value)

    def learn_pull(self, num_moved: int, transfer_s: float) -> float | None:
        """Learn that the KV of `num_moved` tokens took `transfer_s` from one engine to the other.

        Returns this time divided by what it takes lately; None if it tells nothing.
        """
        if num_moved < MIN_MOVED:
            return None
        quick_s, took_s = S_PER_TOKEN * num_moved, max(0.0, transfer_s - NOTICED_S)
        self.pull.learn(quick_s, took_s)
        return took_s / (self._slow_at_least_1 * quick_s)

    def learn_remote(
        self, expected: PromptTimes, ttft_s: float, prefill_s: float | None, num_moved: int, *, waited_for_kv: bool
    ) -> float | None:
        """Learn from a remote prefill; `prefill_s` is prefill's part of `ttft_s`, or None if that is not known.

        Returns the time of the rest, the handover, divided by its predicted time; None if the rest is not known.
        """
        self.local.avoid()
        self._waits_for_kv += SMOOTHING * (waited_for_kv - self._waits_for_kv)
        if prefill_s is None or not 0 < prefill_s < ttft_s:
            self.prefill.learn(expected.total_s, ttft_s - self._expected_handover_s(num_moved))
            return None
        self.prefill.learn(expected.total_s, prefill_s)
        slowness = (ttft_s - prefill_s) / self.handover_s(num_moved)
        self.handover.learn(self._expected_handover_s(num_moved), ttft_s - prefill_s)
        return slowness

    def learn_local(self, expected: PromptTimes, ttft_s: float) -> None:
        self.local.learn(expected.total_s, ttft_s)
        self.prefill.avoid()
        self.handover.avoid()
        self.pull.avoid()

    def ratios(self) -> dict[str, float]:
        """Return by how much each of the four is off at present."""
        return {
            "prefill": self.prefill.value,
            "local": self.local.value,
            "handover": self.handover.value,
            "pull": self.pull.value,
        }
