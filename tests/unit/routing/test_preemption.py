"""Flex sequences that give way: which, for whom, and how they wait until they go on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from app.errors import Overloaded
from app.messages import ReplicaLoad
from app.routing.decision import Wait
from app.routing.preemption import SETTLE_S, Running, fewest
from app.routing.tenant_line import LATE_TURN
from app.routing.waiting_line import HEARTBEAT_S, LATEST_LOOK_S
from tests.unit.routing.samples import BLOCK_SIZE
from tests.unit.routing.test_fair_line import AnyFairLine, FairLine, names
from tests.unit.routing.test_waiting_line import ALONE_S, NUM_BLOCKS, NUM_TOKENS, TTFT_S, served_one_by_one

FLEX = {"service_class": "flex"}


class PreemptingLine(FairLine):
    """A line with sequences that may give way.  Those that did wait for the test to let them join again."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gave_way: list[str] = []
        self._until_end: dict[str, ExitStack] = {}

    def decodes(self, name: str, num_output: int | None = 1) -> None:
        """Have the first token of a sequence come, which may give way from now on; not if its output is None."""
        self.running[name].first_token(None, 0.01)
        running = Running(self.running[name], lambda: num_output, partial(self._give_way, name))
        self._until_end[name] = ExitStack()
        self._until_end[name].enter_context(self.line.preemption.of(running))

    def flex(self, *flex: str, num_output: int | None = 1, **options: Any) -> None:
        """Have flex sequences served at once, which may give way."""
        for name in flex:
            self.join(name, hints=FLEX, **options)
            self.decodes(name, num_output)
            self.timers.advance(1e-6)

    def _give_way(self, name: str) -> None:
        assert name not in self.gave_way
        self.gave_way.append(name)
        self.running.pop(name)

    def end(self, name: str) -> None:
        self._until_end.pop(name, ExitStack()).close()
        super().end(name)

    def look(self) -> None:
        self.timers.advance(LATEST_LOOK_S)


def one_by_each(service_class: str = "default", **options: Any) -> PreemptingLine:
    """A replica with room for one sequence, which is flex, and one of a class that waits."""
    line = PreemptingLine(**options)
    line.flex("flex")
    line.of(service_class, "new")
    line.look()
    return line


# Which


sizes = st.lists(st.integers(1, 9), max_size=8).map(sorted)


@given(sizes, st.integers(1, 40))
def test_as_few_as_make_room_give_way_and_of_those_the_smallest_neighbours(by_size: list[int], needed: int) -> None:
    victims = fewest(by_size, lambda some: sum(some) >= needed)
    if sum(by_size) < needed:
        assert victims == []
        return
    assert sum(victims) >= needed
    assert sum(by_size[len(by_size) - len(victims) + 1 :]) < needed
    smaller = [by_size[n : n + len(victims)] for n in range(len(by_size)) if by_size[n] < victims[0]]
    assert all(sum(some) < needed for some in smaller)


def test_of_those_that_make_room_the_one_with_the_fewest_tokens_gives_way_and_of_equals_the_newest() -> None:
    line = PreemptingLine(room=4)
    line.flex("long", num_output=500)
    line.flex("old", "new")
    line.flex("longer", num_output=600)
    for number, expected in enumerate(("new", "old", "long")):
        line.of("default", str(number))
        line.timers.advance(SETTLE_S + HEARTBEAT_S + LATEST_LOOK_S)
        assert line.gave_way[-1] == expected
    assert line.served[-3:] == ["0", "1", "2"]


def test_a_large_request_has_as_many_give_way_as_it_needs() -> None:
    line = PreemptingLine(room=5)
    line.flex(*names("f", 5))
    line.join("large", num_tokens=3 * NUM_TOKENS)
    line.look()
    assert sorted(line.gave_way) == names("f", 5)[2:]
    assert line.served[-1] == "large"


def test_none_gives_way_to_a_request_for_which_all_of_them_are_not_enough() -> None:
    line = PreemptingLine(room=5)
    line.join("stays")
    line.flex(*names("f", 4))
    line.join("large", num_tokens=5 * NUM_TOKENS)
    line.timers.advance(0.5)
    assert line.gave_way == []
    assert line.line.num_waiting == 1


