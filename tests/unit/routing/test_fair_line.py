"""Classes and tenants in the waiting line: who goes first, who is refused, and that a flood harms only its tenant."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from statistics import quantiles
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from app.errors import NoReplica, Overloaded
from app.messages import ReplicaLoad
from app.routing.decision import SERVICE_CLASSES, RoutingHints
from app.routing.tenant_line import LATE_TURN
from app.routing.waiting_line import HEARTBEAT_S, LATEST_LOOK_S, LEVELS_OF_CLASS
from tests.unit.routing.fleet import REMOTE
from tests.unit.routing.samples import request
from tests.unit.routing.test_waiting_line import ALONE_S, NUM_TOKENS, TTFT_S, AnyLine, Line, served_one_by_one

CLASSES, TENANTS = st.sampled_from(SERVICE_CLASSES), st.sampled_from(["", "a", "b"])


class FairLine(Line):
    """A line of requests of several tenants and classes."""

    def join(
        self,
        name: str,
        *,
        arrived_at: float | None = None,
        num_tokens: int = NUM_TOKENS,
        was_served: bool = False,
        was_preempted: bool = False,
        hints: dict[str, Any] | None = None,
        lost: Collection[str] = (),
        **fields: Any,
    ) -> None:
        def on_turn(decision: Any, in_flight: Any) -> None:
            self.served.append(name)
            self.decisions[name], self.running[name] = decision, in_flight

        def on_error(error: Any) -> None:
            self.failed[name] = error

        asked = request(num_tokens, 1_000_000 * sum(name.encode()), request_id=name, **fields)
        at = self.timers.now if arrived_at is None else arrived_at
        again = {"was_served": was_served, "was_preempted": was_preempted}
        ticket = self.line.join(asked, RoutingHints(**(hints or {})), lost, at, on_turn, on_error, **again)
        if ticket is not None:
            self.tickets[name] = ticket

    def of(self, service_class: str, *names: str) -> None:
        for name in names:
            self.join(name, hints={"service_class": service_class})

    def by(self, tenant: str, *names: str, weight: float = 1.0, **options: Any) -> None:
        for name in names:
            self.join(name, hints={"tenant": tenant, "weight": weight}, **options)


def full(**options: Any) -> FairLine:
    """A line before one replica, which serves a sequence called ``running``."""
    line = FairLine(**options)
    line.join("running")
    return line


def names(prefix: str, number: int) -> list[str]:
    return [f"{prefix}{index}" for index in range(number)]


# Classes


@given(st.lists(st.tuples(CLASSES, TENANTS), max_size=10))
@settings(deadline=None, max_examples=50)
def test_a_higher_class_is_served_before_a_lower_one(joined: list[tuple[str, str]]) -> None:
    line = full()
    for index, (service_class, tenant) in enumerate(joined):
        line.join(str(index), hints={"service_class": service_class, "tenant": tenant})
    served = [joined[int(name)][0] for name in served_one_by_one(line, "running", len(joined))]
    assert served == sorted(served, key=SERVICE_CLASSES.index)


@given(st.lists(st.tuples(CLASSES, TENANTS, st.booleans()), max_size=10), st.sets(st.integers(0, 9)), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_whoever_there_is_room_for_is_served(joined: list[tuple[str, str, bool]], left: set[int], room: int) -> None:
    line = full()
    for index, (service_class, tenant, was_served) in enumerate(joined):
        line.join(str(index), hints={"service_class": service_class, "tenant": tenant}, was_served=was_served)
    waiting = {str(index) for index in range(len(joined)) if index not in left}
    for index in left & set(range(len(joined))):
        line.line.leave(line.tickets[str(index)])
    for number in range(1, room + 1):
        line.fleet.join("decode", f"d{number}")
    line.timers.advance(LATEST_LOOK_S)
    assert len(line.served) == 1 + min(room, len(waiting))
    assert line.line.num_waiting == max(0, len(waiting) - room)
    assert set(line.served) <= waiting | {"running"}


def test_one_of_a_higher_class_that_finds_room_does_not_wait_behind_lower_ones() -> None:
    line = full()
    line.of("default", "waits")
    line.running.pop("running").end()  # and the line has not noticed yet
    line.of("flex", "flex")
    line.of("default", "default")
    assert line.served == ["running"]
    line.of("priority", "priority")
    assert line.served == ["running", "priority"]
    assert served_one_by_one(line, "priority", 3) == ["waits", "default", "flex"]


def test_flex_does_not_even_take_what_those_before_it_cannot() -> None:
    line = FairLine(num_prefill=1, room=9)
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("remote", prefill_mode="remote")
    line.join("flex", prefill_mode="local", hints={"service_class": "flex"})
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == []
    line.line.leave(line.tickets["remote"])
    line.timers.advance(HEARTBEAT_S + LATEST_LOOK_S)
    assert line.served == ["flex"]


def test_who_was_served_before_goes_before_all_others_but_does_not_hold_them_up() -> None:
    line = full()
    line.of("priority", "first")
    line.join("again 1", was_served=True, hints={"tenant": "z", "service_class": "flex"})
    line.join("again 2", was_served=True, hints={"tenant": "a"})
    assert served_one_by_one(line, "running", 3) == ["again 1", "again 2", "first"]
    line = FairLine(num_prefill=1, room=9)
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("again", was_served=True, prefill_mode="remote")
    line.join("local", prefill_mode="local")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["local"]


# Tenants


def test_tenants_have_turns_by_their_weights() -> None:
    line = full()
    line.by("a", *names("a", 9))
    line.by("b", *names("b", 6), weight=2.0)
    served = served_one_by_one(line, "running", 9)
    assert Counter(name[0] for name in served) == {"a": 3, "b": 6}
    assert [name for name in served if name[0] == "b"] == names("b", 6)


def test_only_prompt_tokens_that_must_be_computed_and_the_expected_output_count() -> None:
    line = full()
    replica = line.fleet.router.pools["decode"].replicas["d0"]
    replica.report(ReplicaLoad(1, used_blocks=replica.used_blocks.value, output_tokens=200))
    line.fleet.cache("decode", "d0", NUM_TOKENS, 1_000_000 * sum(b"cached"))
    line.by("a", "cached")
    line.by("b", "short", sampling={"max_tokens": 50})
    line.by("c", "open", sampling={"max_tokens": None})
    line.by("d", "long", sampling={"max_tokens": 1000})
    served_one_by_one(line, "running", 4)
    cached = NUM_TOKENS - 16  # the last block is computed, as its last token must be
    costs = {"cached": NUM_TOKENS - cached + 200, "short": NUM_TOKENS + 50, "open": NUM_TOKENS + 200}
    costs["long"] = costs["open"]
    assert {name: line.tickets[name].flow.starts_at for name in costs} == costs


def test_those_of_one_tenant_who_cannot_be_served_do_not_hold_up_another() -> None:
    line = FairLine(num_prefill=1, room=9)
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.by("a", *names("a", 5), prefill_mode="remote")
    line.by("b", "b", prefill_mode="local")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["b"]


def test_who_is_not_in_front_is_refused_in_time_too() -> None:
    line = full(max_ttft_s=3.0)
    line.of("flex", "flex")
    line.by("a", *names("a", 2))
    line.timers.advance(2.5)
    line.of("priority", "priority")
    line.timers.advance(0.5 + 2 * HEARTBEAT_S + LATEST_LOOK_S)  # a look may come a little before it is time for a sweep
    assert line.failed.keys() == {"a0", "a1", "flex"}
    assert line.counts == (1, NUM_TOKENS)


class Reference:
    """The order of one tenant and class, as simple as possible: by arrival, and one in LATE_TURN turns for the late."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[str, float]] = deque()
        self.num_turns = 0

    def turn(self, now: float) -> str:
        late = [one for one in self.waiting if now - one[1] + ALONE_S > 0.9 * TTFT_S]
        in_time = [one for one in self.waiting if one not in late]
        is_late_turn = self.num_turns % LATE_TURN == LATE_TURN - 1
        one = late[0] if late and (is_late_turn or not in_time) else in_time[0]
        self.waiting.remove(one)
        self.num_turns += 1
        return one[0]


