"""Faults that a sim engine commits on purpose, at moments that depend on its seed and its work and on no clock."""

from __future__ import annotations

from collections import Counter
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FaultKind = Literal["prefill_error", "decode_error", "engine_death", "hang", "transfer_failure", "slow_step"]

_SCALE = 2**32


class Fault(BaseModel):
    """One way to go wrong, and when.

    ====================  ============================================  ===========
    kind                  what happens                                  occasion
    ====================  ============================================  ===========
    `prefill_error`       the prefill ends with an internal error       a prefill
    `decode_error`        the request ends with an internal error       a generate
    `engine_death`        the engine is dead from then on               a request
    `hang`                the engine makes no more steps, unnoticed     a request
    `transfer_failure`    the pull fails when it has begun              a pull
    `slow_step`           the step lasts `factor` times as long         a step
    ====================  ============================================  ===========

    Occasions of a kind are counted from 1 since the engine's start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FaultKind
    at: int | None = Field(default=None, ge=1)
    """The one occasion that it befalls."""
    probability: float | None = Field(default=None, gt=0, le=1)
    """Or how likely it befalls any of them."""
    after_tokens: int = Field(default=0, ge=0)
    """Output tokens that the request gets before (decode_error, engine_death, hang); a prefill counts as its first."""
    factor: float = Field(default=10.0, gt=0)
    """Of slow_step."""

    @model_validator(mode="after")
    def _befalls_something(self) -> Self:
        if (self.at is None) == (self.probability is None):
            raise ValueError("set either `at` or `probability`")
        return self


class FaultPlan:
    """Which occasions are hit."""

    def __init__(self, faults: list[Fault], seed: int) -> None:
        self._faults = list(enumerate(faults))
        self._kinds = {fault.kind for fault in faults}
        self._seed = seed
        self._num_occasions: Counter[str] = Counter()

    def strike(self, *kinds: FaultKind) -> Fault | None:
        """Count an occasion of each of `kinds`; the first configured fault that befalls it, if any."""
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
