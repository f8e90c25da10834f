"""What a fault is to a campaign."""

from __future__ import annotations

from random import Random
from typing import Protocol

from benchmarks.faults.fleet import Fleet


class Fault(Protocol):
    """One kind of fault."""

    @property
    def name(self) -> str: ...

    async def strike(self, fleet: Fleet, random: Random) -> str | None:
        """Make the fault, and return what was measured, if anything was, when it is over and undone.

        Raises LookupError if there is nothing that it could befall, BadAnswer if somebody got what nobody should get.
        """
        ...
