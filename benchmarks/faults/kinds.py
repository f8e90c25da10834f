"""All kinds of faults, and the order in which they come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from random import Random
from typing import Protocol

from benchmarks.faults.client_faults import CLIENT_FAULTS
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.inside_faults import inside_faults
from benchmarks.faults.machine_faults import machine_faults
from benchmarks.faults.overload import OVERLOADS
from benchmarks.faults.process_faults import process_faults
from benchmarks.faults.slow_clients import SLOW_CLIENTS
from benchmarks.faults.updates import UPDATES


class Fault(Protocol):
    """One kind of fault."""

    @property
    def name(self) -> str: ...

    async def strike(self, fleet: Fleet, random: Random) -> str | None:
        """Make the fault, and return what was measured, if anything was, when it is over and undone.

        Raises LookupError if there is nothing that it could befall, BadAnswer if somebody got what nobody should get.
        """
        ...


def kinds(engine: str) -> list[Fault]:
    """Return all kinds for an application on `engine`; only real engines have processes of their own."""
    return [
        *process_faults(has_engines=engine != "sim"),
        *CLIENT_FAULTS,
        *SLOW_CLIENTS,
        *inside_faults(engine),
        *OVERLOADS,
        *UPDATES,
        *machine_faults(os.environ.get("RAY_TMPDIR")),
    ]


def draw(found: Sequence[Fault], num: int, random: Random) -> Iterator[Fault]:
    """Yield `num` faults: each kind in turn, in another order each round."""
    round_of: list[Fault] = []
    for _ in range(num):
        if not round_of:
            round_of = random.sample(found, len(found))
        yield round_of.pop()