@given(st.lists(st.sampled_from(["join", "join", "end", "end", "leave", "wait"]), max_size=60), TENANTS, CLASSES)
@settings(deadline=None, max_examples=60)
def test_one_tenant_and_class_has_the_order_of_before(steps: list[str], tenant: str, service_class: str) -> None:
    line, reference, last = full(), Reference(), "running"
    for index, step in enumerate(steps):
        if step == "join":
            line.join(str(index), hints={"tenant": tenant, "service_class": service_class})
            reference.waiting.append((str(index), line.timers.now))
        elif step == "end" and reference.waiting:
            (served,) = served_one_by_one(line, last, 1)
            # The look is within this time; what becomes late meanwhile would be undecided, but times are multiples.
            assert served == reference.turn(line.timers.now)
            last = served
        elif step == "leave" and reference.waiting:
            name, _ = reference.waiting.pop()
            line.line.leave(line.tickets[name])
        elif step == "wait":
            line.timers.advance(0.31)
        assert line.line.num_waiting == len(reference.waiting)


# Refusals


def filled(hints: dict[str, Any], max_ttft_s: float = 0.2) -> tuple[FairLine, int]:
    """A line in which as many wait as can make their time, and their number."""
    line = full(max_ttft_s=max_ttft_s)
    number = 0
    while line.line.predicted_wait_s() + ALONE_S <= max_ttft_s:
        line.join(str(number), hints=hints)
        number += 1
    with pytest.raises(Overloaded):
        line.join("refused", hints=hints)
    return line, number


