"""Which replicas prefill and which decode: within the budget, never without one of each, and without flapping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from app.autoscaling.load import Load
from app.autoscaling.replica_plan import MAX_BUSY, Targets
from app.autoscaling.role_plan import (
    PATIENCE_S,
    SWITCHABLE,
    HomeReport,
    Hysteresis,
    Member,
    RolePlan,
    RolePlanner,
    best_split,
    num_wanted,
    pressure,
    reassign,
)
from app.messages import Role

demand = st.floats(0.01, 40) | st.just(0.0)
fleet = st.lists(
    st.tuples(st.sampled_from(SWITCHABLE), st.sampled_from(SWITCHABLE), st.floats(0, 100)), min_size=2, max_size=12
)


def members(drawn: list[tuple[Role, Role, float]]) -> list[Member]:
    return [Member(f"r{index}", *each) for index, each in enumerate(drawn)]


@given(fleet, st.data())
def test_a_reassignment_has_the_wanted_split_and_changes_as_few_as_possible(
    drawn: list[tuple[Role, Role, float]], data: st.DataObject
) -> None:
    num_prefill = data.draw(st.integers(1, len(drawn) - 1))
    before = members(drawn)
    after = reassign(before, num_prefill)
    assert sum(role == "prefill" for role in after.values()) == num_prefill
    changed = [member for member in before if after[member.replica] != member.role]
    assert len(changed) == abs(num_prefill - sum(member.role == "prefill" for member in before))
    kept = [m for m in before if m not in changed and changed and m.role == changed[0].role]
    for one in changed:
        for other in kept:
            is_homing, other_is_homing = (each.home != each.role for each in (one, other))
            assert is_homing or not other_is_homing
            assert is_homing != other_is_homing or one.work <= other.work


@given(demand, demand, st.integers(2, 16))
def test_the_best_split_leaves_no_role_empty_and_no_other_is_better(
    prefill: float, decode: float, num_replicas: int
) -> None:
    best = best_split(prefill, decode, num_replicas)
    assert 1 <= best < num_replicas
    least = pressure(prefill, decode, best, num_replicas - best)
    assert all(pressure(prefill, decode, n, num_replicas - n) >= least for n in range(1, num_replicas))


@given(demand, demand, st.integers(2, 16))
def test_never_more_are_wanted_than_the_budget_allows(prefill: float, decode: float, budget: int) -> None:
    assert 2 <= num_wanted(prefill, decode, budget) <= budget


@given(demand, demand, st.integers(1, 8), st.integers(1, 8))
def test_under_a_constant_load_the_split_changes_once_at_most_and_soon(
    prefill: float, decode: float, num_prefill: int, num_decode: int
) -> None:
    hysteresis, num_replicas = Hysteresis(), num_prefill + num_decode
    splits = [num_prefill]
    for second in range(60):
        splits.append(hysteresis.decide(prefill, decode, splits[-1], num_replicas - splits[-1], float(second)))
    changes = [second for second, (one, two) in enumerate(pairwise(splits)) if one != two]
    assert len(changes) <= 1
    assert all(second <= PATIENCE_S + 1 for second in changes)


@given(st.floats(-0.06, 0.06), st.integers(1, 8), st.integers(1, 8))
def test_noise_in_the_demands_moves_nobody(noise: float, num_prefill: int, num_decode: int) -> None:
    """Which split is the best one may change all the time; none of them is better by enough."""
    hysteresis = Hysteresis()
    for second in range(60):
        sign = 1 if second % 2 else -1
        prefill, decode = num_prefill * (1 + sign * noise), num_decode * (1 - sign * noise)
        assert hysteresis.decide(prefill, decode, num_prefill, num_decode, float(second)) == num_prefill


def test_a_change_of_the_load_is_followed_in_a_bounded_time_in_either_direction() -> None:
    hysteresis, now, split = Hysteresis(), 0.0, 1
    for prefill, decode, best in ((3.0, 0.9, 3), (0.9, 3.0, 1), (3.0, 0.9, 3)):
        since = now
        while split != best:
            now += 0.5
            assert now - since <= PATIENCE_S + 1
            split = hysteresis.decide(prefill, decode, split, 4 - split, now)


def test_a_role_that_nobody_has_gets_one_at_once() -> None:
    assert Hysteresis().decide(0.0, 3.0, 0, 4, 0.0) == 1
    assert Hysteresis().decide(3.0, 0.0, 4, 0, 0.0) == 3


def test_nobody_is_moved_while_both_roles_have_what_they_need() -> None:
    hysteresis = Hysteresis()
    assert {hysteresis.decide(1.3, 0.1, 2, 2, float(second)) for second in range(30)} == {2}


TARGETS = {
    "prefill": Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=True, is_for_decoding=False),
    "decode": Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=False),
}


class Model:
    """A model whose prompts keep `prefill` replicas busy, and whose sequences `decode`."""

    def __init__(self, prefill: int, decode: int, budget: int) -> None:
        self.planner = RolePlanner(budget)
        self.homes: dict[Role, list[str]] = {
            "prefill": [f"p{n}" for n in range(prefill)],
            "decode": [f"d{n}" for n in range(decode)],
        }
        self.assigned: dict[str, Role] = {}
        self.now = 0.0

    def loads(self, prefill: float, decode: float) -> dict[str, Load]:
        roles = {r: self.assigned.get(r, home) for home, replicas in self.homes.items() for r in replicas}
        numbers = {role: max(1, list(roles.values()).count(role)) for role in SWITCHABLE}
        busy = min(1.0, MAX_BUSY * prefill / numbers["prefill"])
        computing = Load(busy=busy, computed_tokens=10_000 * busy, prompts=10 * busy)
        each = 100 * decode / numbers["decode"]
        itl_s = 0.05 * each / 100  # in proportion, and what is promised with 100
        decoding = Load(decoding=each, generated_tokens=each / itl_s if each else 0.0)
        return {replica: computing if role == "prefill" else decoding for replica, role in roles.items()}

    def plan(self, prefill: float, decode: float, silent: int = 0) -> RolePlan:
        self.now += 1.0
        loads = dict(list(self.loads(prefill, decode).items())[silent:])
        reports: Mapping[Role, HomeReport] = {
            home: HomeReport(TARGETS[home], replicas, {r: loads[r] for r in replicas if r in loads}, len(replicas))
            for home, replicas in self.homes.items()
        }
        plan = self.planner.plan(reports, self.assigned, self.now)
        homes = {replica: home for home, replicas in self.homes.items() for replica in replicas}
        self.assigned = {replica: role for replica, role in plan.roles.items() if role != homes[replica]}
        return plan

    def settle(self, prefill: float, decode: float) -> RolePlan:
        for _ in range(20):
            plan = self.plan(prefill, decode)
        return plan

    def grow(self, plan: RolePlan) -> None:
        """Start the replicas that are asked for."""
        for home, replicas in self.homes.items():
            replicas += [f"{home}{n}" for n in range(len(replicas), math.ceil(plan.replicas[home]))]

    def num_prefill(self, plan: RolePlan) -> int:
        return sum(role == "prefill" for role in plan.roles.values())


def test_replicas_are_moved_before_new_ones_are_asked_for() -> None:
    model = Model(2, 2, budget=8)
    plan = model.settle(prefill=2.6, decode=0.5)
    assert model.num_prefill(plan) == 3
    assert plan.replicas == {"prefill": 2, "decode": 2}
    back = model.settle(prefill=0.5, decode=2.6)
    assert model.num_prefill(back) == 1


def test_more_are_asked_for_if_no_split_is_enough_but_only_within_the_budget() -> None:
    for budget in (4, 5, 6, 9):
        model = Model(2, 2, budget)
        for _ in range(5):
            plan = model.settle(prefill=3.5, decode=2.5)
            model.grow(plan)
        assert sum(len(replicas) for replicas in model.homes.values()) == min(budget, 7)


def test_nobody_is_moved_until_those_that_were_moved_have_reported() -> None:
    model = Model(2, 2, budget=4)
    for _ in range(20):
        plan = model.plan(prefill=2.6, decode=0.5, silent=1)
    assert model.num_prefill(plan) == 2
    assert "none is given up: 3 of 4 replicas have reported" in plan.reason


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 6), st.lists(st.tuples(demand, demand), max_size=8))
def test_whatever_the_load_each_role_has_a_replica_and_the_budget_is_kept(
    prefill: int, decode: int, spare: int, load: list[tuple[float, float]]
) -> None:
    budget = prefill + decode + spare
    model = Model(prefill, decode, budget)
    for each in load:
        plan = model.plan(*each)
        assert set(plan.roles.values()) == set(SWITCHABLE)
        assert sum(math.ceil(number) for number in plan.replicas.values()) <= budget
        assert min(plan.replicas.values()) >= 1


def test_guests_that_decode_where_prompts_are_computed_ask_for_decode_and_not_for_prefill() -> None:
    planner = RolePlanner(4)
    guests = Load(decoding=20, generated_tokens=4000)
    reports: Mapping[Role, HomeReport] = {
        "prefill": HomeReport(TARGETS["prefill"], ["p0"], {"p0": Load()}, 1),
        "decode": HomeReport(TARGETS["decode"], ["d0", "d1"], {"d0": guests, "d1": Load()}, 2),
    }
    plan = planner.plan(reports, {"d0": "prefill"}, 0.0)
    assert plan.signals["prefill_demand"] == 0
    assert plan.signals["decode_demand"] > 0


def test_nobody_takes_the_place_of_replicas_that_start_for_the_first_time() -> None:
    planner = RolePlanner(4)

    def plan(*decode: str) -> Mapping[str, Role]:
        reports: Mapping[Role, HomeReport] = {
            "prefill": HomeReport(TARGETS["prefill"], ["p0", "p1"], {}, 2),
            "decode": HomeReport(TARGETS["decode"], decode, {}, 1),
        }
        return planner.plan(reports, {}, 0.0).roles

    assert plan() == {"p0": "prefill", "p1": "prefill"}
    assert plan("d0") == {"p0": "prefill", "p1": "prefill", "d0": "decode"}
    assert sorted(plan().values()) == ["decode", "prefill"], "but if those have died, somebody does"