def test_what_a_sequence_has_generated_makes_room_too() -> None:
    line = PreemptingLine(room=3)
    line.join("stays")
    line.flex("flex", num_output=NUM_TOKENS)
    replica = line.fleet.router.pools["decode"].replicas["d0"]
    replica.report(ReplicaLoad(2, used_blocks=3 * NUM_BLOCKS + 1))
    line.join("large", num_tokens=2 * NUM_TOKENS)
    line.timers.advance(0.5)
    assert line.gave_way == [], "one block is missing"
    replica.report(ReplicaLoad(2, used_blocks=3 * NUM_BLOCKS))
    line.timers.advance(0.5)
    assert (line.gave_way, line.served) == (["flex"], ["stays", "flex", "large"])


def test_it_is_the_replica_where_the_router_would_send_the_request_if_no_flex_ran() -> None:
    line = PreemptingLine(2, room=4)
    for replica in ("d0", "d1"):
        line.fleet.load("decode", replica, 3 if replica == "d0" else 0, used_blocks=NUM_BLOCKS * 3 * (replica == "d0"))
    line.flex(*names("f", 5))
    where = [line.running[name].serving.replica for name in names("f", 5)]
    assert sorted(where) == ["d0", "d1", "d1", "d1", "d1"]
    line.of("default", "new")
    line.look()
    assert where[int(line.gave_way[0][1])] == line.decisions["new"].serving.replica == "d1"


# For whom


@pytest.mark.parametrize("service_class", ["default", "priority"])
def test_a_flex_sequence_gives_way_to_a_higher_class_which_takes_its_place_at_once(service_class: str) -> None:
    line = one_by_each(service_class)
    assert (line.gave_way, line.served) == (["flex"], ["flex", "new"])
    assert line.fleet.router.pools["decode"].replicas["d0"].sequences.own == 1
    assert line.counts == (0, 0)


def test_no_sequence_gives_way_to_its_own_class() -> None:
    line = one_by_each("flex")
    line.timers.advance(0.5)
    assert (line.gave_way, line.served) == ([], ["flex"])


def test_no_flex_gives_way_to_flex_that_lost_its_replica_but_to_a_higher_class_that_did() -> None:
    line = PreemptingLine()
    line.flex("flex")
    line.join("lost flex", hints=FLEX, was_served=True)
    line.timers.advance(0.5)
    assert line.gave_way == []
    line.join("lost", was_served=True)
    line.line.leave(line.tickets["lost flex"])
    line.look()
    assert line.gave_way == ["flex"]


def test_none_gives_way_to_a_request_that_waits_for_prefill() -> None:
    line = PreemptingLine(num_prefill=1, room=9)
    line.flex("flex", prefill_mode="local")
    line.fleet.load("prefill", "p0", 9, 100_000)
    line.join("new", prefill_mode="remote")
    line.timers.advance(0.5)
    assert line.line.lacks == "prefill"
    assert line.gave_way == []


def test_none_gives_way_so_that_a_prompt_finds_room_where_others_decode() -> None:
    line = PreemptingLine(num_prefill=1, room=200)
    line.fleet.load("prefill", "p0", 9, 100_000)
    number = 0
    while not isinstance(line.fleet.choose(5000), Wait):
        line.flex(f"f{number}", prefill_mode="local")
        number += 1
    line.join("new", num_tokens=5000)
    line.timers.advance(0.5)
    assert line.line.lacks == "prefill"
    assert line.gave_way == []
    line.end("f0")
    line.look()
    assert line.decisions["new"].kind == "local"


def test_none_gives_way_if_the_request_would_then_wait_for_prefill() -> None:
    line = PreemptingLine()
    line.flex("flex")
    line.fleet.load("decode", "d0", 1, 100_000, used_blocks=NUM_BLOCKS, decoding=1)
    line.of("default", "new")
    line.timers.advance(0.5)
    assert line.line.lacks == "decode"
    assert line.gave_way == []


