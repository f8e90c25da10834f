"""The campaign's overload: what it calls unfair, too little, too much or too slow."""

from __future__ import annotations

import pytest

from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.overload import OPEN_S, SETTLED_S, Measured, Reply


def measured(
    served: int = 30, refused: tuple[Reply, ...] = (), recovery_s: float = 1.0, growth_bytes: int = 0
) -> Measured:
    """An overload at a capacity of two requests a second, of whose requests some were served evenly."""
    step_s = (OPEN_S - SETTLED_S) / served
    replies = [Reply(200, False, 100.0 + SETTLED_S + (n + 0.5) * step_s, 2.0) for n in range(served)]
    before = [Reply(200, False, 100.0 + SETTLED_S / 2, 1.0)] * 10  # the line was still short
    return Measured(2.0, 100.0, [*before, *replies, *refused], recovery_s, growth_bytes)


def test_as_much_is_served_as_without_an_overload() -> None:
    found = measured(refused=(Reply(429, True, 110.0, 0.1), Reply(503, True, 110.0, 0.1)))
    found.check()
    assert found.goodput == 1.0
    assert str(found).startswith("42 requests at 4 x 2.0/s, goodput 1.00 of it, median 2.0 s")


@pytest.mark.parametrize(
    "found",
    [
        measured(served=26),
        measured(recovery_s=11.0),
        measured(growth_bytes=2**29),
        measured(refused=(Reply(429, False, 110.0, 0.1),)),
        measured(refused=(Reply(500, True, 110.0, 0.1),)),
        measured(refused=(Reply(0, False, 110.0, 0.1),)),
    ],
    ids=["goodput", "recovery", "memory", "no Retry-After", "500", "no answer"],
)
def test_what_should_not_be_is_told(found: Measured) -> None:
    with pytest.raises(BadAnswer):
        found.check()