@pytest.mark.parametrize(("waiting", "new"), [("flex", "default"), ("flex", "priority"), ("default", "priority")])
def test_at_overload_the_last_of_the_lowest_class_makes_room_for_a_higher_one(waiting: str, new: str) -> None:
    line, number = filled({"service_class": waiting})
    line.of(new, "new")
    assert list(line.failed) == [str(number - 1)]
    error = line.failed[str(number - 1)]
    assert isinstance(error, Overloaded)
    assert 0 < error.retry_after_s < 0.2
    assert line.line.num_waiting == number
    with pytest.raises(Overloaded):
        line.of(waiting, "another")
    assert served_one_by_one(line, "running", 2) == ["new", "0"]


def test_those_at_the_end_make_room() -> None:
    line, number = filled({"service_class": "default"}, max_ttft_s=0.4)
    line.of("priority", *names("p", 3))
    assert list(line.failed) == [str(number - 1), str(number - 2), str(number - 3)]


def test_only_the_lowest_class_makes_room_if_that_is_enough() -> None:
    line, number = full(max_ttft_s=0.2), 0
    line.of("default", "default")
    while line.line.predicted_wait_s() + ALONE_S <= 0.2:
        line.of("flex", f"flex {number}")
        number += 1
    line.of("priority", "priority")
    assert list(line.failed) == [f"flex {number - 1}"]


def test_a_lower_class_is_refused_for_what_waits_before_it() -> None:
    line, _ = filled({"service_class": "priority"})
    for lower in ("default", "flex"):
        with pytest.raises(Overloaded):
            line.of(lower, "lower")
    assert line.failed == {}


def test_a_tenant_is_not_refused_because_another_one_floods() -> None:
    line, number = filled({"tenant": "flood"})
    line.by("other", "other")
    assert list(line.failed) == [str(number - 1)]
    assert served_one_by_one(line, "running", 2) == ["0", "other"]


