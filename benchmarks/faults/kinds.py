"""All kinds of faults, and the order in which they come."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from random import Random

from benchmarks.faults.client_faults import CLIENT_FAULTS
from benchmarks.faults.engine_faults import engine_faults
from benchmarks.faults.fault import Fault
from benchmarks.faults.inside_faults import inside_faults
from benchmarks.faults.machine_faults import machine_faults
from benchmarks.faults.overload import OVERLOADS
from benchmarks.faults.process_faults import process_faults
from benchmarks.faults.slow_clients import SLOW_CLIENTS
from benchmarks.faults.storm import storms
from benchmarks.faults.updates import UPDATES


def kinds(engine: str, in_a_row: int | None = None) -> list[Fault]:
    """Return all kinds for an application on `engine`; only real engines have processes of their own.

    `in_a_row`: the losses of each storm.
    """
    return [
        *process_faults(has_engines=engine != "sim"),
        *storms(in_a_row, has_engines=engine != "sim"),
        *CLIENT_FAULTS,
        *SLOW_CLIENTS,
        *inside_faults(engine),
        *engine_faults(engine),
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
