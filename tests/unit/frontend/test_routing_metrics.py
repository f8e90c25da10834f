"""What a frontend exports of what its routers know, and that it does not go on with a replica that is gone."""

from __future__ import annotations

from typing import cast
from unittest.mock import Mock

from prometheus_client import CollectorRegistry

from app.frontend.routing_metrics import RoutingMetrics
from app.frontend.waking import Waker
from app.routing.ejection import STRONG
from app.routing.quarantine import Quarantine
from app.routing.retry_budget import FLOOR, RetryBudget
from tests.unit.routing.fleet import PACE, Fleet
from tests.unit.routing.samples import request


def test_all_is_there_from_the_beginning_and_a_replica_goes_with_its_slowness() -> None:
    fleet, budget = Fleet(2, 2, info={"pace": PACE}), RetryBudget()
    quarantine = Quarantine(fleet.clock)
    registry = CollectorRegistry()
    registry.register(RoutingMetrics({"m": fleet.router}, {"m": quarantine}, budget, {}))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert [value("baton_replicas", model="m", role=role) for role in ("prefill", "decode")] == [2, 2]
    switches = {role: value("baton_role_switches_total", model="m", role=role) for role in ("prefill", "decode")}
    assert switches == {"prefill": 0, "decode": 0}
    fleet.router.by_role.on_role("p1", "decode")
    assert value("baton_role_switches_total", model="m", role="decode") == 1
    assert [value("baton_replicas", model="m", role=role) for role in ("prefill", "decode")] == [1, 3]
    fleet.router.by_role.on_role("p1", "prefill")

    ends = {"prefill", "decode", "pair"}
    assert {end: value("baton_ejections_total", model="m", end=end) for end in ends} == dict.fromkeys(ends, 0)
    assert value("baton_quarantines_total", model="m") == value("baton_retries_refused_total") == 0

    fleet.router.ejections.pair_failed("p0", "d0", STRONG, fleet.clock())
    fleet.router.pools["decode"].leave("d1")
    fleet.router.ejections.failed("d1", STRONG, fleet.clock())  # as most that fail, it has left
    assert {end: value("baton_ejections_total", model="m", end=end) for end in ends} == {
        "prefill": 0,
        "decode": 1,
        "pair": 1,
    }
    for replica in ("d0", "d1", "d2"):
        quarantine.on_death(request(), replica)
    assert value("baton_quarantines_total", model="m") == 1
    assert [budget.take() for _ in range(FLOOR + 2)].count(False) == value("baton_retries_refused_total") == 2
    slow = [value("baton_replica_slowness", model="m", role="decode", replica=replica) for replica in ("d0", "d1")]
    assert slow == [1, None]


def test_a_model_is_asleep_if_it_may_sleep_and_has_no_replica() -> None:
    fleets = {"sleeps": Fleet(0, 0), "sleeps-not": Fleet(0, 0), "is-awake": Fleet(1, 0)}
    wakers = {model: cast("Waker", Mock(num_waiting=3)) for model in ("sleeps", "is-awake")}
    quarantines = {model: Quarantine(fleet.clock) for model, fleet in fleets.items()}
    registry = CollectorRegistry()
    routers = {model: fleet.router for model, fleet in fleets.items()}
    registry.register(RoutingMetrics(routers, quarantines, RetryBudget(), wakers))
    asleep = {model: registry.get_sample_value("baton_model_asleep", {"model": model}) for model in fleets}
    assert asleep == {"sleeps": 1, "sleeps-not": 0, "is-awake": 0}
    waking = {model: registry.get_sample_value("baton_waking_requests", {"model": model}) for model in fleets}
    assert waking == {"sleeps": 3, "sleeps-not": 0, "is-awake": 3}
