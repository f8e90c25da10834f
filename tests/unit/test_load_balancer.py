"""Which replica is picked, for any load, any failures and any replicas already tried."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.routing.load import AVOID_S, LoadBalancer

replica_ids = st.sampled_from("abcdef")
replica_sets = st.sets(replica_ids)
loads = st.dictionaries(replica_ids, st.integers(0, 3))


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def picked_under(load: dict[str, int], avoided: set[str], replicas: set[str], tried: set[str]) -> str | None:
    balancer = LoadBalancer(Clock())
    for replica in avoided:
        balancer.avoid(replica)
    with ExitStack() as in_flight:
        for replica, count in load.items():
            for _ in range(count):
                in_flight.enter_context(balancer.track(replica))
        return balancer.pick(replicas, tried)


@given(load=loads, avoided=replica_sets, replicas=replica_sets, tried=replica_sets)
def test_a_ready_replica_that_was_not_tried_is_picked_if_there_is_one(load, avoided, replicas, tried):
    picked = picked_under(load, avoided, replicas, tried)
    assert picked in replicas - tried if replicas - tried else picked is None


@given(load=loads, replicas=replica_sets.filter(bool))
def test_the_least_loaded_replica_is_picked(load, replicas):
    picked = picked_under(load, set(), replicas, set())
    assert load.get(picked, 0) == min(load.get(replica, 0) for replica in replicas)


@given(load=loads, avoided=replica_sets, replicas=replica_sets, tried=replica_sets)
def test_an_avoided_replica_is_picked_only_if_there_is_no_other(load, avoided, replicas, tried):
    if picked_under(load, avoided, replicas, tried) in avoided:
        assert replicas - tried <= avoided


@given(load=loads, replicas=replica_sets.filter(bool))
def test_among_avoided_replicas_the_least_loaded_is_picked(load, replicas):
    picked = picked_under(load, replicas, replicas, set())
    assert load.get(picked, 0) == min(load.get(replica, 0) for replica in replicas)


def test_ties_are_broken_at_random():
    balancer = LoadBalancer()
    assert {balancer.pick(["a", "b"]) for _ in range(100)} == {"a", "b"}


def test_a_replica_is_avoided_for_avoid_s_and_no_longer():
    clock = Clock()
    balancer = LoadBalancer(clock)
    balancer.avoid("a")
    with balancer.track("b"):  # so that only the failure speaks against a
        clock.now += AVOID_S - 0.001
        assert balancer.is_avoided("a")
        assert balancer.pick(["a", "b"]) == "b"
        clock.now += 0.001
        assert not balancer.is_avoided("a")
        assert balancer.pick(["a", "b"]) == "a"


def test_a_second_failure_counts_from_its_own_time():
    clock = Clock()
    balancer = LoadBalancer(clock)
    balancer.avoid("a")
    clock.now += AVOID_S / 2
    balancer.avoid("a")
    clock.now += AVOID_S * 0.75
    assert balancer.is_avoided("a")


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
def test_a_request_counts_only_while_it_runs(fails: bool):
    balancer = LoadBalancer()
    with balancer.track("b"):
        try:
            with balancer.track("a"), balancer.track("a"):
                assert balancer.pick(["a", "b"]) == "b"
                if fails:
                    raise ConnectionError
        except ConnectionError:
            assert fails
        assert balancer.pick(["a", "b"]) == "a"