def test_none_gives_way_unless_the_request_then_goes_there() -> None:
    line = PreemptingLine(2)
    line.flex("f0", "f1")
    there, elsewhere = (line.decisions[name] for name in ("f0", "f1"))
    assert there.serving.replica != elsewhere.serving.replica
    candidates = line.line.preemption.candidates()
    for then in (Wait(0.1, "prefill"), elsewhere, there):
        answers = iter([there, then])
        planned = line.line.preemption.plan(candidates, NUM_TOKENS, partial(next, answers))
        assert (planned is not None) is (then is there)


def test_none_gives_way_before_it_can() -> None:
    line = PreemptingLine()
    line.flex("flex", num_output=None)
    line.of("default", "new")
    line.timers.advance(0.5)
    assert line.gave_way == []


def test_none_gives_way_on_a_replica_that_the_request_must_not_use() -> None:
    line = PreemptingLine(2)
    line.flex("f0", "f1")
    line.join("new", lost={line.running["f1"].serving.replica})
    line.look()
    assert line.gave_way == ["f0"]


def test_who_has_become_late_lets_others_pass_and_has_none_give_way_before() -> None:
    line = PreemptingLine()
    line.flex("flex")
    line.join("late", arrived_at=line.timers.now - TTFT_S)
    line.of("default", "new")
    line.look()
    assert (line.gave_way, line.served) == (["flex"], ["flex", "new"])


# How many at once


def test_a_replica_that_still_counts_one_that_gave_way_is_left_alone_until_it_has_had_time_to_tell() -> None:
    line = PreemptingLine(room=3)
    line.flex(*names("f", 3))
    line.of("default", "d0", "d1")
    line.look()
    assert len(line.gave_way) == 1
    line.fleet.load("decode", "d0", 4, used_blocks=4 * NUM_BLOCKS, decoding=3)  # from before it heard of that
    line.timers.advance(SETTLE_S / 2)
    assert len(line.gave_way) == 1
    line.fleet.load("decode", "d0", 3, used_blocks=3 * NUM_BLOCKS, decoding=2)
    line.timers.advance(SETTLE_S + HEARTBEAT_S + LATEST_LOOK_S)
    assert len(line.gave_way) == 2
    assert line.served[-2:] == ["d0", "d1"]


def test_meanwhile_others_give_way_at_other_replicas() -> None:
    line = PreemptingLine(3)
    line.flex(*names("f", 3))
    line.of("default", *names("d", 3))
    line.look()
    assert len(line.gave_way) == 3


# How they wait


def preempted(line: PreemptingLine, name: str, **options: Any) -> None:
    hints = {**FLEX, **options.pop("hints", {})}
    line.join(name, was_preempted=True, hints=hints, **options)


def test_it_goes_before_the_others_of_its_tenant_but_not_before_a_higher_class_or_the_others_turn() -> None:
    line = PreemptingLine(max_ttft_s=1e6)
    line.join("running")
    for name in names("a", LATE_TURN + 1):
        line.join(name, hints={**FLEX, "tenant": "a"})
    line.join("b", hints={**FLEX, "tenant": "b"})
    for name in ("again 1", "again 2"):
        preempted(line, name, hints={"tenant": "a"})
    line.of("default", "default")
    served = served_one_by_one(line, "running", LATE_TURN + 5)
    assert served == ["default", "again 1", "again 2", "a0", "b", *names("a", LATE_TURN + 1)[1:]]
    line.join("late", hints=FLEX, arrived_at=line.timers.now - TTFT_S)
    line.line.orders[-1].flow("").num_turns = LATE_TURN - 1  # it is the turn of those that are late
    preempted(line, "again 3")
    assert served_one_by_one(line, line.served[-1], 2) == ["again 3", "late"]


def test_it_pays_nothing_of_its_tenants_part_again() -> None:
    line = PreemptingLine()
    line.join("running")
    preempted(line, "again", hints={"tenant": "a"})
    line.join("new", hints={**FLEX, "tenant": "b"})
    line.fleet.cache("decode", "d0", NUM_TOKENS, 1_000_000 * sum(b"again"))
    flow = line.tickets["again"].flow
    served_one_by_one(line, "running", 1)
    assert (line.served[-1], flow.starts_at) == ("again", 0.0)