# A flood


def waits(seconds: float, flood_per_s: float) -> list[float]:
    """How long each request of a modest tenant waits in `seconds` in which another one sends `flood_per_s` a second.

    One replica serves one request after the other, each for 0.02 s; the modest tenant sends 10 a second, a fifth of it.
    """
    service_s, line = 0.02, FairLine(max_ttft_s=5.0)
    arrivals = [(index * 0.1 + 0.003, "modest") for index in range(int(seconds * 10))]
    arrivals += [(index / flood_per_s, "flood") for index in range(int(seconds * flood_per_s))]
    begin, ends_at, num_served = line.timers.now, 0.0, 0
    queue = deque(sorted(arrivals))
    for step in range(int(seconds * 1000)):
        now = step / 1000
        while queue and queue[0][0] <= now:
            at, tenant = queue.popleft()
            try:
                line.by(tenant, f"{tenant} {at:.4f}")
            except Overloaded:
                assert tenant == "flood"
        if len(line.served) > num_served:
            num_served, ends_at = len(line.served), now + service_s
        elif line.running and now >= ends_at:
            line.end(next(iter(line.running)))
        line.timers.advance(begin + (step + 1) / 1000 - line.timers.now)
    assert not any(name.startswith("modest") for name in line.failed)
    assert flood_per_s == 0 or num_served > 0.6 * seconds / (service_s + LATEST_LOOK_S)  # the server is kept busy
    return [line.decisions[name].waited_s for name in line.served if name.startswith("modest")]


def test_a_flood_of_ten_times_its_share_does_not_make_another_tenant_wait() -> None:
    service_s = 0.02 + 0.001 + LATEST_LOOK_S  # with the time until the line is looked at
    alone, beside_flood = (quantiles(waits(10.0, rate), n=20)[-1] for rate in (0.0, 10 * 0.5 / 0.02))
    assert beside_flood <= 1.2 * alone + service_s


def test_once_none_of_a_tenant_waits_it_is_forgotten_that_its_late_ones_were_passed() -> None:
    line = full(max_ttft_s=1e3)
    line.by("a", *names("late", LATE_TURN))
    line.timers.advance(TTFT_S)
    line.by("a", *names("in time", 6 * (LATE_TURN - 1)))
    line.by("b", "b", arrived_at=line.timers.now + 1e3)
    flow, other = line.tickets["late0"].flow, line.tickets["b"]
    other.flow.starts_at = 1e9  # it has got a lot, and waits until the end
    served = served_one_by_one(line, "running", 5 * LATE_TURN)
    assert flow.passes_late
    left = 6 * (LATE_TURN - 1) + LATE_TURN - len(served)
    served_one_by_one(line, served[-1], left)
    assert (flow.num_waiting, line.line.num_waiting, flow.passes_late) == (0, 1, False)


# In the engines' queues


