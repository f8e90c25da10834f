"""All kinds of faults, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Protocol

from benchmarks.faults.client_faults import CLIENT_FAULTS
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.overload import OVERLOADS
from benchmarks.faults.process_faults import process_faults
from benchmarks.faults.updates import UPDATES


class Fault(Protocol):
    """One kind of fault."""

    @property
    def name(self) -> str: ...

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Make the fault, and return what was measured, or nothing, when it is over and undone.

        Raises LookupError if there is nothing that it could befall, BadAnswer if somebody got what nobody should get.
        """
        ...


def kinds(*, has_engines: bool) -> list[Fault]:
    """Return all kinds; engines have processes of their own unless they are simulated."""
    found: list[Fault] = [*process_faults(has_engines=has_engines), *CLIENT_FAULTS, *OVERLOADS, *UPDATES]
    return found


def draw(found: Sequence[Fault], num: int, random: Random) -> Iterator[Fault]:
    """Yield `num` faults: each kind in turn, in another order each round."""
    round_of: list[Fault] = []
    for _ in range(num):
        if not round_of:
            round_of = random.sample(found, len(found))
        yield round_of.pop()
