"""Which replicas serve a request and where its prompt is prefilled, and what the router learns from how it went."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import RoutingConfig
from app.errors import InvalidRequest, NoReplica, Overloaded
from app.messages import KvUpdate, Link, PrefillReport, ReplicaLoad, Role
from app.routing.decision import Decision, RoutingHints
from app.routing.pool_state import AVOID_S
from app.routing.router import NO_HINTS, Router
from tests.unit.routing.samples import hashes, replica_info, request

REMOTE: dict[str, Any] = {"placement": {"policy": "remote"}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """A router and its pools, in a time that only tests move."""

    def __init__(
        self, num_prefill: int = 0, num_decode: int = 1, num_aggregated: int | None = None, **options: Any
    ) -> None:
        """`num_prefill` 0 is a pool without a replica, None no pool; the same for `num_aggregated`."""
        self.clock = Clock()
        can = options.pop("can_decode_prefill", True)
        has_prefill = options.pop("has_prefill", True)
        info = options.pop("info", {})
        self.router = Router(
            RoutingConfig.model_validate(options),
            has_prefill=has_prefill,
            has_aggregated=num_aggregated is not None,
            can_decode_prefill=can,
            clock=self.clock,
        )
        counts: dict[Role, int] = {"prefill": num_prefill, "decode": num_decode}
        for role, count in counts.items():
            for number in range(count):
                self.router.pools[role].join(replica_info(f"{role[0]}{number}", role, **info))
        for number in range(num_aggregated or 0):
            self.router.pools["aggregated"].join(replica_info(f"a{number}", "aggregated"))

    def cache(self, role: Any, replica: str, num_tokens: int, start: int = 0, salt: str | None = None) -> None:
        self.router.pools[role].on_kv(replica, KvUpdate(hashes(num_tokens, start, salt), []))

    def load(self, role: Any, replica: str, *load: int) -> None:
        self.router.pools[role].on_load(replica, ReplicaLoad(*load))

    def link(self, decode: str, **problems: str) -> None:
        """Have a decode replica tell of all its links, by prefill replica and with their problems."""
        links = [Link(prefill, problem=problem) for prefill, problem in problems.items()]
        self.router.pools["decode"].on_links(decode, links)

    def decide(self, num_tokens: int = 160, *, hints: RoutingHints = NO_HINTS, **fields: Any) -> Decision:
        return self.router.decide(request(num_tokens, **fields), hints)

    def serve(self, decision: Decision, num_tokens: int, seconds: float, *, prefill_s: float | None = None) -> None:
        """A request that was decided so, whose first token took `seconds`."""
        in_flight = self.router.begin(request(num_tokens), decision)
        self.clock.now += seconds
        moved = num_tokens if decision.kind == "remote" else 0
        cached = 0 if prefill_s is not None else None
        report = PrefillReport(decision.kind, "", None, "d0", 0, moved, "", prefill_s, prefill_cached_tokens=cached)
        in_flight.first_token(report, seconds)
        in_flight.end()

    def measure(self, *, prefill_s: float = 1e-4, handover_s: float = 0.01, local_s: float = 1e-4) -> None:
        """Teach it seconds per token of both ways, and of what a handover takes."""
        for num_tokens in (100, 400, 1600, 6400) * 4:
            remote = self.decide(num_tokens, prefill_mode="remote")
            self.serve(remote, num_tokens, num_tokens * prefill_s + handover_s, prefill_s=num_tokens * prefill_s)
            self.serve(self.decide(num_tokens, prefill_mode="local"), num_tokens, num_tokens * local_s)


def where(decision: Decision) -> tuple[str, str]:
    return decision.kind, decision.reason


# Who serves


def test_the_replica_that_has_the_prompt_cached_is_chosen_in_both_pools() -> None:
    fleet = Fleet(4, 4, **REMOTE)
    fleet.cache("prefill", "p2", 160)
    fleet.cache("decode", "d1", 96)
    decision = fleet.decide(160)
    assert decision.prefill is not None
    assert (decision.prefill.replica, decision.prefill.cached_tokens) == ("p2", 144)  # the last token is computed
    assert (decision.serving.replica, decision.serving.cached_tokens) == ("d1", 96)
    assert decision.expected_cached_tokens == 144


def test_another_salt_shares_no_cache() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    fleet.cache("prefill", "p0", 160, salt="mine")
    mine, other = fleet.decide(cache_salt="mine").prefill, fleet.decide().prefill
    assert mine is not None
    assert other is not None
    assert (mine.cached_tokens, other.cached_tokens) == (144, 0)


@pytest.mark.parametrize(("queued", "chosen"), [(100, "p0"), (200, "p1")])
def test_with_equal_weights_a_cached_prefix_is_worth_as_many_waiting_tokens_as_it_saves(
    queued: int, chosen: str
) -> None:
    fleet = Fleet(2, 1, prefill_weights={"prefix": 1, "queue": 1}, **REMOTE)
    fleet.cache("prefill", "p0", 160)
    fleet.load("prefill", "p0", 1, queued, 0)
    decision = fleet.decide(160)
    assert decision.prefill is not None
    assert decision.prefill.replica == chosen


def test_what_was_sent_counts_before_the_replica_has_reported_it() -> None:
    fleet = Fleet(4, 4, **REMOTE)
    chosen, running = [], []
    for number in range(4):
        decision = fleet.decide(start=1000 * number)
        running.append(fleet.router.begin(request(start=1000 * number), decision))
        assert decision.prefill is not None
        chosen.append((decision.prefill.replica, decision.serving.replica))
    assert sorted(p for p, _ in chosen) == ["p0", "p1", "p2", "p3"]
    assert sorted(d for _, d in chosen) == ["d0", "d1", "d2", "d3"]


def test_a_decode_replica_without_room_for_the_kv_is_passed_over() -> None:
    fleet = Fleet(1, 2, **REMOTE)
    fleet.cache("decode", "d0", 64)
    fleet.load("decode", "d0", 5, 0, 995)
    assert fleet.decide(160).serving.replica == "d1"
    fleet.load("decode", "d1", 5, 0, 995)
    assert fleet.decide(160).serving.replica in ("d0", "d1")  # where all are full it waits in one of them


def test_the_nearer_decode_replica_is_preferred_and_measured_transfers_say_which_is_near() -> None:
    fleet = Fleet(1, 0, **REMOTE)
    for number, node in enumerate(("10.0.0.2", "10.0.0.1")):
        fleet.router.pools["decode"].join(replica_info(f"d{number}", node_ip=node))
    assert fleet.decide().serving.replica == "d1"  # prefill's own node
    for _ in range(10):
        fleet.router.topology.learn("10.0.0.1", "10.0.0.1", 3.0)
        fleet.router.topology.learn("10.0.0.1", "10.0.0.2", 0.9)
    assert fleet.decide().serving.replica == "d0"


def test_a_session_stays_with_its_replicas_unless_they_are_busy() -> None:
    fleet = Fleet(4, 4, **REMOTE)
    hints = RoutingHints(session="alice")
    chosen = {fleet.decide(start=1000 * number, hints=hints).serving.replica for number in range(10)}
    assert len(chosen) == 1
    assert len({fleet.decide(hints=RoutingHints(session=str(n))).serving.replica for n in range(40)}) == 4
    own = chosen.pop()
    fleet.load("decode", own, 50, 0, 500)
    assert fleet.decide(hints=hints).serving.replica != own


def test_a_replica_that_failed_is_avoided_for_a_while() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    fleet.router.pools["decode"].avoid("d0")
    assert {fleet.decide(start=1000 * n).serving.replica for n in range(10)} == {"d1"}
    fleet.clock.now += AVOID_S
    assert {fleet.decide(start=1000 * n).serving.replica for n in range(20)} == {"d0", "d1"}


def test_lost_replicas_are_never_chosen_again() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    assert fleet.router.decide(request(), lost=["d0"]).serving.replica == "d1"
    with pytest.raises(NoReplica, match="decode"):
        fleet.router.decide(request(), lost=["d0", "d1"])


@given(
    st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(1, 10)), max_size=20), st.integers(1, 200)
)
def test_no_replica_is_better_by_its_score_than_the_chosen_one_in_a_small_pool(
    size: int, held: list[tuple[int, int]], num_tokens: int
) -> None:
    fleet = Fleet(0, size, has_prefill=False)
    for number, blocks in held:
        fleet.cache("decode", f"d{number}", blocks * 16)
    decision = fleet.decide(num_tokens, hints=RoutingHints(explain=True))
    assert all(other.total <= decision.serving.total for other in decision.others.get("decode", []))
    assert all(0 <= value <= 1 for value in decision.serving.scores.values())


def test_in_a_large_pool_those_that_have_the_prompt_cached_are_looked_at() -> None:
    fleet = Fleet(0, 500, has_prefill=False)
    fleet.cache("decode", "d321", 160)
    assert {fleet.decide().serving.replica for _ in range(20)} == {"d321"}


# Where to prefill


def test_without_a_prefill_pool_it_is_local() -> None:
    assert where(Fleet(0, 1, has_prefill=False).decide()) == ("local", "aggregated")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prefill_mode": "local"}, ("local", "requested")),
        ({"prefill_mode": "remote"}, ("remote", "requested")),
        ({"prefill_mode": "corrupted"}, ("remote", "requested")),
        ({"sampling": {"prompt_logprobs": 1}}, ("local", "prompt_logprobs")),
    ],
)
def test_a_request_may_demand_it(fields: dict[str, Any], expected: tuple[str, str]) -> None:
    fleet = Fleet(1, 1)
    fleet.measure()
    assert where(fleet.decide(**fields)) == expected


def test_the_first_prompts_go_to_prefill_until_that_is_measured() -> None:
    fleet = Fleet(1, 1)
    decision = fleet.decide()
    assert where(decision) == ("remote", "unmeasured")
    assert decision.predicted_ttft_s is None


def test_it_goes_where_the_first_token_is_predicted_sooner() -> None:
    fleet = Fleet(1, 1)
    fleet.measure(handover_s=0.05)
    assert where(fleet.decide(100)) == ("local", "faster")
    assert where(fleet.decide(6400)) == ("local", "faster")  # the same speed, and nothing to hand over
    fleet.cache("prefill", "p0", 6400)
    decision = fleet.decide(6400)
    assert where(decision) == ("remote", "faster")  # 6,384 tokens need not be computed there
    assert decision.predicted.remote_s == pytest.approx(0.05, rel=0.3)
    assert decision.predicted.local_s == pytest.approx(0.64, rel=0.3)
    fleet.cache("decode", "d0", 6400)
    assert where(fleet.decide(6400)) == ("local", "faster")


def test_a_queue_before_prefill_makes_local_prefill_the_sooner() -> None:
    fleet = Fleet(1, 1)
    fleet.measure(handover_s=0.001, local_s=1.5e-4)
    assert where(fleet.decide(1000)) == ("remote", "faster")
    fleet.load("prefill", "p0", 3, 5000, 0)
    assert where(fleet.decide(1000)) == ("local", "faster")


def test_what_running_sequences_would_lose_counts() -> None:
    fleet = Fleet(1, 1, placement={"policy": "predicted", "itl_budget_ms": 20})
    fleet.measure(handover_s=0.05)
    assert where(fleet.decide(1000)) == ("local", "faster")  # 0.1 s against 0.15 s
    fleet.load("decode", "d0", 4, 0, 0, 0)
    assert where(fleet.decide(1000)) == ("local", "faster")  # they wait themselves
    fleet.load("decode", "d0", 4, 0, 0, 4)
    decision = fleet.decide(1000)
    assert where(decision) == ("remote", "faster")
    assert decision.predicted.interference_s == pytest.approx(4 * (0.1 - 0.02), rel=0.3)
    assert where(fleet.decide(100)) == ("local", "faster")  # 10 ms are within the budget


@pytest.mark.parametrize(
    ("num_tokens", "queued", "expected"),
    [
        (500, 0, ("local", "short")),
        (501, 0, ("remote", "long")),
        (5000, 900, ("remote", "long")),
        (5000, 1100, ("local", "prefill_queue")),
    ],
)
def test_fixed_thresholds(num_tokens: int, queued: int, expected: tuple[str, str]) -> None:
    policy = {"policy": "thresholds", "max_local_tokens": 500, "max_prefill_queue_tokens": 1000}
    fleet = Fleet(1, 1, placement=policy)
    fleet.load("prefill", "p0", 1, queued, 0)
    assert where(fleet.decide(num_tokens)) == expected


def test_thresholds_count_what_decode_has_not_cached() -> None:
    fleet = Fleet(1, 1, placement={"policy": "thresholds", "max_local_tokens": 50})
    fleet.cache("decode", "d0", 5000)
    assert where(fleet.decide(5000)) == ("local", "short")


def test_without_a_prefill_replica_it_is_local() -> None:
    assert where(Fleet(0, 1).decide()) == ("local", "no_prefill_replica")


# Links


def test_a_pair_without_a_usable_link_is_not_chosen() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    fleet.link("d0", p0="", p1="KV moves by tcp/lo")
    fleet.link("d1", p1="")
    pairs = set()
    for _ in range(50):
        decision = fleet.decide()
        assert decision.prefill is not None
        pairs.add((decision.prefill.replica, decision.serving.replica))
    assert pairs == {("p0", "d0"), ("p1", "d1")}


def test_links_count_more_than_any_score() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    fleet.cache("prefill", "p1", 160)
    fleet.cache("decode", "d1", 160)
    fleet.load("decode", "d0", 1, 0, 1000)  # it has no room for the KV: the engine makes the prompt wait
    fleet.link("d0", p0="")
    fleet.link("d1")
    decision = fleet.decide()
    assert decision.prefill is not None
    assert (decision.prefill.replica, decision.serving.replica) == ("p0", "d0")


def test_a_replica_that_has_told_nothing_of_links_gets_kv_from_all() -> None:
    fleet = Fleet(1, 2, **REMOTE)
    fleet.link("d0", p0="broken")
    assert {fleet.decide().serving.replica for _ in range(20)} == {"d1"}


def test_without_any_usable_link_it_is_local_and_the_reason_says_so() -> None:
    fleet = Fleet(2, 1, **REMOTE)
    fleet.link("d0", p0="broken")
    assert where(fleet.decide()) == ("local", "no_usable_link")
    assert where(fleet.decide(prefill_mode="remote")) == ("local", "no_usable_link")
    assert not fleet.router.has_usable_link()
    fleet.link("d0", p0="broken", p1="")
    assert where(fleet.decide()) == ("remote", "configured")
    assert fleet.router.has_usable_link()


def test_without_any_usable_link_nothing_is_served_where_decode_cannot_prefill() -> None:
    fleet = Fleet(1, 1, can_decode_prefill=False)
    fleet.link("d0", p0="broken")
    with pytest.raises(NoReplica, match="from which a decode replica can get KV"):
        fleet.decide()
    beside = Fleet(1, 1, 1, can_decode_prefill=False)
    beside.link("d0", p0="broken")
    assert where(beside.decide()) == ("local", "no_usable_link")


# An engine whose decode replicas cannot prefill


def test_remote_is_then_the_only_way() -> None:
    fleet = Fleet(1, 1, can_decode_prefill=False)
    assert where(fleet.decide()) == ("remote", "only_way")
    with pytest.raises(InvalidRequest, match="baton_prefill"):
        fleet.decide(prefill_mode="local")
    with pytest.raises(NoReplica, match="prefill"):
        Fleet(0, 1, can_decode_prefill=False).decide()
    with pytest.raises(NoReplica, match="decode"):
        Fleet(1, 0, can_decode_prefill=False).decide()


def test_an_aggregated_pool_beside_makes_it_a_choice() -> None:
    fleet = Fleet(1, 1, 2, can_decode_prefill=False)
    fleet.measure(handover_s=0.05)
    decision = fleet.decide(100)
    assert (*where(decision), decision.serving_role) == ("local", "faster", "aggregated")
    assert decision.serving.replica in ("a0", "a1")
    fleet.cache("aggregated", "a1", 6400)
    assert fleet.decide(6400).serving.replica == "a1"
    fleet.cache("prefill", "p0", 6400)
    fleet.load("aggregated", "a1", 1, 9000, 0)
    assert where(fleet.decide(6400)) == ("remote", "faster")


def test_the_aggregated_pool_serves_what_the_others_cannot() -> None:
    assert where(Fleet(0, 1, 1, can_decode_prefill=False).decide()) == ("local", "no_prefill_replica")
    assert where(Fleet(1, 0, 1, can_decode_prefill=False).decide()) == ("local", "no_decode_replica")
    assert where(Fleet(1, 1, 0, can_decode_prefill=False).decide()) == ("remote", "only_way")


# Admission


def test_prompts_are_deflected_when_prefill_is_full_and_refused_when_all_is() -> None:
    fleet = Fleet(2, 1, max_queued_tokens=1000, **REMOTE)
    fleet.measure(prefill_s=1e-3, local_s=1e-3)
    for replica in ("p0", "p1"):
        fleet.load("prefill", replica, 1, 900, 0)
    assert where(fleet.decide(100)) == ("remote", "configured")
    assert where(fleet.decide(101)) == ("local", "prefill_full")
    fleet.load("decode", "d0", 1, 950, 0)
    with pytest.raises(Overloaded) as caught:
        fleet.decide(250)
    assert caught.value.retry_after_s == pytest.approx(0.15, rel=0.3)  # until 150 tokens of p0's queue are done
    fleet.load("prefill", "p1", 1, 0, 0)
    assert where(fleet.decide(250)) == ("remote", "local_full")


def test_a_full_replica_is_passed_over_however_much_it_has_cached() -> None:
    fleet = Fleet(2, 1, max_queued_tokens=1000, **REMOTE)
    fleet.cache("prefill", "p0", 320)
    fleet.load("prefill", "p0", 1, 995, 0)
    fleet.load("prefill", "p1", 1, 600, 0)
    decision = fleet.decide(330)
    assert decision.prefill is not None
    assert decision.prefill.replica == "p1"


def test_an_idle_replica_takes_a_prompt_longer_than_the_bound() -> None:
    fleet = Fleet(1, 1, max_queued_tokens=100, **REMOTE)
    assert where(fleet.decide(5000)) == ("remote", "configured")


def test_a_demanded_way_that_is_full_is_refused_and_not_changed() -> None:
    fleet = Fleet(1, 1, max_queued_tokens=1000)
    fleet.load("prefill", "p0", 1, 1000, 0)
    with pytest.raises(Overloaded):
        fleet.decide(prefill_mode="remote")
    assert where(fleet.decide()) == ("local", "prefill_full")


def test_an_aggregated_model_refuses_when_it_is_full() -> None:
    fleet = Fleet(0, 1, has_prefill=False, max_queued_tokens=1000)
    fleet.load("decode", "d0", 9, 1000, 0)
    with pytest.raises(Overloaded):
        fleet.decide()


# While it runs


def test_load_is_counted_until_the_first_token_and_until_the_end() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    prefill, decode = fleet.router.pools["prefill"].replicas["p0"], fleet.router.pools["decode"].replicas["d0"]

    def counted() -> tuple[int, ...]:
        gauges = [prefill.sequences, prefill.queued_tokens]
        gauges += [decode.sequences, decode.queued_tokens, decode.used_blocks, decode.decoding]
        return tuple(gauge.value for gauge in gauges)

    in_flight = fleet.router.begin(request(160), fleet.decide(160))
    assert counted() == (1, 160, 1, 0, 10, 0)
    in_flight.first_token(None, 0.1)
    assert counted() == (0, 0, 1, 0, 10, 1)
    in_flight.end()
    in_flight.end()
    assert counted() == (0, 0, 0, 0, 0, 0)
    in_flight = fleet.router.begin(request(160), fleet.decide(160, prefill_mode="local"))
    assert counted() == (0, 0, 1, 160, 10, 0)
    in_flight.end()
    assert counted() == (0, 0, 0, 0, 0, 0)


def test_a_replica_that_left_since_it_was_chosen_does_no_harm() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    decision = fleet.decide()
    fleet.router.pools["prefill"].leave("p0")
    fleet.router.pools["decode"].leave("d0")
    in_flight = fleet.router.begin(request(), decision)
    in_flight.first_token(PrefillReport("remote", "", "p0", "d0", 0, 160, ""), 0.1)
    in_flight.end()


def test_where_replicas_publish_nothing_of_their_cache_it_is_assumed_from_what_they_were_sent() -> None:
    fleet = Fleet(2, 2, info={"prefix_cache": "silent", "num_blocks": 20}, **REMOTE)
    first = fleet.decide(160)
    fleet.router.begin(request(160), first).end()
    again = fleet.decide(160)
    assert again.serving.replica == first.serving.replica
    assert again.serving.cached_tokens == 144
    for number in range(1, 60):  # far more than both hold: which gets one is drawn
        fleet.router.begin(request(160, 1000 * number), fleet.decide(160, start=1000 * number)).end()
    assert fleet.decide(160).serving.cached_tokens == 0


def test_a_prefill_that_fell_back_on_decode_teaches_nothing() -> None:
    fleet = Fleet(1, 1)
    decision = fleet.decide()
    in_flight = fleet.router.begin(request(), decision)
    in_flight.first_token(PrefillReport("local", "prefill_failed", None, "d0", 0, 0, ""), 1.0)
    assert where(fleet.decide()) == ("remote", "unmeasured")


def test_a_first_token_that_did_not_wait_for_the_kv_counts_as_moved_at_no_cost() -> None:
    fleet = Fleet(1, 1, **REMOTE)
    for number, length in enumerate((64, 8192) * 12):
        decision = fleet.decide(length, start=100_000 * number)
        report = PrefillReport("remote", "", "p0", "d0", 0, None, "", 0.01, prefill_cached_tokens=0)
        in_flight = fleet.router.begin(request(length, 100_000 * number), decision)
        in_flight.first_token(report, 0.015)
        in_flight.end()
    assert fleet.decide(8192, start=9).predicted.remote_s == pytest.approx(0.015, rel=0.3)


def test_an_explanation_names_the_next_best_of_each_pool() -> None:
    fleet = Fleet(6, 6, **REMOTE)
    decision = fleet.decide(hints=RoutingHints(explain=True))
    assert decision.prefill is not None
    chosen = {"prefill": decision.prefill.replica, "decode": decision.serving.replica}
    assert {role: len(others) for role, others in decision.others.items()} == {"prefill": 3, "decode": 3}
    for role, others in decision.others.items():
        assert chosen[role] not in [other.replica for other in others]
    assert fleet.decide().others == {}
    assert set(decision.serving.scores) == {"prefix", "queue", "affinity", "batch", "kv", "topology"}
    assert set(decision.prefill.scores) == {"prefix", "queue", "affinity"}