def test_the_level_in_an_engine_is_by_class_and_the_lower_the_fewer_of_the_tenant_wait() -> None:
    line = full()
    line.by("flood", *names("f", 40))
    line.by("quiet", "q")
    levels = [
        line.line.level(RoutingHints(service_class=service_class, tenant=tenant))
        for service_class in SERVICE_CLASSES
        for tenant in ("new", "quiet", "flood")
    ]
    assert levels == [-LEVELS_OF_CLASS] * 3 + [0, 1, 6] + [LEVELS_OF_CLASS] * 3
    line.by("flood", *names("more", 2 ** (LEVELS_OF_CLASS + 1) // 1000))
    assert line.line.level(RoutingHints(tenant="flood")) < LEVELS_OF_CLASS
    assert line.line.level(RoutingHints(tenant="flood"), is_again=True) == 0


def test_one_tenant_alone_keeps_its_order_in_engines() -> None:
    line = full()
    line.by("a", *names("a", 40))
    assert line.line.level(RoutingHints(tenant="a")) == 0


LONG = 2_100
"""Tokens, more than a step computes."""


def behind_two_prompts() -> FairLine:
    """A flood waits because prefill computes a prompt and has another one in its queue."""
    line = FairLine(num_prefill=1, room=9999, **REMOTE)
    line.by("flood", "done", *names("flood", 9), num_tokens=LONG)
    line.end("done")
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["done", "flood0", "flood1"]
    line.served.clear()
    return line


def test_who_waits_alone_of_its_tenant_gets_into_the_queue_that_it_will_pass() -> None:
    line = behind_two_prompts()
    line.by("quiet", "quiet", num_tokens=LONG)
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["quiet"]
    line.by("another", "another", num_tokens=LONG)  # there is room for one
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == ["quiet"]


def test_several_of_a_tenant_do_not_and_neither_does_who_is_alone_in_the_line() -> None:
    line = behind_two_prompts()
    line.by("quiet", "1", "2", num_tokens=LONG)
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == []
    for name in [*names("flood", 9)[2:], "2"]:
        line.line.leave(line.tickets[name])
    line.timers.advance(HEARTBEAT_S + LATEST_LOOK_S)
    assert line.served == []


def test_only_the_one_whose_turn_it_is_passes_others() -> None:
    line = behind_two_prompts()
    for name in names("flood", 9)[4:]:
        line.line.leave(line.tickets[name])
    line.by("quiet", "quiet", num_tokens=LONG)
    line.tickets["quiet"].flow.starts_at = 1e9  # it has got a lot
    line.timers.advance(LATEST_LOOK_S)
    assert line.served == []
    line.line.leave(line.tickets["flood3"])
    line.timers.advance(HEARTBEAT_S + LATEST_LOOK_S)
    assert line.served == ["flood2"]  # which waits alone of its tenant too


# Whatever happens


class AnyFairLine(AnyLine):
    """As AnyLine, with several tenants and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.line = FairLine(2, room=2, num_prefill=1, max_ttft_s=5.0)
        self.line.fleet.router.can_prefill_decode = True

    @rule(
        num_tokens=st.sampled_from([16, NUM_TOKENS, 5000]),
        prefill_mode=st.sampled_from(["auto", "auto", "remote", "local"]),
        waited_s=st.sampled_from([0.0, 0.0, 0.9, 3.0, 10.0]),
        service_class=CLASSES,
        tenant=TENANTS,
        was_served=st.sampled_from([False, False, True]),
    )
    def join(
        self, num_tokens: int, prefill_mode: str, waited_s: float, service_class: str, tenant: str, was_served: bool
    ) -> None:
        name = str(len(self.joined))
        self.joined.append(name)
        at, hints = self.line.timers.now - waited_s, {"service_class": service_class, "tenant": tenant}
        options: dict[str, Any] = {"prefill_mode": prefill_mode, "was_served": was_served, "hints": hints}
        try:
            self.line.join(name, arrived_at=at, num_tokens=num_tokens, **options)
        except (Overloaded, NoReplica):
            self.refused.add(name)

    @invariant()
    def all_numbers_are_of_those_that_wait(self) -> None:
        line, waiting = self.line.line, [self.line.tickets[name] for name in self._waiting()]
        assert Counter(map(id, line.tickets())) == Counter(map(id, waiting))
        for order in line.orders:
            assert order.num_waiting == sum(flow.num_waiting for flow in order.flows.values())
            for flow in order.flows.values():
                mine = [ticket for ticket in waiting if ticket.flow is flow]
                assert len(mine) == flow.num_waiting
                assert flow.work_s == pytest.approx(sum(ticket.alone_s for ticket in mine), abs=1e-9)


AnyFairLine.TestCase.settings = settings(deadline=None, max_examples=30, stateful_step_count=30)
TestAnyFairLine: Callable[[], Any] = AnyFairLine.TestCase