def test_it_takes_no_turn_from_those_who_are_late() -> None:
    line = PreemptingLine(max_ttft_s=1e6)
    line.join("running")
    line.join("late", hints=FLEX, arrived_at=line.timers.now - TTFT_S)
    for name in names("in time", 2 * LATE_TURN):
        line.join(name, hints=FLEX)
    flow, last = line.tickets["late"].flow, "running"
    while flow.num_turns % LATE_TURN != LATE_TURN - 1:
        (last,) = served_one_by_one(line, last, 1)
    preempted(line, "again")
    assert served_one_by_one(line, last, 2) == ["again", "late"]


def test_others_make_room_behind_a_tenant_of_whom_only_preempted_ones_wait() -> None:
    line, number = PreemptingLine(max_ttft_s=0.4), 0
    line.join("running")
    preempted(line, "again", hints={"tenant": "p"})
    line.tickets["again"].flow.starts_at = 1e9  # it has the last turn
    while line.line.predicted_wait_s() + ALONE_S <= 0.4:
        line.join(str(number), hints=FLEX)
        number += 1
    line.of("default", "1", "2")  # the preempted one is not before the others, so there is time for one
    assert list(line.failed) == [str(number - 1)]


def test_it_is_never_refused() -> None:
    line = PreemptingLine(max_ttft_s=0.2)
    line.join("running")
    preempted(line, "again", arrived_at=line.timers.now - 100.0)
    for name in names("others", 20):
        preempted(line, name)
    line.of("default", "new")
    for name in (*names("others", 20), "new"):
        line.line.leave(line.tickets[name])
    with pytest.raises(Overloaded):
        line.of("flex", *names("f", 1000))
    with pytest.raises(Overloaded):
        line.of("default", *names("d", 1000))
    line.timers.advance(100.0)
    assert "again" not in line.failed
    assert line.counts == (1, NUM_TOKENS)
    assert served_one_by_one(line, "running", 1) == ["again"]


def test_one_that_leaves_is_gone() -> None:
    line = PreemptingLine()
    line.join("running")
    for name in ("again 1", "again 2"):
        preempted(line, name)
    line.line.leave(line.tickets["again 1"])
    assert line.counts == (1, NUM_TOKENS)
    assert served_one_by_one(line, "running", 1) == ["again 2"]
    line.timers.advance(2 * HEARTBEAT_S)
    assert line.counts == (0, 0)


def test_it_does_not_come_back_at_once() -> None:
    """The place that it leaves is taken, and what is over does not do for it."""
    line = PreemptingLine(room=3)
    line.flex(*names("f", 3), num_output=0)
    line.join("new", num_tokens=BLOCK_SIZE)
    line.look()
    (name,) = line.gave_way
    preempted(line, name)
    line.timers.advance(0.5)
    assert line.counts == (1, NUM_TOKENS)
    line.end("new")
    line.look()
    assert line.served[-1] == name


# Whatever happens


class AnyPreemptingLine(AnyFairLine):
    """As AnyFairLine, with sequences that give way and come again."""

    line: PreemptingLine

    def __init__(self) -> None:
        super().__init__()
        self.line = PreemptingLine(2, room=2, num_prefill=1, max_ttft_s=5.0)
        self.line.fleet.router.can_prefill_decode = True

    def _undecided(self) -> list[str]:
        return sorted(self.line.running.keys() - self.line._until_end.keys())

    @precondition(lambda self: self._undecided())
    @rule(data=st.data(), num_output=st.sampled_from([None, 0, 1, 300]))
    def may_give_way(self, data: st.DataObject, num_output: int | None) -> None:
        self.line.decodes(data.draw(st.sampled_from(self._undecided())), num_output)

    @precondition(lambda self: self.line.gave_way)
    @rule()
    def come_again(self) -> None:
        gave_way = self.line.gave_way.pop()
        self.line._until_end.pop(gave_way).close()
        name = f"{gave_way}'"
        self.joined.append(name)
        self.line.join(name, was_preempted=True, hints=FLEX)

    def teardown(self) -> None:
        for role in ("prefill", "decode"):
            self.line.fleet.join(role, f"{role[0]}0")
        while self.line.gave_way:
            self.come_again()
        for name in list(self.line.running):
            self.line.end(name)
        super().teardown()


AnyPreemptingLine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestAnyPreemptingLine: Callable[[], Any] = AnyPreemptingLine.TestCase
