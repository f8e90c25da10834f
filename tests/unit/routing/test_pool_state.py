"""What a frontend believes of a pool: loads within one report, sessions' replicas, and nothing of those that left."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.messages import KvUpdate, ReplicaLoad
from app.routing.affinity import SessionRing
from app.routing.pool_state import NUM_DRAWN, START_PACE, Gauge, PoolState, ReplicaState
from app.routing.prefix_index import PrefixIndex
from app.routing.topology import MAX_PAIRS, Topology
from tests.unit.routing.fleet import PACE
from tests.unit.routing.samples import BLOCK_SIZE, hashes, replica_info


def test_own_work_counts_at_once_and_others_after_one_report() -> None:
    gauge = Gauge[int](0)
    with gauge.counting(3):
        assert gauge.value == 3
        gauge.report(10)  # 3 of them our own
        assert gauge.value == 10
        with gauge.counting(2):
            assert gauge.value == 12
        assert gauge.value == 10
    assert gauge.value == 7
    gauge.report(0)
    assert gauge.value == 0


@given(st.lists(st.one_of(st.integers(1, 50), st.just("end"), st.just("report")), max_size=60))
def test_with_one_frontend_a_report_changes_nothing_once_the_replica_has_caught_up(steps: list[int | str]) -> None:
    gauge, total = Gauge[int](0), 0
    running: list[tuple[AbstractContextManager[None], int]] = []
    for step in steps:
        if step == "report":
            gauge.report(total)
        elif step == "end":
            if running:
                context, amount = running.pop(0)
                context.__exit__(None, None, None)
                total -= amount
        else:
            assert isinstance(step, int)
            context = gauge.counting(step)
            context.__enter__()
            running.append((context, step))
            total += step
        assert gauge.value == total


def test_a_replica_that_left_is_forgotten_and_starts_anew() -> None:
    pool = PoolState(PrefixIndex())
    pool.join(replica_info("a"))
    pool.on_kv("a", KvUpdate(hashes(160), []))
    pool.on_load("a", ReplicaLoad(5, 5, 5))
    pool.leave("a")
    pool.leave("a")
    pool.on_kv("a", KvUpdate(hashes(160), []))  # what was on its way
    pool.on_load("a", ReplicaLoad(5, 5, 5))
    assert (pool.replicas, pool.block_size, pool.own_replica("s")) == ({}, None, None)
    assert pool.index.match(hashes(160)) == {}
    pool.join(replica_info("a"))
    assert pool.index.match(hashes(160)) == {}
    assert pool.replicas["a"].sequences.value == 0


def test_joining_again_begins_with_an_empty_cache() -> None:
    pool = PoolState(PrefixIndex())
    pool.join(replica_info("a"))
    pool.on_kv("a", KvUpdate(hashes(160), []))
    pool.join(replica_info("a"))
    assert pool.index.match(hashes(160)) == {}
    assert pool.candidates({}, None, ()) == ["a"]


def test_of_a_large_pool_it_looks_at_a_few_among_them_those_that_matter() -> None:
    pool = PoolState(PrefixIndex())
    for number in range(1000):
        pool.join(replica_info(str(number)))
    cached = {str(number): number for number in range(500)}
    seen: Counter[str] = Counter()
    for _ in range(50):
        found = pool.candidates(cached, "777", ["999"])
        assert NUM_DRAWN < len(found) <= 2 * NUM_DRAWN + 1
        assert set(found) >= {str(number) for number in range(500 - NUM_DRAWN, 500)} | {"777"}
        assert "999" not in found
        seen.update(found)
    assert len(seen) > 300  # not the same ones each time


def test_sessions_spread_over_the_replicas_and_move_only_with_theirs() -> None:
    ring = SessionRing()
    assert ring.own("s") is None
    for number in range(8):
        ring.add(f"r{number}")
    before = {f"s{n}": ring.own(f"s{n}") for n in range(4000)}
    assert max(Counter(before.values()).values()) < 1.6 * 500
    ring.remove("r3")
    for session, replica in before.items():
        assert (ring.own(session) == replica) is (replica != "r3")
    ring.add("r3")
    other = SessionRing()  # another frontend, which saw the replicas come in another order
    for number in (5, 3, 1, 7, 0, 2, 6, 4):
        other.add(f"r{number}")
    assert {session: other.own(session) for session in before} == before


def test_a_pair_of_nodes_is_as_near_as_its_transfers_were_quick() -> None:
    topology = Topology()
    assert topology.nearness("a", ["a", "b"]) == {"a": 1.0, "b": 0.5}
    for _ in range(40):
        topology.learn("a", "b", 4.0)
        topology.learn("a", "c", 0.5)
    near = topology.nearness("a", ["a", "b", "c"])
    assert near["a"] == near["c"] == 1.0
    assert abs(near["b"] - 0.25) < 0.01


def test_what_is_known_of_pairs_is_bounded() -> None:
    topology = Topology()
    for number in range(MAX_PAIRS + 10):
        topology.learn("a", str(number), 2.0)
    assert topology.nearness("a", ["0", str(MAX_PAIRS)]) == {"0": 0.5, str(MAX_PAIRS): 0.5}
    assert len(topology._slowness) == MAX_PAIRS


def test_what_waits_takes_full_steps_and_the_time_that_the_replica_says() -> None:
    state = ReplicaState(replica_info("a", pace=PACE))
    state.report(ReplicaLoad(2, PACE.chunk_tokens + 1, queued_s=0.5))
    assert state.queue_s == pytest.approx(2 * PACE.prefill_base_s + 0.5)
    with state.queued_tokens.counting(100), state.compute_s.counting(0.25):
        assert state.queue_s == pytest.approx(2 * PACE.prefill_base_s + 0.75)
    state.report(ReplicaLoad())
    assert state.queue_s == 0


def test_a_replica_without_a_pace_is_taken_to_have_a_usual_one() -> None:
    state = ReplicaState(replica_info("a"))
    state.report(ReplicaLoad(2, 5000))
    assert state.queue_s == pytest.approx(START_PACE.prompt_s(5000))


def test_of_a_prefill_replica_only_those_count_as_served_that_decode_there() -> None:
    load = ReplicaLoad(9, decoding=2)
    for role, num_served in (("prefill", 2), ("decode", 9), ("aggregated", 9)):
        state = ReplicaState(replica_info("a", role))
        state.report(load)
        assert state.num_served == num_served


def test_the_kv_memory_is_used_in_whole_blocks() -> None:
    state = ReplicaState(replica_info("a", num_blocks=100))
    state.report(ReplicaLoad(1, 0, 50))
    assert state.kv_use_after(0) == 0.5
    assert state.kv_use_after(BLOCK_SIZE) == 0.51
    assert state.kv_use_after(BLOCK_SIZE + 1) == 0.52


def test_whoever_waits_for_news_is_told_of_new_replicas_loads_and_links() -> None:
    pool, told = PoolState(PrefixIndex()), list[str]()
    pool.on_change = lambda: told.append("news")
    pool.join(replica_info("a"))
    pool.on_load("a", ReplicaLoad(1))
    pool.on_links("a", [])
    assert len(told) == 3
    pool.on_load("gone", ReplicaLoad(1))
    pool.on_links("gone", [])
    assert len(told) == 3
