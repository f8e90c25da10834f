"""A replica's load, as its own clock measured it.

A replica reports the integral of each field of `Load` since its start.  The difference of two reports over the time
between them is the exact mean, however rarely it reports and whatever came and went meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import msgspec


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Means over a period, of one replica or summed over several."""

    queued_tokens: float = 0.0
    """Prompt tokens that wait to be computed here, cached ones left out."""
    busy: float = 0.0
    """The share of the time in which any tokens wait."""
    computed_tokens: float = 0.0
    """Prompt tokens computed per second."""
    prompts: float = 0.0
    """Prompts computed per second."""
    prefilling: float = 0.0
    """Sequences whose prompt is being computed here or waits for it."""
    waiting: float = 0.0
    """Sequences without a token whose prompt another replica has computed: they wait for a slot or for their KV.  So do
    those in the frontends that wait for room to decode."""
    transferring: float = 0.0
    """Sequences of these whose KV is being transferred."""
    started: float = 0.0
    """Sequences per second that had waited and got their first token."""
    decoding: float = 0.0
    """Sequences that have a token."""
    generated_tokens: float = 0.0
    """Tokens per second, without the first of each sequence."""
    kv_use: float = 0.0
    """The share of the KV memory that the sequences here take up."""

    @property
    def sequences(self) -> float:
        return self.prefilling + self.waiting + self.decoding


FIELDS = Load.__struct_fields__


def total(loads: Sequence[Load]) -> Load:
    """Return the sum over replicas."""
    return Load(**{field: sum(getattr(load, field) for load in loads) for field in FIELDS})


def mean_load(earlier: Mapping[str, float], later: Mapping[str, float], seconds: float) -> Load:
    """Return a replica's mean load between two of its reports that are `seconds` apart."""
    return Load(**{field: max(0.0, later[field] - earlier[field]) / seconds for field in FIELDS})


class LoadMeter:
    """Integrates one replica's load."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._levels: dict[str, float] = {}
        self._integrals = dict.fromkeys(FIELDS, 0.0)

    def set_levels(self, **levels: float) -> None:
        """Set the values that these fields have from now on."""
        self._advance()
        self._levels.update(levels)

    def count(self, **events: float) -> None:
        """Add events to these fields."""
        for field, number in events.items():
            self._integrals[field] += number

    def read(self) -> dict[str, float]:
        """Return the integrals of all fields from the start until now."""
        self._advance()
        return dict(self._integrals)

    def _advance(self) -> None:
        now = self._clock()
        for field, level in self._levels.items():
            self._integrals[field] += level * (now - self._at)
        self._at = now
