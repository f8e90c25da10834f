"""Faults that a sim engine makes on purpose.  When they occur depends on its seed and its work, not on a clock."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FaultKind = Literal[
    "prefill_error", "decode_error", "engine_death", "hang", "transfer_failure", "kv_change", "slow_step"
]

_SCALE = 2**32


class Fault(BaseModel):
    """One kind of fault, and when it occurs.

    ====================  ============================================  ===========
    kind                  what happens                                  occasion
    ====================  ============================================  ===========
    `prefill_error`       the prefill ends with an internal error       a prefill
    `decode_error`        the request ends with an internal error       a generate
    `engine_death`        the engine is dead from then on               a request
    `hang`                the engine makes no more steps                a request
    `transfer_failure`    the pull fails when it has begun              a pull
    `kv_change`           other KV arrives than was sent                a pull
    `slow_step`           the step lasts `factor` times as long         a step
    ====================  ============================================  ===========

    The occasions of each kind are counted from the engine's start; the first has the number 1.  Requests with which
    Baton itself measures the engine are no occasions; their steps and pulls are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    at: int | None = Field(default=None, ge=1)
    """The number of the one occasion on which it occurs."""
    probability: float | None = Field(default=None, gt=0, le=1)
    """Instead of `at`: how likely it is on each occasion."""
    after_tokens: int = Field(default=0, ge=0)
    """Output tokens that the request gets before (decode_error, engine_death, hang); a prefill counts as its first."""
    factor: float = Field(default=10.0, gt=0)
    """How many times as long the step takes (slow_step)."""

    @model_validator(mode="after")
    def _befalls_something(self) -> Self:
        if (self.at is None) == (self.probability is None):
            raise ValueError("set either `at` or `probability`")
        return self


class FaultPlan:
    """Decides on which occasions a fault occurs."""

    def __init__(self, faults: list[Fault], seed: int) -> None:
        self._faults = list(enumerate(faults))
        self._kinds = {fault.kind for fault in faults}
        self._seed = seed
        self._num_occasions: Counter[str] = Counter()

    def strike(self, *kinds: FaultKind) -> Fault | None:
        """Count an occasion of each of `kinds`, and return the first configured fault that occurs on it, if any."""
        if self._kinds.isdisjoint(kinds):
            return None
        for kind in kinds:
            self._num_occasions[kind] += 1
        return next((fault for index, fault in self._faults if fault.kind in kinds and self._hits(index, fault)), None)

    def _hits(self, index: int, fault: Fault) -> bool:
        occasion = self._num_occasions[fault.kind]
        if fault.at is not None:
            return occasion == fault.at
        assert fault.probability is not None
        return hash((self._seed, index, occasion)) % _SCALE < fault.probability * _SCALE
