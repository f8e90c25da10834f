"""What a run of waves sent, and what became of the pools and the requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import msgspec

from app.bench.report import Source

SAMPLE_S = 0.5
ANSWER_TIMEOUT_S = 300.0
VOCABULARY = range(1000, 2000)
"""Tokens that every model has.  It makes no difference to the sim engine which ones they are."""
WaveKind = Literal["light", "long prompts", "long outputs"]


class Wave(msgspec.Struct, frozen=True):
    """A period with one kind of load: a Poisson process of requests of one size."""

    kind: WaveKind
    duration_s: float
    rate: float
    """Requests/s."""
    input_tokens: int
    output_tokens: int


class Ended(msgspec.Struct, frozen=True):
    """One request.  Its times are in seconds; `at_s` counts from the beginning of the run."""

    kind: WaveKind
    at_s: float
    ttft_s: float | None
    itl_s: float | None
    """The mean over the answer; None for an answer of one chunk."""
    error: str = ""


class PoolSample(msgspec.Struct, frozen=True):
    """A deployment at one moment."""

    ready: int
    target: int
    reason: str


class Sample(msgspec.Struct, frozen=True):
    """All deployments at one moment."""

    at_s: float
    pools: dict[str, PoolSample]
    """The samples by the deployments' names."""

    def pool(self, role: str) -> PoolSample:
        return next(pool for name, pool in self.pools.items() if name.startswith(role))


class ScalingReport(Source, frozen=True, kw_only=True):
    """All results of one run of the waves."""

    model: str
    ttft_target_ms: float
    itl_target_ms: float
    waves: list[Wave]
    requests: list[Ended]
    samples: list[Sample]
    findings: dict[str, bool]
    """What the run should show, and whether it did."""

    def wave_starts(self) -> list[float]:
        return starts(self.waves)


def starts(waves: Sequence[Wave]) -> list[float]:
    """Return when each wave begins and, as the last entry, when the last one ends, in seconds."""
    return list(accumulate((wave.duration_s for wave in waves), initial=0.0))


def describe(wave: Wave) -> str:
    return f"{wave.kind}: {wave.rate:g} requests/s of {wave.input_tokens} + {wave.output_tokens} tokens"
