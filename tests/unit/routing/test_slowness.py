"""A slow replica is found beside the others of its pool, whatever the pool's own speed is."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import ReplicaLoad
from app.pace import Pace
from app.routing.pool_state import ReplicaState
from app.routing.slowness import slowness
from tests.unit.routing.fleet import PACE, Fleet
from tests.unit.routing.samples import replica_info


def replica(pace: Pace | None = PACE, role: Any = "decode", **load: Any) -> ReplicaState:
    state = ReplicaState(replica_info("r", role, pace=pace))
    state.report(ReplicaLoad(**load))
    return state


def slowed(pace: Pace, times: float) -> Pace:
    fields: tuple[str, ...] = ("prefill_base_s", "prefill_s_per_token", "prefill_s_per_token_squared", "step_base_s")
    fields += ("step_s_per_sequence", "step_s_per_kv_token")
    return msgspec.structs.replace(pace, **{field: times * getattr(pace, field) for field in fields})


@pytest.mark.parametrize("of_all", [1.0, 5.0])
def test_a_replica_whose_steps_became_slow_is_compared_with_the_median_of_the_others(of_all: float) -> None:
    pool = {f"d{number}": replica(slowness=of_all, sequences=number) for number in range(3)}
    pool["slow"] = replica(slowness=2 * of_all)
    assert slowness(pool) == pytest.approx({"d0": 1, "d1": 1, "d2": 1, "slow": 2})


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=9))
def test_each_replica_is_compared_with_the_median_of_all_others(times: list[float]) -> None:
    pool = {str(number): replica(slowness=each) for number, each in enumerate(times)}
    expected = {
        str(number): each / statistics.median(times[:number] + times[number + 1 :]) for number, each in enumerate(times)
    }
    assert slowness(pool) == pytest.approx(expected)


def test_the_slow_one_of_two_does_not_hide_in_the_median() -> None:
    assert slowness({"d0": replica(), "d1": replica(slowness=2.0)}) == pytest.approx({"d0": 0.5, "d1": 2})


@pytest.mark.parametrize("role", ["decode", "prefill", "aggregated"])
def test_a_replica_that_was_slow_when_it_started_is_found_by_its_pace(role: Any) -> None:
    pool = {"r0": replica(role=role), "r1": replica(role=role), "slow": replica(slowed(PACE, 3), role)}
    assert slowness(pool)["slow"] == pytest.approx(3)


def test_a_prefill_replica_that_became_slow_is_found_by_the_prompts_that_were_sent_there() -> None:
    fleet = Fleet(2, 1, info={"pace": PACE})
    for _ in range(20):
        decision = fleet.decide(1000, prefill_mode="remote")
        assert decision.prefill is not None
        prefill_s = (2.5 if decision.prefill.replica == "p1" else 1.0) * PACE.prompt_s(1000)
        fleet.serve(decision, 1000, prefill_s + 0.01, prefill_s=prefill_s)
    assert slowness(fleet.router.pools["prefill"].replicas)["p1"] == pytest.approx(2.5)


def test_one_without_others_is_not_slow_and_one_whose_pace_nobody_knows_is_not_compared() -> None:
    assert slowness({"d0": replica(slowness=3.0), "d1": replica(pace=None)}) == {"d0": 1}
    assert slowness({}) == {}
