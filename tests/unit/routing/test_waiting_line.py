"""Requests that wait in the frontend: who is served when, who is refused, and that nobody is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.errors import BatonError, NoReplica, Overloaded
from app.messages import PrefillReport, ReplicaLoad
from app.routing.capacity import MAX_KV_USE
from app.routing.decision import Decision
from app.routing.in_flight import InFlight
from app.routing.router import NO_HINTS
from app.routing.tenant_line import LATE_TURN, NUM_TRIED, PRIOR_S, RATE_WINDOW_S, Ticket
from app.routing.waiting_line import (
    HEARTBEAT_S,
    IN_TIME,
    LATE_FILL,
    LATEST_LOOK_S,
    LONGEST_RETRY_S,
    SOONEST_LOOK_S,
    WaitingLine,
)
from tests.unit.routing.fleet import PACE, REMOTE, Fleet, Timers
from tests.unit.routing.samples import BLOCK_SIZE, request

NUM_TOKENS = 160
NUM_BLOCKS = NUM_TOKENS // BLOCK_SIZE
TTFT_S, MAX_TTFT_S = 1.0, 10.0
ALONE_S = PACE.prompt_s(NUM_TOKENS)


def blocks_for(num_sequences: int) -> int:
    """KV blocks with which a replica has room for so many sequences and not for another one."""
    return int(num_sequences * NUM_BLOCKS / MAX_KV_USE) + 1


class Line:
    """The line before a fleet, whose sequences run until the test ends them."""

    def __init__(
        self,
        num_decode: int = 1,
        room: int = 1,
        *,
        num_prefill: int = 0,
        max_ttft_s: float = MAX_TTFT_S,
        timers: Timers | None = None,
        **options: Any,
    ) -> None:
        """Each replica has room for `room` sequences."""
        self.timers = timers or Timers()
        info = {"pace": PACE, "num_blocks": blocks_for(room)}
        self.fleet = Fleet(
            num_prefill,
            num_decode,
            has_prefill=bool(num_prefill),
            can_prefill_decode=False,
            info=info,
            slo={"ttft_ms": 1e3 * TTFT_S},
            clock=self.timers,
            **options,
        )
        self.line = WaitingLine(self.fleet.router, max_ttft_s, self.timers.later)
        self.served: list[str] = []
        self.decisions: dict[str, Decision] = {}
        self.running: dict[str, InFlight] = {}
        self.failed: dict[str, BatonError] = {}
        self.tickets: dict[str, Ticket] = {}

    def join(self, name: str, *, arrived_at: float | None = None, num_tokens: int = NUM_TOKENS, **fields: Any) -> None:
        def on_turn(decision: Decision, in_flight: InFlight) -> None:
            self.served.append(name)
            self.decisions[name] = decision
            self.running[name] = in_flight

        def on_error(error: BatonError) -> None:
            self.failed[name] = error

        asked = request(num_tokens, 1_000_000 * sum(name.encode()), request_id=name, **fields)
        at = self.timers.now if arrived_at is None else arrived_at
        ticket = self.line.join(asked, NO_HINTS, (), at, on_turn, on_error)
        if ticket is not None:
            self.tickets[name] = ticket

    def end(self, name: str) -> None:
        self.running.pop(name).end()
        self.line.on_news()

    @property
    def counts(self) -> tuple[int, int]:
        return self.line.num_waiting, self.line.queued_tokens


def behind_one(num_waiting: int, **options: Any) -> Line:
    """A line of requests ``0``, ``1``, ... behind a sequence called ``running``."""
    line = Line(**options)
    line.join("running")
    for number in range(num_waiting):
        line.join(str(number))
    assert line.served == ["running"]
    return line


# Whose turn it is


def test_a_request_that_finds_room_is_served_at_once_and_leaves_no_trace() -> None:
    line = Line()
    line.join("a")
    assert line.served == ["a"]
    assert (line.tickets, line.counts, line.line.lacks, line.timers.num_pending) == ({}, (0, 0), "", 0)


def test_a_sequence_counts_as_in_flight_from_its_turn_on() -> None:
    line = behind_one(1)
    state = line.fleet.router.pools["decode"].replicas["d0"]
    assert state.sequences.value == 1
    line.end("running")
    assert state.sequences.value == 0
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0"]
    assert state.sequences.value == 1


def test_who_finds_no_room_waits_for_news_of_it() -> None:
    line = behind_one(1)
    assert (line.counts, line.line.lacks) == ((1, NUM_TOKENS), "decode")
    line.timers.advance(0.5)
    assert line.served == ["running"]
    line.end("running")
    line.timers.advance(0.9 * SOONEST_LOOK_S)
    assert line.served == ["running"]
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0"]
    assert (line.counts, line.line.lacks) == ((0, 0), "")
    assert 0.5 + 0.99 * SOONEST_LOOK_S <= line.decisions["0"].waited_s <= 0.5 + 1.01 * LATEST_LOOK_S
    assert line.decisions["running"].waited_s == 0


def test_the_report_of_a_replica_is_news() -> None:
    line = behind_one(0, num_prefill=1, room=9, **REMOTE)
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("a")
    assert (line.served, line.line.lacks) == (["running"], "prefill")
    line.timers.advance(0.5 * HEARTBEAT_S)
    line.fleet.load("prefill", "p0", 0, 0)
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "a"]


def test_without_news_the_line_is_looked_at_now_and_then() -> None:
    line = behind_one(1)
    line.running.pop("running").end()  # and nobody says so
    line.timers.advance(HEARTBEAT_S + LATEST_LOOK_S)
    assert line.served == ["running", "0"]
    line.timers.advance(10 * HEARTBEAT_S)
    assert line.timers.num_pending == 0  # nothing ticks while nobody waits


def test_a_new_replica_relieves_the_line_at_once() -> None:
    line = behind_one(3)
    line.timers.advance(0.5 * HEARTBEAT_S)
    line.fleet.join("decode", "d1")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0"]
    assert line.decisions["0"].serving.replica == "d1"


def test_all_who_find_room_are_served_by_one_look_in_the_order_of_their_arrival() -> None:
    line = behind_one(5)
    for number in range(1, 4):
        line.fleet.join("decode", f"d{number}")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0", "1", "2"]
    line.end("0")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0", "1", "2", "3"]


def test_nobody_who_comes_later_goes_before_those_who_wait() -> None:
    line = behind_one(1)
    line.running.pop("running").end()
    line.join("late comer")  # who would find room
    assert line.served == ["running"]
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "0"]


def test_who_is_near_the_front_may_take_what_those_before_cannot() -> None:
    line = Line(num_prefill=1, room=9)
    line.fleet.load("prefill", "p0", 9, 100_000)
    for number in range(NUM_TRIED - 1):
        line.join(f"remote {number}", prefill_mode="remote")
    line.join("local", prefill_mode="local")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["local"]
    assert line.line.lacks == "prefill"
    line.fleet.load("prefill", "p0", 0, 0)
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["local", *(f"remote {number}" for number in range(NUM_TRIED - 1))]


def test_what_waits_is_told_to_the_router() -> None:
    policy = {"policy": "thresholds", "max_local_tokens": 0, "max_prefill_queue_tokens": 1000}
    line = Line(num_prefill=1, room=99, placement=policy)
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("waits", prefill_mode="remote", num_tokens=900)
    line.fleet.load("prefill", "p0", 9, 101)
    line.fleet.load("prefill", "p0", 0, 0)
    line.line.leave(line.tickets["waits"])
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("first", prefill_mode="remote", num_tokens=1001)
    line.join("second")  # prefill has more to do than is allowed, with what waits here
    line.fleet.load("prefill", "p0", 0, 0)
    line.timers.advance(LATEST_LOOK_S)
    assert line.decisions["first"].reason == "requested"
    assert line.decisions["second"].reason == "prefill_queue"


# Those who are late


def served_one_by_one(line: Line, last: str, number: int) -> list[str]:
    """End the running sequence `number` times, and return whose turns it was."""
    names = []
    for _ in range(number):
        line.end(last)
        line.timers.advance(LATEST_LOOK_S)
        last = line.served[-1]
        names.append(last)
    return names


def test_who_is_late_lets_those_pass_who_can_be_in_time_but_has_one_turn_in_so_many() -> None:
    line = behind_one(3)
    line.timers.advance(TTFT_S)
    for number in range(3 * LATE_TURN):
        line.join(f"in time {number}")
    names = served_one_by_one(line, "running", 3 * LATE_TURN)
    assert [name for name in names if not name.startswith("in time")] == ["0", "1", "2"]
    for turn in range(3):
        turns = names[turn * LATE_TURN : (turn + 1) * LATE_TURN]
        assert sum(name == str(turn) for name in turns) == 1
    in_time = [name for name in names if name.startswith("in time")]
    assert in_time == [f"in time {number}" for number in range(len(in_time))]


def test_who_is_late_is_served_if_nobody_else_waits() -> None:
    line = behind_one(2)
    line.timers.advance(2 * TTFT_S)
    assert served_one_by_one(line, "running", 2) == ["0", "1"]
    assert line.counts == (0, 0)


def test_whoever_could_not_be_in_time_even_if_served_now_is_late() -> None:
    line = behind_one(1)
    line.timers.advance(TTFT_S - 1.1 * ALONE_S)
    line.join("new")
    line.timers.advance(0.2 * ALONE_S)
    assert served_one_by_one(line, "running", 2) == ["new", "0"]


def test_whoever_finds_room_only_where_it_would_be_late_lets_others_pass_too() -> None:
    line = behind_one(0, num_prefill=1, room=99, **REMOTE)
    line.fleet.load("prefill", "p0", 9, 1_000_000)
    num_tokens = int(0.9 * TTFT_S / PACE.prefill_s_per_token)
    line.join("long", num_tokens=num_tokens)
    line.join("short")
    queue_s = 0.2 * TTFT_S  # with it, only the short one can be in time
    line.fleet.load("prefill", "p0", 1, int(queue_s / PACE.prefill_s_per_token))
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["running", "short", "long"]


def test_what_waits_is_told_while_somebody_waits_and_once_nobody_does() -> None:
    line, told = behind_one(1), list[int]()
    line.line.on_backlog = lambda: told.append(line.line.num_waiting)
    line.timers.advance(2.5 * HEARTBEAT_S)
    assert told == [1, 1]
    line.end("running")
    line.timers.advance(10 * HEARTBEAT_S)
    assert told == [1, 1, 0]


# Refusals


def test_who_would_wait_longer_than_allowed_is_refused_and_told_when_to_come_again() -> None:
    line = behind_one(0, max_ttft_s=0.2)
    number = 0
    while (excess_s := line.line.predicted_wait_s() + ALONE_S - 0.2) <= 0:
        line.join(str(number := number + 1))
    before = line.counts
    assert before[0] > 1
    with pytest.raises(Overloaded) as refused:
        line.join("refused")
    assert refused.value.retry_after_s == pytest.approx(excess_s)
    with pytest.raises(Overloaded) as refused:
        line.join("refused", arrived_at=line.timers.now - 0.1)
    assert refused.value.retry_after_s == pytest.approx(excess_s + 0.1)
    with pytest.raises(Overloaded) as refused:
        line.join("refused", arrived_at=line.timers.now - 1e6)
    assert refused.value.retry_after_s == LONGEST_RETRY_S
    assert line.counts == before
    assert "refused" not in line.served


def test_who_is_refused_at_once_leaves_no_trace_of_what_was_lacking() -> None:
    line = behind_one(0, max_ttft_s=ALONE_S / 2)
    with pytest.raises(Overloaded):
        line.join("refused")
    assert (line.counts, line.line.lacks, line.timers.num_pending) == ((0, 0), "", 0)


def test_who_becomes_late_is_refused_if_that_will_be_too_late_altogether() -> None:
    line = behind_one(60, max_ttft_s=1.05 * TTFT_S + 60 * ALONE_S)
    line.timers.advance(TTFT_S + HEARTBEAT_S + LATEST_LOOK_S)
    assert "0" in line.failed
    assert line.line.num_waiting == 60 - len(line.failed)
    assert all(isinstance(error, Overloaded) for error in line.failed.values())


def test_who_is_late_is_refused_as_soon_as_even_its_turn_would_be_too_late() -> None:
    line = behind_one(1)
    line.timers.advance(MAX_TTFT_S - 2 * ALONE_S)
    assert line.counts == (1, NUM_TOKENS)
    line.timers.advance(2 * ALONE_S + HEARTBEAT_S)
    assert line.counts == (0, 0)
    assert isinstance(line.failed["0"], Overloaded)


def learnt_that_late_ones_are_passed(max_ttft_s: float) -> Line:
    """Some are late, while others in time have had most turns; ten of these wait too."""
    line = behind_one(LATE_TURN, max_ttft_s=max_ttft_s)
    line.timers.advance(TTFT_S)
    for number in range(6 * (LATE_TURN - 1) + 10):
        line.join(f"in time {number}")
    served = served_one_by_one(line, "running", 6 * LATE_TURN)
    assert sum(name.startswith("in time") for name in served) == 6 * (LATE_TURN - 1)
    return line


def test_where_late_ones_are_passed_who_would_be_late_waits_among_them_or_is_refused_at_once() -> None:
    line = learnt_that_late_ones_are_passed(max_ttft_s=20.0)
    number, per_s = 0, line.line.predicted_wait_s() / line.counts[0]

    def wait_s() -> float:
        """Of one that joins: two late ones are not before it."""
        return (line.counts[0] - 2) * per_s

    while wait_s() + ALONE_S <= IN_TIME * IN_TIME * TTFT_S:
        line.join(f"new {number}")
        number += 1
    assert number > 1
    assert not any(line.tickets[f"new {each}"].is_late for each in range(number))
    flow = line.line.orders[2].flow("")
    while flow.late_s * per_s / ALONE_S / flow.late_share + ALONE_S <= LATE_FILL * 20.0:
        line.join(f"late {number}")
        assert line.tickets[f"late {number}"].is_late
        number += 1
    before = line.counts
    with pytest.raises(Overloaded) as refused:
        line.join("refused")
    assert 0 < refused.value.retry_after_s <= per_s
    assert line.counts == before


def test_a_sequence_that_lost_its_replica_is_not_refused_for_being_late() -> None:
    line = Line(max_ttft_s=1e3)
    line.join("running")

    def join_again(name: str) -> None:
        failed = line.failed.__setitem__
        asked = request(NUM_TOKENS, 1_000_000 * sum(name.encode()), request_id=name)

        def on_turn(decision: Decision, in_flight: InFlight) -> None:
            line.served.append(name)
            line.running[name] = in_flight

        line.line.join(
            asked, NO_HINTS, (), line.timers.now, on_turn, lambda error: failed(name, error), was_served=True
        )

    for number in range(LATE_TURN):
        join_again(str(number))
    line.timers.advance(TTFT_S)
    for number in range(6 * (LATE_TURN - 1) + 10):
        join_again(f"in time {number}")
    served_one_by_one(line, "running", 6 * LATE_TURN)
    assert line.line.orders[0].flow("").passes_late
    for number in range(200):
        join_again(f"new {number}")
    assert line.failed == {}


def test_where_late_ones_have_most_turns_nobody_is_refused_for_being_late() -> None:
    line = behind_one(4 * LATE_TURN, max_ttft_s=1e3)
    line.timers.advance(2 * TTFT_S)
    served_one_by_one(line, "running", 3 * LATE_TURN)
    for number in range(1000):
        line.join(f"new {number}")
    assert line.line.predicted_wait_s() > 2 * TTFT_S
    assert line.failed == {}


def test_once_none_of_it_waits_it_is_forgotten_that_late_ones_were_passed() -> None:
    line = learnt_that_late_ones_are_passed(max_ttft_s=1e3)
    served_one_by_one(line, line.served[-1], line.counts[0] - 1)
    assert line.line.orders[2].flow("").passes_late
    served_one_by_one(line, line.served[-1], 1)
    assert line.counts == (0, 0)
    assert not line.line.orders[2].flow("").passes_late
    line.join("running again")
    for number in range(1000):
        line.join(f"new {number}")
    assert line.line.predicted_wait_s() > TTFT_S


def test_at_first_the_line_is_taken_to_be_as_quick_as_its_replicas_are() -> None:
    for num_replicas in (1, 3):
        line = Line(num_decode=num_replicas)
        for number in range(num_replicas + 6):
            line.join(str(number))
        assert line.line.num_waiting == 6
        assert line.line.predicted_wait_s() == pytest.approx(6 * ALONE_S / num_replicas)


def test_the_wait_is_predicted_by_how_quickly_others_had_their_turns() -> None:
    line = behind_one(200, max_ttft_s=1e6)
    seconds, last = 0.2, "running"
    for _ in range(100):
        line.timers.advance(seconds - LATEST_LOOK_S)
        (last,) = served_one_by_one(line, last, 1)
    speed = (RATE_WINDOW_S * ALONE_S / seconds + PRIOR_S) / (RATE_WINDOW_S + PRIOR_S)
    assert line.line.predicted_wait_s() == pytest.approx(100 * ALONE_S / speed, rel=0.1)


def test_time_in_which_nobody_waits_does_not_count_as_slowness() -> None:
    line = behind_one(1)
    served_one_by_one(line, "running", 1)
    line.timers.advance(1000.0)
    line.join("next")
    line.timers.advance(LATEST_LOOK_S)
    assert line.line.predicted_wait_s() == pytest.approx(ALONE_S, rel=0.1)


# Leaving and failing


def test_who_leaves_gets_no_turn_and_lets_the_next_one_have_it() -> None:
    line = behind_one(3)
    for name in ("0", "1"):
        line.line.leave(line.tickets[name])
        line.line.leave(line.tickets[name])
    assert line.counts == (1, NUM_TOKENS)
    assert served_one_by_one(line, "running", 1) == ["2"]
    assert (line.counts, line.line.lacks) == ((0, 0), "")


def test_who_leaves_late_gets_no_turn_either() -> None:
    line = behind_one(2)
    line.timers.advance(2 * TTFT_S)
    line.line.leave(line.tickets["0"])
    assert served_one_by_one(line, "running", 1) == ["1"]


def test_leaving_after_ones_turn_changes_nothing() -> None:
    line = behind_one(2)
    served_one_by_one(line, "running", 1)
    line.line.leave(line.tickets["0"])
    assert line.counts == (1, NUM_TOKENS)


def test_an_error_while_waiting_is_told_and_the_line_goes_on() -> None:
    line = behind_one(1)
    line.fleet.router.pools["decode"].leave("d0")
    line.timers.advance(HEARTBEAT_S + LATEST_LOOK_S)
    assert isinstance(line.failed["0"], NoReplica)
    assert line.counts == (0, 0)
    line.fleet.join("decode", "d1")
    line.join("next")
    assert line.served == ["running", "next"]


def test_an_error_at_once_is_raised_and_nobody_waits() -> None:
    line = Line(num_decode=0)
    with pytest.raises(NoReplica):
        line.join("a")
    assert (line.counts, line.failed) == ((0, 0), {})


# Several frontends


@pytest.mark.parametrize("num_lines", [1, 4])
def test_lines_over_the_same_reports_keep_the_bound_that_one_keeps(num_lines: int) -> None:
    timers, num_replicas, room, num_requests = Timers(), 2, 5, 40
    lines = [Line(num_replicas, room, timers=timers) for _ in range(num_lines)]
    most: Counter[str] = Counter()

    def on_each_replica() -> Counter[str]:
        return Counter(running.serving.replica for line in lines for running in line.running.values())

    def report() -> None:
        """Every replica tells all frontends what it has, as soon as it has it."""
        found = on_each_replica()
        for line in lines:
            for replica in ("d0", "d1"):
                line.fleet.load("decode", replica, found[replica], 0, found[replica] * NUM_BLOCKS)
                most[replica] = max(most[replica], found[replica])

    for number in range(num_requests):
        lines[number % num_lines].join(str(number))
        report()
    assert sum(line.line.num_waiting for line in lines) == num_requests - num_replicas * room
    while any(line.running for line in lines):
        line = next(each for each in lines if each.running)
        line.end(next(iter(line.running)))
        report()
        for _ in range(num_lines):
            timers.advance(LATEST_LOOK_S / num_lines)
            report()
    assert sorted(name for line in lines for name in line.served) == sorted(map(str, range(num_requests)))
    assert max(most.values()) <= room + num_lines - 1
    if num_lines == 1:
        assert set(most.values()) == {room}


# Whatever happens


class AnyLine(RuleBasedStateMachine):
    """Requests come, leave and end, replicas come, tell and go, and time passes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Line(2, room=2, num_prefill=1, max_ttft_s=5.0)
        self.line.fleet.router.can_prefill_decode = True
        self.joined: list[str] = []
        self.left: set[str] = set()
        self.refused: set[str] = set()

    def _waiting(self) -> list[str]:
        done = self.left | self.refused | set(self.line.served) | self.line.failed.keys()
        return [name for name in self.joined if name not in done]

    @rule(
        num_tokens=st.sampled_from([16, NUM_TOKENS, 5000]),
        prefill_mode=st.sampled_from(["auto", "auto", "remote", "local"]),
        waited_s=st.sampled_from([0.0, 0.0, 0.9, 3.0, 10.0]),
    )
    def join(self, num_tokens: int, prefill_mode: str, waited_s: float) -> None:
        name = str(len(self.joined))
        self.joined.append(name)
        at = self.line.timers.now - waited_s
        try:
            self.line.join(name, arrived_at=at, num_tokens=num_tokens, prefill_mode=prefill_mode)
        except (Overloaded, NoReplica):
            self.refused.add(name)

    @precondition(lambda self: self.line.tickets)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.line.tickets)))
        is_waiting = name in self._waiting()
        self.line.line.leave(self.line.tickets[name])
        if is_waiting:
            self.left.add(name)

    @precondition(lambda self: self.line.running)
    @rule(data=st.data(), took_s=st.floats(1e-3, 10.0))
    def first_token(self, data: st.DataObject, took_s: float) -> None:
        name = data.draw(st.sampled_from(sorted(self.line.running)))
        kind = self.line.decisions[name].kind
        self.line.running[name].first_token(PrefillReport(kind, "", None, "d", 0, None, "", took_s / 2), took_s)

    @precondition(lambda self: self.line.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.line.end(data.draw(st.sampled_from(sorted(self.line.running))))

    @rule(seconds=st.sampled_from([LATEST_LOOK_S / 2, LATEST_LOOK_S, HEARTBEAT_S, 0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.line.timers.advance(seconds)

    @rule(
        role=st.sampled_from(["prefill", "decode"]),
        number=st.integers(0, 3),
        sequences=st.integers(0, 4),
        queued_tokens=st.sampled_from([0, 0, 1000, 100_000]),
        share=st.floats(0, 1),
    )
    def report(self, role: Any, number: int, sequences: int, queued_tokens: int, share: float) -> None:
        pool = self.line.fleet.router.pools[role]
        load = ReplicaLoad(sequences, queued_tokens, sequences * NUM_BLOCKS, sequences, prefill_share=share)
        pool.on_load(f"{role[0]}{number}", load)

    @rule(role=st.sampled_from(["prefill", "decode"]), number=st.integers(0, 3), stays=st.booleans())
    def come_or_go(self, role: Any, number: int, stays: bool) -> None:
        replica = f"{role[0]}{number}"
        if stays:
            self.line.fleet.join(role, replica)
        else:
            self.line.fleet.router.pools[role].leave(replica)

    @invariant()
    def nobody_is_served_twice_or_after_another_end(self) -> None:
        ends = [*self.line.served, *self.line.failed, *self.left, *self.refused]
        assert len(ends) == len(set(ends))

    @invariant()
    def those_who_wait_are_counted(self) -> None:
        waiting = [self.line.tickets[name] for name in self._waiting()]
        assert self.line.counts == (len(waiting), sum(ticket.num_tokens for ticket in waiting))
        assert self.line.line.predicted_wait_s() >= 0
        if not waiting:
            assert self.line.line.lacks == ""

    def teardown(self) -> None:
        """Once all replicas are free, everyone who still waits is served, or refused for having waited too long."""
        for name in list(self.line.running):
            self.line.end(name)
        for role in ("prefill", "decode"):
            self.line.fleet.join(role, f"{role[0]}0")
        for _ in range(2 * len(self.joined) + 2):
            self.line.timers.advance(LATEST_LOOK_S)
            for name in list(self.line.running):
                self.line.end(name)
        assert self._waiting() == []
        assert self.line.counts == (0, 0)
        self.nobody_is_served_twice_or_after_another_end()
        self.line.timers.advance(2 * HEARTBEAT_S)
        assert self.line.timers.num_pending == 0
        states = [state for pool in self.line.fleet.router.pools.values() for state in pool.replicas.values()]
        gauges = [gauge for s in states for gauge in (s.sequences, s.queued_tokens, s.used_blocks, s.decoding)]
        assert {gauge.own for gauge in gauges} == {0}


AnyLine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestAnyLine: Callable[[], Any] = AnyLine.TestCase
