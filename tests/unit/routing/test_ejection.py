"""What failures say of replicas and pairs: the sound ones stay, the bad ones go, and come back once they are sound."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.routing import ejection
from app.routing.ejection import FIRST_EJECTION_S, LONGEST_EJECTION_S, REMEMBER_S, STRONG, WEAK, Ejections
from tests.unit.routing.fleet import PACE, Fleet, Timers
from tests.unit.routing.samples import request

BAD_S = 60.0
"""How long a replica is bad."""
PREFILL, DECODE = ("p0", "p1", "p2"), ("d0", "d1", "d2")


@pytest.fixture
def clock() -> Timers:
    return Timers()


@pytest.fixture
def known(clock: Timers) -> Ejections:
    known = Ejections(clock)
    for replica in PREFILL:
        known.joined(replica, "prefill")
    for replica in DECODE:
        known.joined(replica, "decode")
    return known


def ejected(known: Ejections) -> list[str]:
    return [replica for replica in (*PREFILL, *DECODE) if known.is_ejected(replica)]


def fail(known: Ejections, clock: Timers, *pairs: tuple[str, str]) -> None:
    for prefill, decode in pairs:
        known.pair_failed(prefill, decode, STRONG, clock())
        clock.advance(0.1)


# Blame


def test_a_single_pair_that_fails_is_left_out_and_neither_of_its_ends(known: Ejections, clock: Timers) -> None:
    fail(known, clock, ("p0", "d0"))
    assert known.is_pair_ejected("p0", "d0")
    assert not known.is_pair_ejected("p0", "d1")
    assert ejected(known) == []


@pytest.mark.parametrize(
    ("pairs", "blamed"),
    [([("p0", "d0"), ("p1", "d0")], "d0"), ([("p0", "d0"), ("p0", "d1")], "p0")],
    ids=["decode", "prefill"],
)
def test_the_end_that_failing_pairs_have_in_common_is_to_blame(
    known: Ejections, clock: Timers, pairs: list[tuple[str, str]], blamed: str
) -> None:
    fail(known, clock, *pairs)
    assert ejected(known) == [blamed]


def test_a_transfer_that_works_in_between_acquits_both_ends(known: Ejections, clock: Timers) -> None:
    fail(known, clock, ("p0", "d0"))
    known.pair_succeeded("p2", "d0", clock())
    fail(known, clock, ("p1", "d0"))
    assert ejected(known) == []


def test_that_a_replica_computes_does_not_show_that_it_gets_kv(known: Ejections, clock: Timers) -> None:
    fail(known, clock, ("p0", "d0"))
    known.succeeded("d0", clock())
    fail(known, clock, ("p1", "d0"))
    assert ejected(known) == ["d0"]


def test_a_failure_with_a_replica_that_is_known_to_be_bad_speaks_against_nobody_else(
    known: Ejections, clock: Timers
) -> None:
    fail(known, clock, ("p0", "d0"), ("p1", "d0"))
    assert ejected(known) == ["d0"]
    fail(known, clock, ("p2", "d0"), ("p0", "d1"), ("p1", "d2"), ("p2", "d1"))
    assert "p0" not in ejected(known)
    assert "p2" not in ejected(known)


def test_failures_of_long_ago_do_not_count(known: Ejections, clock: Timers) -> None:
    fail(known, clock, ("p0", "d0"))
    clock.advance(REMEMBER_S + 1)
    fail(known, clock, ("p1", "d0"))
    assert ejected(known) == []


# Evidence, back-off and probes


def test_weak_evidence_needs_three_failures_without_a_success(known: Ejections, clock: Timers) -> None:
    for _ in range(10):
        known.failed("d0", WEAK, clock())
        known.failed("d0", WEAK, clock())
        known.succeeded("d0", clock())
    assert ejected(known) == []
    for _ in range(3):
        known.failed("d0", WEAK, clock())
    assert ejected(known) == ["d0"]


def ejection_s(known: Ejections, clock: Timers, step_s: float = 0.5) -> float:
    """How long d0 stays ejected from now on."""
    begin = clock()
    while known.is_ejected("d0"):
        clock.advance(step_s)
    return clock() - begin


def test_each_ejection_takes_twice_as_long_as_the_one_before_up_to_a_limit(known: Ejections, clock: Timers) -> None:
    took = []
    for _ in range(6):
        known.failed("d0", STRONG, clock())
        took.append(ejection_s(known, clock))
    assert took == [5, 10, 20, 40, 60, 60]


def test_who_was_restored_only_to_fail_again_is_out_for_longer_and_who_behaved_is_not(
    known: Ejections, clock: Timers
) -> None:
    for good_s, expected_s in ((1.0, 2 * FIRST_EJECTION_S), (LONGEST_EJECTION_S + 1, FIRST_EJECTION_S)):
        known.failed("d0", STRONG, clock())
        ejection_s(known, clock)
        known.succeeded("d0", clock())
        clock.advance(good_s)
        known.failed("d0", STRONG, clock())
        assert ejection_s(known, clock) == expected_s
        known.succeeded("d0", clock())
        clock.advance(LONGEST_EJECTION_S + 1)


def test_what_fails_at_once_is_one_failure(known: Ejections, clock: Timers) -> None:
    began_at = clock()
    clock.advance(1)
    for _ in range(50):
        known.failed("d0", STRONG, began_at)
    assert ejection_s(known, clock) == FIRST_EJECTION_S
    known.failed("d0", STRONG, began_at)  # one that took longer to fail, half-open as the replica is now
    assert ejected(known) == []


def test_an_attempt_from_before_the_ejection_does_not_restore(known: Ejections, clock: Timers) -> None:
    began_at = clock()
    clock.advance(1)
    known.failed("d0", STRONG, clock())
    known.succeeded("d0", began_at)
    assert ejected(known) == ["d0"]
    known.succeeded("d0", clock())
    assert ejected(known) == []


def test_a_probe_that_fails_ejects_and_one_that_is_cancelled_leaves_the_turn_to_the_next(
    known: Ejections, clock: Timers
) -> None:
    known.failed("d0", STRONG, clock())
    clock.advance(FIRST_EJECTION_S)
    with known.trying(None, "d0"):
        assert ejected(known) == ["d0"]
        with known.trying(None, "d0"):
            pass
        assert ejected(known) == ["d0"]  # the other one, which came for want of a choice, did not end the probe
    assert ejected(known) == []
    with known.trying(None, "d0"):
        known.failed("d0", STRONG, clock())
    assert ejected(known) == ["d0"]


def test_what_is_remembered_is_bounded(known: Ejections, clock: Timers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ejection, "MAX_REMEMBERED", 10)
    for number in range(100):
        known.joined(f"p{number}", "prefill")
        known.pair_failed(f"p{number}", f"d{number}", STRONG, clock())
        known.failed(f"p{number}", STRONG, clock())
    assert len(known._pairs._circuits) == len(known._replicas._circuits) == len(known._failed_with) == 10


def test_replicas_that_have_left_are_forgotten_the_first_one_first(
    known: Ejections, clock: Timers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ejection, "MAX_REMEMBERED", 2)
    for replica in ("d0", "d1", "d2", "p0"):
        known.left(replica)
        known.failed(replica, STRONG, clock())  # as it was lost
        if replica == "d1":
            known.joined("d0", "decode")  # it could not be reached for a moment
    assert known._roles.keys() == {"d0", "p1", "p2", "d2", "p0"}
    assert [each["replica"] for each in known.describe()] == ["d2", "p0"]
    known.failed("d1", STRONG, clock())
    assert not known.is_ejected("d1")


def test_what_is_left_out_and_for_how_long_is_told(known: Ejections, clock: Timers) -> None:
    known.failed("d1", STRONG, clock())
    clock.advance(1)
    fail(known, clock, ("p0", "d0"))
    assert known.describe() == [
        {"replica": "d1", "role": "decode", "left_out_s": FIRST_EJECTION_S - 1.1},
        {"prefill": "p0", "decode": "d0", "left_out_s": FIRST_EJECTION_S - 0.1},
    ]
    clock.advance(LONGEST_EJECTION_S)
    assert [each["left_out_s"] for each in known.describe()] == [0, 0]
    known.pair_succeeded("p0", "d0", clock())
    known.succeeded("d1", clock())
    assert known.describe() == []
    assert known.counts == {"decode": 1, "pair": 1}


# Histories


class History:
    """Requests that come to a router of three prefill and three decode replicas, one of which is bad for a while."""

    def __init__(self, bad: str, *, dies: bool, lasts_s: float) -> None:
        """Of a bad replica no KV comes, or none gets there; if it `dies`, it is known that the failure is its own."""
        self.fleet = Fleet(3, 3, can_decode_prefill=False)
        self.known, self.clock = self.fleet.router.ejections, self.fleet.clock
        self.bad, self.dies, self.lasts_s = bad, dies, lasts_s
        self.is_bad = False
        self.num_sent = self.num_failed = self.num_used = 0
        self.fleet.cache("prefill" if bad in PREFILL else "decode", bad, 160)  # so that it is wanted

    def send(self) -> None:
        """Send a request, whose outcome comes later."""
        decision = self.fleet.decide()
        assert decision.prefill is not None
        ends = decision.prefill.replica, decision.serving.replica
        in_flight = self.fleet.router.begin(request(), decision)
        self.num_sent += 1
        self.num_used += self.bad in ends
        fails = self.is_bad and self.bad in ends

        def end() -> None:
            if not fails:
                self.known.pair_succeeded(*ends, in_flight.began_at)
            elif self.dies:
                self.known.failed(self.bad, STRONG, in_flight.began_at)
            else:
                self.known.pair_failed(*ends, STRONG, in_flight.began_at)
            self.num_failed += fails
            in_flight.end()
            assert set(ejected(self.known)) <= {self.bad}

        self.clock.later(self.lasts_s, end)


@settings(max_examples=300)
@example(bad="p0", dies=False, lasts_s=2.0, num_before=0, gaps=[5.0, 1.0, 0.5, 0.25])
@given(
    st.sampled_from([*PREFILL, *DECODE]),
    st.booleans(),
    st.floats(0.001, 3.0),
    st.integers(0, 20),
    st.lists(st.floats(0.2, 5.0), min_size=1, max_size=20),
)
def test_from_any_history_only_the_bad_replica_is_ejected_and_it_comes_back(
    bad: str, dies: bool, lasts_s: float, num_before: int, gaps: list[float]
) -> None:
    history = History(bad, dies=dies, lasts_s=lasts_s)
    clock = history.clock
    for _ in range(num_before):
        history.send()
        clock.advance(gaps[0])
    clock.advance(lasts_s)  # what was sent to a good replica has ended
    history.is_bad = True
    began_at, second_at, num_unknown = clock(), math.inf, 0
    for gap in cycle(gaps):
        if clock() >= began_at + lasts_s:  # one pair is known to fail; the next one fails from here on
            second_at = min(second_at, clock())
        history.send()
        num_unknown += clock() <= second_at + lasts_s
        clock.advance(gap)
        if clock() > began_at + BAD_S:
            break
    # Until two pairs were known to fail, any number failed; from then on probes do, and those fail one by one.
    num_probes = sum(1 for at in (5, 15, 35, 75) if at <= clock() - began_at)
    assert history.num_failed <= num_unknown + 3 + num_probes
    history.is_bad = False
    clock.advance(lasts_s + LONGEST_EJECTION_S)
    history.send()
    clock.advance(lasts_s)
    before = history.num_used
    for _ in range(5):  # at the same time: the replica is restored, and each of its pairs is at least tried
        history.send()
    assert history.num_used >= before + 3


def test_a_pool_whose_replicas_all_fail_is_used_nevertheless() -> None:
    fleet = Fleet(2, 2, can_decode_prefill=False)
    for replica in ("p0", "p1", "d0", "d1"):
        fleet.router.ejections.failed(replica, STRONG, fleet.clock())
    decision: Any = fleet.decide()
    assert decision.serving.replica in ("d0", "d1")


@pytest.mark.parametrize("what", ["replica", "pair"])
@pytest.mark.parametrize("placement", ["remote", "predicted"])
def test_decode_prefills_itself_while_all_that_prefill_has_is_ejected(what: str, placement: str) -> None:
    fleet = Fleet(1, 1, placement={"policy": placement}, info={"pace": PACE})
    fleet.load("decode", "d0", 1, 8000, 0)  # so that remotely would be quicker
    ejections = fleet.router.ejections
    if what == "replica":
        ejections.failed("p0", STRONG, fleet.clock())
    else:
        ejections.pair_failed("p0", "d0", STRONG, fleet.clock())
    decision: Any = fleet.decide(8000)
    assert (decision.kind, decision.reason) == ("local", "no_prefill_replica")
    fleet.clock.advance(FIRST_EJECTION_S)
    assert fleet.decide(8000).kind == "remote"
