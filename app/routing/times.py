"""Predicts how long a prompt's first token takes, from the pace that replicas measured and from what requests took.

    prefill  = (queue + prompt) * learnt            on a prefill replica
    handover = (BASE_S + S_PER_TOKEN * moved) * learnt     from prefill's end to the first token
    local    = (queue + prompt) * learnt            where the prompt is decoded

`queue` and `prompt` are seconds by the replica's pace (app/pace.py), measured when it started, by prompts that were not
its first.  What requests teach is only by how much the three are off (learnt_ratio.py).  So neither a first request nor
a stall makes a way look hopeless for long, and a cold frontend predicts as well as any other.
"""

from __future__ import annotations

import msgspec

from app.routing.learnt_ratio import LearntRatio

BASE_S = 0.008
"""Ray's call, the descriptor's way and a step: 5 to 7 ms (docs/benchmarks/2026-11-28-gpu.md), and some more on CPUs."""
S_PER_TOKEN = 1.3e-5
"""10 GB/s with 131,072 bytes of KV per token.  It counts if the first token waits for the KV."""
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
        self._waits_for_kv = 0.0

    def handover_s(self, num_moved: int) -> float:
        """Predict the seconds from the end of a remote prefill to the first token."""
        return self.handover.value * self._expected_handover_s(num_moved)

    def _expected_handover_s(self, num_moved: int) -> float:
        return BASE_S + S_PER_TOKEN * num_moved * (self._waits_for_kv > 0.5)

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

    def ratios(self) -> dict[str, float]:
        """Return by how much each of the three is off at present."""
        return {"prefill": self.prefill.value, "local": self.local.value, "handover": self.handover.value}
