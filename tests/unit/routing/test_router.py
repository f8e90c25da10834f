"""Which replicas serve a request and where its prompt is prefilled, and what the router learns from how it went."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest, NoReplica
from app.messages import PrefillKind, PrefillReport
from app.routing.capacity import MIN_BATCH
from app.routing.decision import Decision, RoutingHints, Wait
from app.routing.ejection import FIRST_EJECTION_S, STRONG
from app.routing.learnt_ratio import PATIENCE, WINDOW
from app.routing.router import NO_HINTS
from app.routing.times import BASE_S
from tests.unit.routing.fleet import PACE, REMOTE, Fleet, where
from tests.unit.routing.samples import replica_info, request

TIMED: dict[str, Any] = {"info": {"pace": PACE}}


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
    assert fleet.lacks(160) == "decode"


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
    fleet.router.ejections.failed("d0", STRONG, fleet.clock())
    assert {fleet.decide(start=1000 * n).serving.replica for n in range(10)} == {"d1"}
    fleet.clock.advance(FIRST_EJECTION_S)
    assert {fleet.decide(start=1000 * n).serving.replica for n in range(20)} == {"d0", "d1"}


def test_a_pair_over_which_no_kv_came_is_avoided_whatever_its_ends_have_cached() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    for role, replica in (("prefill", "p0"), ("decode", "d0")):
        fleet.cache(role, replica, 160)
    pair = fleet.decide()
    assert (pair.prefill and pair.prefill.replica, pair.serving.replica) == ("p0", "d0")
    fleet.router.ejections.pair_failed("p0", "d0", STRONG, fleet.clock())
    for _ in range(10):
        decision = fleet.decide()
        assert decision.prefill is not None
        assert (decision.prefill.replica, decision.serving.replica) != ("p0", "d0")
        receiver = fleet.router.receiver(request(), NO_HINTS, (), pair)
        assert receiver.replica == "d1"


def test_a_pair_that_is_ejected_is_better_than_none() -> None:
    fleet = Fleet(1, 1, can_decode_prefill=False)
    fleet.router.ejections.pair_failed("p0", "d0", STRONG, fleet.clock())
    assert fleet.decide().serving.replica == "d0"


def test_one_request_at_a_time_tries_what_is_half_open() -> None:
    fleet = Fleet(0, 2, has_prefill=False)
    fleet.cache("decode", "d0", 160)
    fleet.router.ejections.failed("d0", STRONG, fleet.clock())
    fleet.clock.advance(FIRST_EJECTION_S)
    probe = fleet.decide()
    assert probe.serving.replica == "d0"
    in_flight = fleet.router.begin(request(), probe)
    assert fleet.decide().serving.replica == "d1"
    in_flight.end()
    assert fleet.decide().serving.replica == "d0"
    in_flight = fleet.router.begin(request(), probe)
    fleet.router.ejections.succeeded("d0", in_flight.began_at)
    assert {fleet.decide().serving.replica for _ in range(10)} == {"d0"}
    in_flight.end()


def test_lost_replicas_are_never_chosen_again() -> None:
    fleet = Fleet(2, 2, **REMOTE)
    assert {fleet.decide(lost=["d0"]).serving.replica for _ in range(10)} == {"d1"}
    assert {fleet.decide(lost=["d0", "d1", "p0"]).serving.replica for _ in range(10)} == {"p1"}
    with pytest.raises(NoReplica, match="decode"):
        fleet.decide(lost=["d0", "d1", "p0", "p1"])


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
    assert where(Fleet(1, 1).decide(**fields)) == expected


def test_it_goes_where_the_first_token_is_predicted_sooner() -> None:
    fleet = Fleet(1, 1, **TIMED)
    assert where(fleet.decide(100)) == ("local", "faster")  # the same speed, and nothing to hand over
    fleet.cache("prefill", "p0", 6400)
    decision = fleet.decide(6400)
    assert where(decision) == ("remote", "faster")  # 6,384 tokens need not be computed there
    assert decision.predicted_ttft_s == pytest.approx(PACE.prompt_s(6400, 6384) + BASE_S)
    fleet.cache("decode", "d0", 6400)
    assert where(fleet.decide(6400)) == ("local", "faster")


def test_a_long_prompt_leaves_decode_free_where_both_ways_are_nearly_as_quick() -> None:
    assert where(Fleet(1, 1, **TIMED).decide(6400)) == ("remote", "faster")


def test_a_queue_before_prefill_makes_local_prefill_the_sooner() -> None:
    fleet = Fleet(1, 1, **TIMED)
    assert where(fleet.decide(1000)) == ("remote", "faster")
    for num_queued in (500, 100_000):
        fleet.load("prefill", "p0", 3, num_queued)
        assert where(fleet.decide(1000)) == ("local", "faster")


def test_what_was_learnt_of_a_way_decides_between_ways_that_are_equal_by_the_pace() -> None:
    fleet = Fleet(1, 1, **TIMED)
    for number in range(WINDOW):
        remote = fleet.decide(1000, start=10_000 * number, prefill_mode="remote")
        fleet.serve(remote, 1000, 3 * PACE.prompt_s(1000) + BASE_S, prefill_s=3 * PACE.prompt_s(1000))
    assert where(fleet.decide(1000)) == ("local", "faster")
    local = fleet.decide(1000, prefill_mode="local")
    for _ in range(WINDOW):
        fleet.serve(local, 1000, 5 * PACE.prompt_s(1000))
    assert where(fleet.decide(1000)) == ("remote", "faster")


def test_what_running_sequences_would_lose_counts() -> None:
    fleet = Fleet(1, 1, **TIMED)
    fleet.load("prefill", "p0", 1, 500)
    assert where(fleet.decide(1000)) == ("local", "faster")
    fleet.load("decode", "d0", 4, 0, 0)
    decision = fleet.decide(1000, hints=RoutingHints(explain=True))
    assert where(decision) == ("remote", "faster")
    (local,) = [way for way in decision.ways if way.kind == "local"]
    assert local.interference_s == pytest.approx(4 * (PACE.prompt_s(1000) - fleet.router.capacity.itl_s))
    assert where(fleet.decide(100)) == ("local", "faster")  # 20 ms are within the promised 50 ms
    assert fleet.decide(100).way.interference_s == 0


def test_all_ways_are_told_if_an_explanation_was_asked_for() -> None:
    fleet = Fleet(1, 1, **TIMED)
    decision = fleet.decide(hints=RoutingHints(explain=True), waited_s=0.25)
    assert [way.kind for way in decision.ways] == ["remote", "local"]
    assert decision.way in decision.ways
    assert decision.waited_s == 0.25
    assert fleet.decide().ways == []


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
    fleet.load("decode", "d0", 50, 0, 900)
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
    fleet = Fleet(1, 1, 2, can_decode_prefill=False, **TIMED)
    decision = fleet.decide(100)
    assert (*where(decision), decision.serving_role) == ("local", "faster", "aggregated")
    assert decision.serving.replica in ("a0", "a1")
    fleet.cache("aggregated", "a1", 6400)
    assert fleet.decide(6400).serving.replica == "a1"
    fleet.cache("prefill", "p0", 6400)
    fleet.load("aggregated", "a1", 1, 9000)
    assert where(fleet.decide(6400)) == ("remote", "faster")


def test_the_aggregated_pool_serves_what_the_others_cannot() -> None:
    assert where(Fleet(0, 1, 1, can_decode_prefill=False).decide()) == ("local", "no_prefill_replica")
    assert where(Fleet(1, 0, 1, can_decode_prefill=False).decide()) == ("local", "no_decode_replica")
    assert where(Fleet(1, 1, 0, can_decode_prefill=False).decide()) == ("remote", "only_way")


def test_a_request_that_lost_all_of_the_aggregated_pool_is_prefilled_remotely() -> None:
    fleet = Fleet(1, 1, 1, can_decode_prefill=False)
    assert where(fleet.decide(lost=["a0"])) == ("remote", "only_way")
    assert where(fleet.decide(lost=["a0"], prefill_mode="remote")) == ("remote", "requested")
    with pytest.raises(NoReplica, match="aggregated"):
        fleet.decide(lost=["a0"], prefill_mode="local")


def test_where_decode_can_prefill_it_takes_what_the_aggregated_pool_lost() -> None:
    decision = Fleet(1, 1, 1).decide(lost=["a0"], prefill_mode="local")
    assert (*where(decision), decision.serving.replica) == ("local", "requested", "d0")


# Room


def busy(fleet: Fleet, *prefill: str) -> None:
    """Have prefill replicas tell of more work than any prompt may wait for there."""
    for replica in prefill:
        fleet.load("prefill", replica, 9, 1_000_000)


def full(fleet: Fleet, role: Any, *replicas: str) -> None:
    """Have replicas tell that there is no KV memory left."""
    for replica in replicas:
        fleet.load(role, replica, MIN_BATCH, 0, 1000)


def test_a_prompt_waits_for_a_prefill_replica_that_will_soon_be_free() -> None:
    fleet = Fleet(2, 1, **REMOTE, **TIMED)
    busy(fleet, "p0", "p1")
    assert fleet.lacks() == "prefill"
    fleet.load("prefill", "p1", 1, 1000)
    decision = fleet.decide()
    assert decision.prefill is not None
    assert decision.prefill.replica == "p1"


def test_a_busy_replica_is_passed_over_unless_what_it_has_cached_saves_more_than_the_wait() -> None:
    fleet = Fleet(2, 1, **REMOTE, **TIMED)
    fleet.cache("prefill", "p0", 6400)
    fleet.load("prefill", "p0", 1, 4000)
    cached, other = fleet.decide(6400).prefill, fleet.decide(6400, start=100_000).prefill
    assert cached is not None
    assert other is not None
    assert (cached.replica, other.replica) == ("p0", "p1")
    busy(fleet, "p0")
    passed_over = fleet.decide(6400).prefill
    assert passed_over is not None
    assert passed_over.replica == "p1"


def test_an_idle_replica_takes_a_prompt_of_any_length() -> None:
    assert where(Fleet(1, 1, **REMOTE, **TIMED).decide(50_000)) == ("remote", "configured")
    assert where(Fleet(0, 1, has_prefill=False, **TIMED).decide(50_000)) == ("local", "aggregated")


def test_a_demanded_way_without_room_is_waited_for_and_not_changed() -> None:
    fleet = Fleet(1, 1, **TIMED)
    busy(fleet, "p0")
    assert fleet.lacks(prefill_mode="remote") == "prefill"
    assert where(fleet.decide()) == ("local", "faster")
    fleet.load("decode", "d0", 3, 1_000_000)
    assert fleet.lacks(prefill_mode="local") == "prefill"


def test_where_only_one_kind_of_pool_serves_requests_wait_for_it() -> None:
    fleet = Fleet(0, 1, has_prefill=False, **TIMED)
    full(fleet, "decode", "d0")
    assert fleet.lacks() == "decode"
    fleet.load("decode", "d0", 1, 1_000_000)
    assert fleet.lacks() == "prefill"


def test_what_a_waiting_request_is_predicted_to_take_is_its_quickest_way() -> None:
    fleet = Fleet(1, 1, can_prefill_decode=False, **TIMED)
    full(fleet, "decode", "d0")
    wait = fleet.choose(100)
    assert isinstance(wait, Wait)
    assert wait.alone_s == pytest.approx(PACE.prompt_s(100))


def test_sequences_that_decode_are_not_disturbed_beyond_their_promise_if_prefill_can_do_it() -> None:
    fleet = Fleet(1, 1, **TIMED)
    assert where(fleet.decide(100)) == ("local", "faster")
    # All of the time is spoken for: by steps and by prompts.
    fleet.load("decode", "d0", 4, prefill_share=1 - PACE.step_s(4, 0) / fleet.router.capacity.itl_s)
    assert where(fleet.decide(100)) == ("remote", "faster")  # at once
    assert where(fleet.decide(100, prefill_mode="local")) == ("local", "requested")


# A prefill replica that serves whole sequences


def test_if_decode_is_full_a_prefill_replica_serves_the_sequence() -> None:
    fleet = Fleet(2, 2, **TIMED)
    full(fleet, "decode", "d0", "d1")
    decision = fleet.decide()
    assert (*where(decision), decision.serving_role, decision.prefill) == ("local", "decode_full", "prefill", None)
    assert decision.serving.replica in ("p0", "p1")
    fleet.load("decode", "d1", 1, 0, 10)
    assert fleet.decide().serving_role == "decode"


def test_one_that_serves_sequences_already_takes_the_next_one() -> None:
    fleet = Fleet(4, 1, **TIMED)
    full(fleet, "decode", "d0")
    fleet.load("prefill", "p2", 3, 0, 30, decoding=3)
    assert {fleet.decide(start=1000 * number).serving.replica for number in range(20)} == {"p2"}
    fleet.load("prefill", "p2", MIN_BATCH, 0, 1000, decoding=MIN_BATCH)
    assert "p2" not in {fleet.decide(start=1000 * number).serving.replica for number in range(20)}


def test_it_does_not_where_its_engine_cannot_or_if_nothing_else_is_asked_for_than_decode() -> None:
    unable = Fleet(1, 1, can_prefill_decode=False, **TIMED)
    full(unable, "decode", "d0")
    assert unable.lacks() == "decode"
    able = Fleet(1, 1, **TIMED)
    full(able, "decode", "d0")
    for mode in ("local", "remote"):
        assert able.lacks(prefill_mode=mode) == "decode"


WITHOUT_DECODE = ("local", "no_decode_replica", "prefill")


def who(decision: Decision) -> tuple[str, str, str]:
    return decision.kind, decision.reason, decision.serving_role


@pytest.mark.parametrize("policy", ["remote", "predicted", "thresholds"])
def test_without_decode_prefill_replicas_serve_whatever_was_asked_for(policy: str) -> None:
    fleet = Fleet(2, 1, placement={"policy": policy}, **TIMED)
    asked: list[dict[str, Any]] = [
        {},
        {"prefill_mode": "local"},
        {"prefill_mode": "remote"},
        {"sampling": {"prompt_logprobs": 1}},
        {"num_replayed": 5},
    ]
    assert all(fleet.decide(**fields).serving_role == "decode" for fields in asked)
    assert {who(fleet.decide(lost=["d0"], **fields)) for fields in asked} == {WITHOUT_DECODE}
    fleet.router.ejections.failed("d0", STRONG, fleet.clock())
    assert {who(fleet.decide(**fields)) for fields in asked} == {WITHOUT_DECODE}
    fleet.router.pools["decode"].leave("d0")
    assert {who(fleet.decide(**fields)) for fields in asked} == {WITHOUT_DECODE}
    fleet.join("decode", "d1")
    assert {fleet.decide(**fields).serving.replica for fields in asked} == {"d1"}


def test_without_decode_they_share_the_load_and_what_has_no_room_waits() -> None:
    fleet = Fleet(2, 0, **TIMED)
    fleet.load("prefill", "p0", 3, 2000, 30, decoding=3)
    assert {fleet.decide(start=1000 * number).serving.replica for number in range(20)} == {"p1"}
    fleet.load("prefill", "p1", MIN_BATCH, 0, 1000, decoding=MIN_BATCH)
    assert fleet.decide().serving.replica == "p0"
    fleet.load("prefill", "p0", MIN_BATCH, 0, 1000, decoding=MIN_BATCH)
    assert fleet.lacks() == "decode"
    busy(fleet, "p0", "p1")
    assert fleet.lacks() == "prefill"


def test_without_decode_links_do_not_matter_and_an_ejected_prefill_replica_is_passed_over() -> None:
    fleet = Fleet(2, 1, **TIMED)
    fleet.link("d0", p0="broken", p1="broken")
    fleet.router.ejections.failed("p0", STRONG, fleet.clock())
    for _ in range(10):
        assert fleet.decide(lost=["d0"]).serving.replica == "p1"
    assert fleet.decide(lost=["d0", "p1"]).serving.replica == "p0"


def test_the_aggregated_pool_serves_without_decode_and_prefill_what_has_no_room_there() -> None:
    fleet = Fleet(1, 0, 1, **TIMED)
    assert who(fleet.decide()) == ("local", "no_decode_replica", "aggregated")
    full(fleet, "aggregated", "a0")
    assert who(fleet.decide()) == WITHOUT_DECODE


@given(
    st.lists(st.sampled_from(["prefill", "decode", "aggregated"]), max_size=6),
    st.sets(st.integers(0, 5)),
    st.sets(st.integers(0, 5)),
    st.sampled_from(["auto", "local", "remote"]),
    st.sampled_from(["remote", "predicted", "thresholds"]),
    st.booleans(),
)
def test_as_long_as_any_replica_can_be_reached_it_serves(
    roles: list[Any], lost: set[int], ejected: set[int], mode: str, policy: str, is_linked: bool
) -> None:
    """One that is ejected serves only if all are; one that this request has lost never does."""
    fleet = Fleet(0, 0, 0, placement={"policy": policy}, **TIMED)
    names = [f"{role}{number}" for number, role in enumerate(roles)]
    for role, name in zip(roles, names, strict=True):
        fleet.join(role, name)
        if role == "decode" and not is_linked:
            fleet.link(name)
    for number in ejected & set(range(len(names))):
        fleet.router.ejections.failed(names[number], STRONG, fleet.clock())
    left = [name for number, name in enumerate(names) if number not in lost]
    asked: dict[str, Any] = {"lost": set(names) - set(left), "prefill_mode": mode}
    if not left:
        with pytest.raises(NoReplica):
            fleet.decide(**asked)
        return
    decision = fleet.decide(**asked)
    ends = {decision.serving.replica} | ({decision.prefill.replica} if decision.prefill else set())
    assert ends <= set(left)
    if sound := [name for name in left if not fleet.router.ejections.is_ejected(name)]:
        assert ends <= set(sound)


def test_a_prefill_replica_that_has_no_room_either_lets_it_wait() -> None:
    fleet = Fleet(1, 1, **TIMED)
    full(fleet, "decode", "d0")
    full(fleet, "prefill", "p0")
    fleet.load("prefill", "p0", MIN_BATCH, 0, 1000, decoding=MIN_BATCH)
    assert fleet.lacks() == "decode"


def test_prompts_for_decode_go_past_a_prefill_replica_whose_sequences_could_not_bear_them() -> None:
    fleet = Fleet(2, 1, **REMOTE, **TIMED)
    fleet.load("prefill", "p0", 4, decoding=4, prefill_share=0.9)
    chosen = [fleet.decide(1000, start=10_000 * number).prefill for number in range(20)]
    assert {prefill.replica for prefill in chosen if prefill} == {"p1"}
    fleet.load("prefill", "p1", 4, decoding=4, prefill_share=0.9)
    assert fleet.lacks(1000) == "prefill"


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


@pytest.mark.parametrize("learner", ["learn_local", "learn_remote"])
def test_learning_that_fails_ends_no_sequence_and_leaves_no_load_behind(
    monkeypatch: pytest.MonkeyPatch, learner: str
) -> None:
    fleet = Fleet(1, 1, **REMOTE)
    monkeypatch.setattr(fleet.router.predictor, learner, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(fleet.router.pools["decode"], "assume", lambda *_: 1 / 0)
    monkeypatch.setattr(fleet.router.pools["prefill"], "assume", lambda *_: 1 / 0)
    kind: PrefillKind = "local" if learner == "learn_local" else "remote"
    in_flight = fleet.router.begin(request(160), fleet.decide(160, prefill_mode=kind))
    in_flight.first_token(PrefillReport(kind, "", "p0", "d0", 0, 160, ""), 0.1)
    assert fleet.router.pools["decode"].replicas["d0"].decoding.value == 1
    in_flight.end()
    states = [state for pool in fleet.router.pools.values() for state in pool.replicas.values()]
    assert {gauge.value for state in states for gauge in (state.sequences, state.queued_tokens)} == {0}


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


def test_a_sequence_that_a_prefill_replica_serves_counts_as_decoding_there_from_its_start() -> None:
    fleet = Fleet(1, 1, **TIMED)
    full(fleet, "decode", "d0")
    state = fleet.router.pools["prefill"].replicas["p0"]
    gauges = [state.sequences, state.queued_tokens, state.used_blocks, state.decoding]
    in_flight = fleet.router.begin(request(160), fleet.decide(160))
    assert [gauge.value for gauge in gauges] == [1, 160, 10, 1]
    assert state.compute_s.value == pytest.approx(PACE.compute_s(160))
    in_flight.first_token(PrefillReport("local", "", None, "p0", 0, 0, ""), 0.1)
    assert [gauge.value for gauge in gauges] == [1, 0, 10, 1]
    in_flight.end()
    assert [gauge.value for gauge in gauges] == [0, 0, 0, 0]


def test_a_sequence_that_moves_counts_on_its_new_replica_only() -> None:
    fleet = Fleet(1, 2, **REMOTE)
    states = fleet.router.pools["decode"].replicas
    in_flight = fleet.router.begin(request(160), fleet.decide(160))
    (other,) = states.keys() - {in_flight.serving.replica}
    (receiver,) = [
        c
        for c in fleet.decide(160, hints=RoutingHints(explain=True)).others["decode"] + [fleet.decide(160).serving]
        if c.replica == other
    ][:1]
    before = in_flight.serving.replica
    in_flight.move(receiver)
    assert in_flight.serving.replica == other
    assert [(states[r].sequences.value, states[r].used_blocks.value) for r in (before, other)] == [(0, 0), (1, 10)]
    in_flight.first_token(None, 0.1)
    assert [states[r].decoding.value for r in (before, other)] == [0, 1]
    in_flight.end()
    assert [(states[r].sequences.value, states[r].decoding.value) for r in (before, other)] == [(0, 0), (0, 0)]


def test_the_receiver_of_a_prefill_is_the_best_by_then_and_the_first_choice_where_none_has_room() -> None:
    fleet = Fleet(1, 3, **REMOTE)
    fleet.load("decode", "d1", 3)
    fleet.load("decode", "d2", 3)
    decision = fleet.decide()
    assert decision.serving.replica == "d0"
    full(fleet, "decode", "d0")
    fleet.link("d1")  # nothing gets there
    assert fleet.router.receiver(request(), RoutingHints(), (), decision).replica == "d2"
    assert fleet.router.receiver(request(), RoutingHints(), ["d2"], decision).replica == "d0"
    full(fleet, "decode", "d2")
    assert fleet.router.receiver(request(), RoutingHints(), (), decision).replica == "d0"


def test_a_prefill_that_fell_back_on_decode_teaches_nothing() -> None:
    fleet = Fleet(1, 1, **TIMED)
    before = fleet.router.predictor.ratios()
    in_flight = fleet.router.begin(request(), fleet.decide(prefill_mode="remote"))
    in_flight.first_token(PrefillReport("local", "prefill_failed", None, "d0", 0, 0, ""), 1.0)
    in_flight.end()
    assert fleet.router.predictor.ratios() == before


def test_what_waited_before_a_prompt_is_no_slowness_of_its_replica() -> None:
    fleet = Fleet(1, 1, **TIMED)
    fleet.load("prefill", "p0", 1, 2000)
    decision = fleet.decide(1000, prefill_mode="remote")
    state = fleet.router.pools["prefill"].replicas["p0"]
    prefill_s = state.queue_s + PACE.prompt_s(1000)
    assert decision.predicted_ttft_s == pytest.approx(prefill_s + BASE_S)
    fleet.serve(decision, 1000, prefill_s + 2 * BASE_S, prefill_s=prefill_s)
    learnt = {"prefill": pytest.approx(1), "handover": pytest.approx(2), "local": 1, "pull": 1}
    assert fleet.router.predictor.ratios() == learnt


def test_a_first_token_that_did_not_wait_for_the_kv_takes_no_longer_for_a_long_prompt() -> None:
    fleet = Fleet(1, 1, **REMOTE, **TIMED)
    for number, length in enumerate((64, 8192) * 12):
        decision = fleet.decide(length, start=100_000 * number)
        prefill_s = PACE.prompt_s(length)
        report = PrefillReport("remote", "", "p0", "d0", 0, None, "", prefill_s, prefill_cached_tokens=0)
        in_flight = fleet.router.begin(request(length, 100_000 * number), decision)
        in_flight.first_token(report, prefill_s + 0.005)
        in_flight.end()
    assert fleet.decide(8192, start=9).predicted_ttft_s == pytest.approx(PACE.prompt_s(8192) + 0.005)


def test_where_kv_moves_slowly_prompts_stay_where_they_are_decoded() -> None:
    """30,000 tokens that move by TCP take 8 s, which no first token by prefill makes up for."""
    fleet = Fleet(1, 1, **TIMED)
    decision = fleet.decide(30_000, prefill_mode="remote")
    assert decision.way.pull_s == 0
    in_flight = fleet.router.begin(request(30_000), decision)
    in_flight.pulled(30_000, 8.2)
    in_flight.end()
    ways = fleet.decide(30_000, start=100_000, hints=RoutingHints(explain=True))
    assert ways.kind == "local"
    assert [(way.kind, way.serving_role) for way in ways.ways] == [
        ("remote", "decode"),
        ("local", "decode"),
        ("local", "prefill"),
    ]
    assert ways.ways[0].pull_s == pytest.approx(8.2, rel=0.1)


def test_the_nodes_between_which_kv_moves_slowly_are_far_apart() -> None:
    fleet = Fleet(1, 0, **REMOTE, **TIMED)
    seconds = {"near": 0.1, "far": 5.0}
    for node in seconds:
        fleet.join("decode", node, pace=PACE, node_ip=node)
    for node, other in (("near", "far"), ("far", "near")) * 5:
        in_flight = fleet.router.begin(request(8192), fleet.decide(8192, lost=[other]))
        in_flight.pulled(8192, seconds[node])
        in_flight.end()
    prefill_node = fleet.router.pools["prefill"].replicas["p0"].info.node_ip
    nearness = fleet.router.topology.nearness(prefill_node, list(seconds))
    assert nearness["near"] > 2 * nearness["far"]


def test_a_way_that_was_slow_is_tried_again_by_the_requests_that_avoided_it() -> None:
    fleet = Fleet(1, 1, **TIMED)
    fleet.cache("prefill", "p0", 6400)
    for _ in range(WINDOW):
        fleet.serve(fleet.decide(6400, prefill_mode="remote"), 6400, 30.0, prefill_s=20.0)
    kinds = []
    for _ in range(PATIENCE + 2):
        decision = fleet.decide(6400, start=0)
        kinds.append(decision.kind)
        fleet.serve(decision, 6400, decision.predicted_ttft_s)
    assert "remote" in kinds


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
