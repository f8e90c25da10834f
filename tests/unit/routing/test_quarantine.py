"""Prompts under which engines died: how many deaths are evidence, for how long, and what clears a prompt."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from app.errors import Quarantined
from app.routing import quarantine
from app.routing.quarantine import GONE_WITHIN_S, REMEMBER_S, TOGETHER_S, Quarantine
from tests.unit.routing.fleet import Timers
from tests.unit.routing.samples import request


@pytest.fixture
def clock() -> Timers:
    return Timers()


@pytest.fixture
def known(clock: Timers) -> Quarantine:
    return Quarantine(clock)


def is_refused(known: Quarantine, **fields: object) -> bool:
    try:
        known.check(request(**fields))  # type: ignore[arg-type]
    except Quarantined:
        return True
    return False


def test_the_deaths_of_two_engines_quarantine_a_prompt_and_no_other(known: Quarantine) -> None:
    known.on_death(request(request_id="a"), "d0")
    known.on_death(request(request_id="b"), "d0")
    assert not is_refused(known)
    known.on_death(request(request_id="c"), "d1")
    assert is_refused(known, request_id="d")
    assert not is_refused(known, start=1)
    assert not is_refused(known, sampling={"temperature": 0.5})


def die_together(known: Quarantine, replica: str, *starts: int) -> None:
    """Have an engine die under several prompts, of which one sequence after another hears that."""
    exposures = ExitStack()
    for _ in starts:
        exposures.enter_context(known.exposing(replica))
    for start in starts:
        known.on_death(request(start=start), replica)
        exposures.close()  # all but the first hear of it when it is over


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1)])
def test_prompts_that_lost_two_engines_together_are_tried_once_more_each(
    known: Quarantine, order: tuple[int, ...]
) -> None:
    die_together(known, "d0", 1, 2, 3)
    assert not any(known.is_on_trial(request(start=start)) for start in order)
    die_together(known, "d1", *order)
    assert not any(is_refused(known, start=start) for start in order)
    assert all(known.is_on_trial(request(start=start)) for start in order)
    assert not known.is_on_trial(request(start=4))
    die_together(known, "d2", 2)
    assert [is_refused(known, start=start) for start in (1, 2, 3)] == [False, True, False]
    assert not known.is_on_trial(request(start=2))
    known.on_success(request(start=1))
    assert not known.is_on_trial(request(start=1))


def test_a_prompt_that_was_once_alone_on_an_engine_that_died_is_refused_after_two(known: Quarantine) -> None:
    die_together(known, "d0", 1)
    die_together(known, "d1", 1, 2, 3)
    assert [is_refused(known, start=start) for start in (1, 2, 3)] == [True, False, False]


def test_replicas_that_only_went_away_are_no_proof_either_if_others_waited_there(
    known: Quarantine, clock: Timers
) -> None:
    for replica in ("d0", "d1"):
        with known.exposing(replica), known.exposing(replica):
            known.on_failure(request(), replica)
        known.on_failure(request(start=1), replica)
        known.on_gone(replica, replica)
        clock.advance(TOGETHER_S + 1)
    assert not is_refused(known)
    assert not is_refused(known, start=1)
    assert known.is_on_trial(request())


def test_who_lost_only_a_connection_when_it_was_alone_stays_on_trial_until_that_was_a_death(known: Quarantine) -> None:
    die_together(known, "d0", 1, 2)
    die_together(known, "d1", 1, 2)
    with known.exposing("d2"):
        known.on_failure(request(start=1), "d2")
    assert not is_refused(known, start=1)
    assert known.is_on_trial(request(start=1))
    known.on_gone("d2", "a node")
    assert is_refused(known, start=1)
    assert known.num_quarantines == 1


def test_what_is_exposed_no_longer_is_forgotten(known: Quarantine) -> None:
    with known.exposing("d0", "p0"), known.exposing("d0"):
        pass
    assert not known._num_exposed


def test_a_prompt_is_refused_for_some_minutes_since_the_last_death(known: Quarantine, clock: Timers) -> None:
    known.on_death(request(), "d0")
    clock.advance(REMEMBER_S / 2)
    known.on_death(request(), "d1")
    clock.advance(REMEMBER_S - 1)
    with pytest.raises(Quarantined) as caught:
        known.check(request())
    assert caught.value.seconds == 1
    clock.advance(1)
    assert not is_refused(known)


def test_a_death_of_long_ago_does_not_count(known: Quarantine, clock: Timers) -> None:
    known.on_death(request(), "d0")
    clock.advance(REMEMBER_S + 1)
    known.on_death(request(), "d1")
    assert not is_refused(known)


def test_success_clears_a_prompt(known: Quarantine) -> None:
    known.on_death(request(), "d0")
    known.on_success(request())
    known.on_death(request(), "d1")
    assert not is_refused(known)


@pytest.mark.parametrize("are_dead", [True, False], ids=["they said so", "Serve removed them"])
def test_replicas_that_failed_a_prompt_and_soon_end_have_died_of_it(
    known: Quarantine, clock: Timers, are_dead: bool
) -> None:
    node_of: dict[str, str | None] = {"p0": None, "p1": None} if are_dead else {"p0": "node0", "p1": "node1"}
    known.on_failure(request(), "p0")
    clock.advance(TOGETHER_S + 1)
    known.on_failure(request(), "p1")
    known.on_failure(request(start=1), "p1")
    known.on_gone("p2", None)
    clock.advance(GONE_WITHIN_S - TOGETHER_S - 2)
    for _ in range(2):  # Serve removes it after its engine died
        known.on_gone("p0", node_of["p0"])
    assert not is_refused(known)
    known.on_gone("p1", node_of["p1"])
    assert is_refused(known)
    assert not is_refused(known, start=1)


@pytest.mark.parametrize(("other_node", "later_s"), [("node0", 2 * TOGETHER_S), ("node1", TOGETHER_S - 1)])
def test_replicas_of_one_node_or_that_were_lost_at_once_are_one_death(
    known: Quarantine, clock: Timers, other_node: str, later_s: float
) -> None:
    known.on_failure(request(), "d0")
    clock.advance(later_s)
    known.on_failure(request(), "d1")
    known.on_gone("d0", "node0")
    known.on_gone("d1", other_node)
    assert not is_refused(known)
    known.on_death(request(), "d2")
    assert is_refused(known)


def test_a_replica_that_is_gone_much_later_has_not(known: Quarantine, clock: Timers) -> None:
    known.on_failure(request(), "p0")
    known.on_failure(request(), "p1")
    clock.advance(GONE_WITHIN_S + 1)
    known.on_gone("p0", None)
    known.on_gone("p1", None)
    assert not is_refused(known)


def test_quarantined_prompts_are_counted_now_and_so_far(known: Quarantine, clock: Timers) -> None:
    known.on_death(request(start=1), "d0")
    known.on_failure(request(), "p0")
    for replica in ("d0", "d1"):
        known.on_death(request(), replica)
    known.on_gone("p0", None)
    assert (known.num_quarantined, known.num_quarantines) == (1, 1)
    clock.advance(REMEMBER_S + 1)
    assert (known.num_quarantined, known.num_quarantines) == (0, 1)


def test_what_is_remembered_is_bounded(known: Quarantine, clock: Timers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MAX_SUSPECTS", 10)
    for number in range(100):
        known.on_death(request(start=number), "d0")
    assert len(known._suspects) == 10
    clock.advance(REMEMBER_S + 1)
    known.on_death(request(), "d0")
    assert len(known._suspects) == 1
