"""`python -m benchmarks.routing`: the fleet in virtual time keeps its books, and its times are those of the profile."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from typer.testing import CliRunner

from app.bench.workload import MOONCAKE_BLOCK_TOKENS, Request
from app.config import RemotePlacement, RoutingConfig, SloConfig
from app.engines.sim.profile import LatencyTimes, PrefillTimes, SimProfile, StepTimes, TransferTimes
from app.messages import GenerateRequest, KvUpdate, PrefillReport, ReplicaInfo, ReplicaLoad, Role
from app.recent_load import FIRST_WINDOW_S
from app.routing.pool_state import PoolState
from app.routing.router import Router
from benchmarks.routing.__main__ import bench_routing
from benchmarks.routing.decision_time import measure_decisions
from benchmarks.routing.fleet import Fleet, FleetResult, prompt_tokens, spread_out
from benchmarks.routing.oracle import oracle_hit_rate
from benchmarks.routing.policies import Baton, FleetAssignment, Policy, PowerOfTwo, Refuse, RoundRobin, Start
from benchmarks.routing.replica import FleetSpec
from benchmarks.routing.timeline import Timeline

PROFILE = SimProfile(
    source="made up",
    prefill=PrefillTimes(base_s=0.010, per_token_s=1e-4, per_token_squared_s=1e-8),
    step=StepTimes(base_s=0.005, per_sequence_s=1e-4, per_kv_token_s=1e-6),
    transfer=TransferTimes(base_s=0.001, bytes_per_s=1e9),
    latency=LatencyTimes(engine_s=0.004, prefill_call_s=0.003, delivery_s=0.002),
    kv_bytes_per_token=1000,
)
ENGINE_S, CALL_S, DELIVERY_S = (
    PROFILE.latency.engine_s,
    PROFILE.latency.prefill_call_s,
    PROFILE.latency.delivery_s,
)
REMOTE = RoutingConfig(placement=RemotePlacement(policy="remote"))
POLICIES = ["round robin", "power of two", "remote", "predicted", "local"]


def make_spec(**changes: Any) -> FleetSpec:
    fields = {"num_prefill": 2, "num_decode": 2, "num_blocks": 128, "block_size": 64, "max_model_len": 8192}
    return FleetSpec(profile=PROFILE, **{**fields, **changes})


class Local:
    """All on the first decode replica, which prefills; notes what it is told."""

    def __init__(self) -> None:
        self.pools: Mapping[Role, PoolState] = {}
        self.reports: list[PrefillReport] = []

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        start(FleetAssignment(None, "decode-0", first_token=self.reports.append, end=lambda: None))


def make_policy(name: str, spec: FleetSpec, timeline: Timeline) -> Policy:
    pools = spec.names("prefill"), spec.names("decode")
    makers: dict[str, Callable[[], Policy]] = {
        "round robin": lambda: RoundRobin(*pools),
        "power of two": lambda: PowerOfTwo(*pools, seed=0),
        "remote": lambda: Baton(REMOTE, SloConfig(), timeline),
        "predicted": lambda: Baton(RoutingConfig(), SloConfig(), timeline),
        "local": Local,
    }
    return makers[name]()


def serve(requests: list[Request], policy: str = "round robin", **changes: Any) -> tuple[FleetResult, Fleet]:
    spec, timeline = make_spec(**changes), Timeline()
    random.seed(0)
    fleet = Fleet(spec, lambda: make_policy(policy, spec, timeline), timeline)
    return fleet.run(requests), fleet


def request(at_s: float, numbers: list[int], last: int = MOONCAKE_BLOCK_TOKENS, output_tokens: int = 3) -> Request:
    """A prompt of the pieces with these numbers, the last one `last` tokens long."""
    lengths = [MOONCAKE_BLOCK_TOKENS] * (len(numbers) - 1) + [last]
    return Request(at_s, list(zip(numbers, lengths, strict=True)), output_tokens)


def conversations(num: int, num_turns: int, gap_s: float) -> list[Request]:
    """Each turn's prompt is the last one's and two blocks more; all begin with the same block, and two come at once."""
    turns = (
        request(turn * gap_s + index // 2 * 0.01, [0, *range(100 * index + 1, 100 * index + 3 + 2 * turn)], last=300)
        for index in range(num)
        for turn in range(num_turns)
    )
    return sorted(turns, key=lambda each: each.at_s)


@st.composite
def loads(draw: st.DrawFn) -> list[Request]:
    """Up to a dozen requests that share prefixes and come close to one another."""
    numbers = st.lists(st.integers(0, 3), min_size=1, max_size=8)
    requests = st.builds(
        request, st.floats(0, 0.5), numbers, st.integers(1, MOONCAKE_BLOCK_TOKENS), st.integers(1, 100)
    )
    return sorted(draw(st.lists(requests, min_size=1, max_size=12)), key=lambda each: each.at_s)


@pytest.mark.parametrize("policy", POLICIES)
@given(load=loads())
@settings(max_examples=25, deadline=None)
def test_every_request_ends_once_and_gives_its_blocks_back(policy: str, load: list[Request]) -> None:
    result, fleet = serve(load, policy)
    assert result.num_ended == len(result.ttft_s) == len(load)
    assert len(result.itl_s) == sum(each.output_tokens - 1 for each in load)
    assert result.prompt_tokens == sum(each.input_tokens for each in load)
    for replica in fleet.replicas.values():
        assert replica.scheduler.num_used_blocks == 0
        assert (replica.num_sequences, replica.queued_tokens) == (0, 0)


@pytest.mark.parametrize("policy", ["remote", "predicted"])
def test_what_the_router_believes_in_the_end_is_what_the_replicas_hold(policy: str) -> None:
    spec, timeline = make_spec(num_blocks=256), Timeline()
    router_policy = make_policy(policy, spec, timeline)
    fleet = Fleet(spec, lambda: router_policy, timeline)
    fleet.run(conversations(6, 5, gap_s=1.0))
    for role, pool in router_policy.pools.items():
        for name in spec.names(role):
            assert pool.index.num_blocks(name) == len(fleet.replicas[name].scheduler.pool.cached_hashes)
            assert pool.replicas[name].sequences.value == pool.replicas[name].queued_tokens.value == 0


@pytest.mark.parametrize("policy", ["power of two", "remote", "predicted"])
def test_the_same_seed_gives_the_same_times(policy: str) -> None:
    load = conversations(8, 4, gap_s=0.2)
    first, second = serve(load, policy)[0], serve(load, policy)[0]
    assert first == second


def test_the_hit_rate_of_one_replica_is_the_oracles_with_the_same_cache() -> None:
    load = [request(10.0 * n, [n % 3, n % 5, n % 7, n], last=400, output_tokens=1) for n in range(40)]
    result, _ = serve(load, num_prefill=1, num_decode=1, num_blocks=128)
    rate = oracle_hit_rate(load, block_size=64, num_blocks=128)
    assert result.cached_tokens / result.prompt_tokens == rate
    assert 0.1 < rate < oracle_hit_rate(load, block_size=64, num_blocks=None)


def test_the_unbounded_oracle_counts_what_came_before() -> None:
    load = [request(0, [1, 2]), request(1, [1, 2]), request(2, [1, 3]), request(3, [2, 1])]
    # The second prompt's last token has to be computed, so its last block of 64 tokens is; of the third 512 are cached.
    assert oracle_hit_rate(load, 64, None) == (1024 - 64 + 512) / 4096


def test_the_first_token_on_an_idle_fleet_takes_what_the_profile_says() -> None:
    result, _ = serve([request(5.0, [1, 2], last=488)])
    transfer_s = PROFILE.transfer_s(1024 * PROFILE.kv_bytes_per_token)  # blocks move whole
    assert list(result.ttft_s) == pytest.approx([CALL_S + ENGINE_S + PROFILE.prefill_s(1000) + DELIVERY_S])
    assert list(result.itl_s) == pytest.approx([transfer_s + PROFILE.step_s(1, 1001), PROFILE.step_s(1, 1002)])
    (outcome,) = result.outcomes
    assert (outcome.arrived_at, outcome.way) == (5.0, "remote")
    assert (outcome.ttft_s, outcome.tpot_s) == pytest.approx((result.ttft_s[0], sum(result.itl_s) / 2))
    assert result.end_s == pytest.approx(5.0 + result.ttft_s[0] + sum(result.itl_s))
    assert result.prefill_utilisation == pytest.approx(PROFILE.prefill_s(1000) / 2 / result.end_s)


def test_a_local_prefill_on_an_idle_fleet_takes_the_prompt_alone() -> None:
    result, _ = serve([request(0.0, [1, 2], last=488)], "local")
    assert list(result.ttft_s) == pytest.approx([ENGINE_S + PROFILE.prefill_s(1000)])
    assert (result.num_local, result.transferred_tokens) == (1, 0)


def test_only_the_tail_that_decode_lacks_is_transferred() -> None:
    load = [request(0.0, [1, 2]), request(10.0, [1, 2, 3]), request(20.0, [1, 2, 3])]
    result, _ = serve(load, num_prefill=1, num_decode=1)
    # Of the last one's 24 blocks prefill computes that of its last token.  Decode has them all.
    assert result.transferred_tokens == 1024 + 512
    assert result.cached_tokens == 0 + 1024 + 1536 - 64
    transfer_s = PROFILE.transfer_s(512 * PROFILE.kv_bytes_per_token)
    times = PROFILE.prefill
    prefill_s = times.base_s + times.per_token_s * 512 + times.per_token_squared_s * (1536**2 - 1024**2)
    assert result.ttft_s[1] == pytest.approx(CALL_S + ENGINE_S + prefill_s + DELIVERY_S)
    gaps = [transfer_s + PROFILE.step_s(1, 1537), PROFILE.step_s(1, 1538)]
    assert list(result.itl_s)[2:4] == pytest.approx(gaps)
    assert list(result.itl_s)[4:] == pytest.approx([PROFILE.step_s(1, 1537), PROFILE.step_s(1, 1538)])


def test_what_policies_are_told_is_what_took_place() -> None:
    spec, timeline, policy = make_spec(), Timeline(), Local()
    Fleet(spec, lambda: policy, timeline).run([request(0.0, [1]), request(9.0, [1, 2])])
    assert [report.cached_tokens for report in policy.reports] == [0, 512]


def test_a_hit_counts_where_the_prompt_is_computed() -> None:
    result, _ = serve([request(0.0, [1, 2]), request(9.0, [1, 2])], num_prefill=1, num_decode=2)
    assert (result.cached_tokens, result.transferred_tokens) == (1024 - 64, 2048)


def test_only_what_is_not_expected_to_be_cached_counts_as_queued() -> None:
    spec, timeline, queued = make_spec(num_prefill=1), Timeline(), list[int]()
    fleet = Fleet(spec, lambda: make_policy("remote", spec, timeline), timeline)
    for moment in (0.004, 9.004):
        timeline.at(moment, lambda: queued.append(fleet.replicas["prefill-0"].queued_tokens))
    fleet.run([request(0.0, [1, 2]), request(9.0, [1, 2, 3])])
    assert queued == [1024, 512]


def test_each_placement_is_told_once_of_its_first_token_and_of_its_end() -> None:
    spec, timeline, told = make_spec(), Timeline(), Counter[str]()

    class Recording(RoundRobin):
        def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
            name = request.request_id
            told_of = {
                "first_token": lambda report: told.update([f"first of {name}"]),
                "end": lambda: told.update([f"end of {name}"]),
            }
            super().arrive(request, lambda assignment: start(structs.replace(assignment, **told_of)), refuse)

    policy = Recording(spec.names("prefill"), spec.names("decode"))
    Fleet(spec, lambda: policy, timeline).run(conversations(3, 3, gap_s=0.1))
    assert told == Counter(f"{what} of {number}" for what in ("first", "end") for number in range(9))


def test_the_pool_state_has_the_load_one_message_later() -> None:
    spec, timeline, policy, seen = make_spec(), Timeline(), Local(), list[tuple[int, int]]()
    policy.pools = Router(RoutingConfig(), SloConfig(), has_prefill=False).pools
    fleet = Fleet(spec, lambda: policy, timeline)

    def poll() -> None:
        replica = policy.pools["decode"].replicas["decode-0"]
        seen.append((replica.sequences.value, replica.queued_tokens.value))

    end_s = ENGINE_S + PROFILE.prefill_s(512)
    for moment in (spec.message_s * 0.9, spec.message_s * 1.1, end_s + spec.message_s * 1.1, 9.0):
        timeline.at(moment, poll)
    fleet.run([request(0.0, [1])])
    assert seen == [(0, 0), (1, 512), (1, 0), (0, 0)]


def test_requests_of_one_moment_are_spread_until_the_next() -> None:
    load = [request(at_s, [1]) for at_s in (0.0, 0.0, 0.0, 3.0, 4.0, 4.0)]
    assert [each.at_s for each in spread_out(load)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.5]
    assert [each.at_s for each in spread_out(load[:2])] == [0.0, 0.0]


def test_prefill_keeps_blocks_until_decode_has_pulled_them() -> None:
    spec, timeline = make_spec(num_prefill=1, num_decode=1), Timeline()
    fleet = Fleet(spec, lambda: RoundRobin(spec.names("prefill"), spec.names("decode")), timeline)
    used: list[int] = []
    ready_s = CALL_S + ENGINE_S + PROFILE.prefill_s(1024)
    pulled_s = ready_s + DELIVERY_S + PROFILE.transfer_s(1024 * PROFILE.kv_bytes_per_token)
    for moment in (ready_s + 1e-6, pulled_s - 1e-6, pulled_s + 1e-6):
        timeline.at(moment, lambda: used.append(fleet.replicas["prefill-0"].scheduler.num_used_blocks))
    fleet.run([request(0.0, [1, 2])])
    assert used == [16, 16, 0]


def test_refused_requests_are_counted_and_leave_nothing() -> None:
    class Refusing(Local):
        def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
            if request.request_id == "1":
                refuse()
            else:
                super().arrive(request, start, refuse)

    timeline = Timeline()
    result = Fleet(make_spec(), Refusing, timeline).run([request(0.0, [n]) for n in range(3)])
    assert (result.num_refused, result.num_ended, len(result.ttft_s)) == (1, 2, 2)
    assert [outcome.way for outcome in result.outcomes] == [None, "on decode", "on decode"]


def test_round_robin_takes_turns_and_power_of_two_the_shorter_queue() -> None:
    in_turn = RoundRobin(["a", "b"], ["c"])
    assert [each.prefill for each in assignments(in_turn, 4)] == ["a", "b", "a", "b"]
    two = PowerOfTwo(["a", "b"], ["c", "d"], seed=0)
    placed = assignments(two, 4)
    assert sorted(each.prefill or "" for each in placed) == ["a", "a", "b", "b"]
    assert sorted(each.decode for each in placed) == ["c", "c", "d", "d"]
    for each in placed:
        if each.prefill == "a":
            each.first_token(None)  # type: ignore[arg-type]
    assert [each.prefill for each in assignments(two, 2)] == ["a", "a"]


def assignments(policy: Policy, num: int) -> list[FleetAssignment]:
    started: list[FleetAssignment] = []
    for _ in range(num):
        policy.arrive(GenerateRequest(request_id="", prompt_token_ids=[1], sampling={}), started.append, pytest.fail)
    return started


def test_equal_pieces_give_equal_tokens_and_others_differ() -> None:
    first, second = prompt_tokens(request(0, [7, 8])), prompt_tokens(request(0, [7, 9], last=10))
    assert len(first) == 1024
    assert first[:512] == second[:512]
    assert set(first[512:]).isdisjoint(second[512:])
    assert prompt_tokens(request(0, [8], last=10)) == first[512:522]


def test_decision_times_have_a_line_for_each_combination_that_is_possible() -> None:
    rows = list(measure_decisions([2, 4], [64, 256], [0, 1, 4], num_blocks=1000, repeat=3, seed=0))
    assert [(row.num_replicas, row.prompt_tokens, row.num_matching) for row in rows] == [
        *((2, length, num) for length in (64, 256) for num in (0, 1)),
        *((4, length, num) for length in (64, 256) for num in (0, 1, 4)),
    ]
    assert all(0 < row.hashing_us < row.p99_us and row.median_us <= row.p99_us for row in rows)


def write_trace(path: Path, load: list[Request]) -> Path:
    lines = (
        {
            "timestamp": each.at_s * 1000,
            "input_length": each.input_tokens,
            "output_length": each.output_tokens,
            "hash_ids": [number for number, _ in each.pieces],
        }
        for each in load
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_fleet_command_compares_all_policies(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl", conversations(6, 4, gap_s=2.0)), tmp_path / "out.json"
    options = ["--speed", "2", "--speed", "1", "--prefill", "2", "--decode", "2", "--limit", "20"]
    ran = CliRunner().invoke(bench_routing, ["fleet", "--trace", str(trace), *options, "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    report = json.loads(out.read_text())
    assert [(row["speed"], row["num_requests"]) for row in report["rows"]] == [(1.0, 20)] * 4 + [(2.0, 20)] * 4
    for name, row in zip(chain.from_iterable([POLICY_NAMES] * 2), report["rows"], strict=True):
        assert row["policy"] == name
        assert row["hit_rate"] <= report["oracles"]["unbounded"] + 1e-9
    assert report["rows"][0]["ttft_mean_ratio"] == 1.0
    assert report["rows"][4]["prefill_busy"] > 1.5 * report["rows"][0]["prefill_busy"]
    assert "baton, predicted" in ran.stdout
    assert "aims: baton, remote at speed 1: hit rate, aim 95%: " in ran.stdout


POLICY_NAMES = ("round robin", "power of two", "baton, remote", "baton, predicted")


def test_the_fleet_command_finds_the_same_again(tmp_path: Path) -> None:
    trace, out = write_trace(tmp_path / "trace.jsonl", conversations(30, 3, gap_s=1.0)), tmp_path / "out.json"
    rows = []
    for option in ("--no-spread", "--no-spread", "--spread"):
        options = ["--trace", str(trace), "--speed", "10", "--prefill", "3", option, "--json", str(out)]
        ran = CliRunner().invoke(bench_routing, ["fleet", *options])
        assert ran.exit_code == 0, ran.output
        rows.append(json.loads(out.read_text())["rows"])
    assert rows[0] == rows[1] != rows[2]


def test_the_fleet_command_says_where_to_get_a_trace() -> None:
    ran = CliRunner().invoke(bench_routing, ["fleet"])
    assert "github.com/kvcache-ai/Mooncake" in str(ran.exception)


def test_the_decisions_command_prints_its_table(tmp_path: Path) -> None:
    options = ["--replicas", "64", "--tokens", "8000", "--matching", "1", "--matching", "2", "--blocks", "1000"]
    out = tmp_path / "out.json"
    ran = CliRunner().invoke(bench_routing, ["decisions", *options, "--repeat", "3", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert "aim: from 1 to 2 replicas that have it cached at most 2 times as long" in ran.stdout
    assert "aim: at 64 replicas and 8000 tokens, 1 with it cached, below 200 us" in ran.stdout


class Fixed:
    """Starts every request `wait_s` after it came, as `assignment` says; notes what it is told."""

    def __init__(self, timeline: Timeline, assignment: dict[str, Any], wait_s: float = 0.0) -> None:
        self.pools: Mapping[Role, PoolState] = {}
        self.reports: list[PrefillReport] = []
        self.requests: list[str] = []
        self._timeline = timeline
        self._assignment = assignment
        self._wait_s = wait_s

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        self.requests.append(request.request_id)
        assignment = FleetAssignment(first_token=self.reports.append, end=lambda: None, **self._assignment)
        self._timeline.after(self._wait_s, start, assignment)


def serve_fixed(
    load: list[Request], assignment: dict[str, Any], wait_s: float = 0.0, **changes: Any
) -> tuple[FleetResult, Fixed]:
    timeline = Timeline()
    policy = Fixed(timeline, assignment, wait_s)
    return Fleet(make_spec(**changes), lambda: policy, timeline).run(load), policy


def test_a_prefill_replica_can_serve_a_request_whole() -> None:
    result, policy = serve_fixed([request(0.0, [1, 2], last=488)], {"prefill": None, "decode": "prefill-1"})
    assert list(result.ttft_s) == pytest.approx([ENGINE_S + PROFILE.prefill_s(1000)])
    assert list(result.itl_s) == pytest.approx([PROFILE.step_s(1, 1001), PROFILE.step_s(1, 1002)])
    assert [outcome.way for outcome in result.outcomes] == ["on prefill"]
    assert [report.kind for report in policy.reports] == ["local"]


def test_decode_may_be_chosen_when_prefill_has_ended() -> None:
    chosen_at: list[float] = []
    timeline = Timeline()

    def choose() -> str:
        chosen_at.append(timeline.now)
        assert fleet.replicas["decode-0"].num_sequences == 0
        return "decode-1"

    policy = Fixed(timeline, {"prefill": "prefill-0", "decode": "decode-0", "choose_decode": choose})
    fleet = Fleet(make_spec(), lambda: policy, timeline)
    result = fleet.run([request(0.0, [1, 2])])
    assert chosen_at == pytest.approx([CALL_S + ENGINE_S + PROFILE.prefill_s(1024)])
    assert [report.decode_replica for report in policy.reports] == ["decode-1"]
    assert fleet.replicas["decode-1"].busy_s == pytest.approx(PROFILE.step_s(1, 1025) + PROFILE.step_s(1, 1026))
    assert result.transferred_tokens == 1024


def test_a_request_that_waits_counts_its_wait() -> None:
    result, _ = serve_fixed([request(1.0, [1])], {"prefill": None, "decode": "decode-0"}, wait_s=0.5)
    assert list(result.ttft_s) == pytest.approx([0.5 + ENGINE_S + PROFILE.prefill_s(512)])


def test_one_token_needs_no_kv_of_the_prompt() -> None:
    load = [request(0.0, [1, 2], output_tokens=1)]
    result, policy = serve_fixed(load, {"prefill": "prefill-0", "decode": "decode-0"})
    assert (result.transferred_tokens, result.num_ended, len(result.itl_s)) == (0, 1, 0)
    assert result.outcomes[0].tpot_s == 0
    (report,) = policy.reports
    assert (report.kind, report.transferred_tokens) == ("remote", None)
    assert report.prefill_s == pytest.approx(ENGINE_S + PROFILE.prefill_s(1024))


def test_the_first_use_of_an_engine_and_of_a_pair_is_slow() -> None:
    load = [request(10.0 * n, [10 * n, 10 * n + 1]) for n in range(2)]
    assignment = {"prefill": "prefill-0", "decode": "decode-0"}
    usual, _ = serve_fixed(load, assignment)
    cold, _ = serve_fixed(load, assignment, first_use_s=2.0)
    more_s = [slow - quick for slow, quick in zip(cold.ttft_s, usual.ttft_s, strict=True)]
    assert more_s == pytest.approx([2.0, 0.0])
    more_s = [slow - quick for slow, quick in zip(cold.itl_s, usual.itl_s, strict=True)]
    assert more_s == pytest.approx([2.0, 0.0, 0.0, 0.0])


def test_frontends_are_dealt_the_requests_in_turn_and_all_are_told() -> None:
    timeline, policies = Timeline(), list[Fixed]()

    def make() -> Fixed:
        policy = Fixed(timeline, {"prefill": None, "decode": "decode-0"})
        policy.pools = Router(RoutingConfig(), SloConfig(), has_prefill=False).pools
        policies.append(policy)
        return policy

    Fleet(make_spec(num_frontends=3), make, timeline).run([request(0.1 * n, [n]) for n in range(7)])
    assert [policy.requests for policy in policies] == [["0", "3", "6"], ["1", "4"], ["2", "5"]]
    for policy in policies:
        assert policy.pools["decode"].index.num_blocks("decode-0") == 7 * 8


class Listener:
    """A pool state that notes the loads that it is told, and when."""

    def __init__(self, timeline: Timeline) -> None:
        self.infos: list[ReplicaInfo] = []
        self.loads: list[tuple[float, ReplicaLoad]] = []
        self._timeline = timeline

    def join(self, info: ReplicaInfo) -> None:
        self.infos.append(info)

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        self.loads.append((self._timeline.now, load))

    def on_kv(self, replica: str, update: KvUpdate) -> None: ...


def listen(load: list[Request], assignment: dict[str, Any], role: Role, **changes: Any) -> Listener:
    """Return what the only replica of a pool says while it serves `load`."""
    timeline = Timeline()
    listener, policy = Listener(timeline), Fixed(timeline, assignment)
    policy.pools = {role: listener}  # type: ignore[dict-item]
    Fleet(make_spec(num_prefill=1, num_decode=1, **changes), lambda: policy, timeline).run(load)
    return listener


def test_replicas_tell_their_pace_or_a_wrong_one() -> None:
    for error in (1.0, 2.0):
        (info,) = listen([], {}, "decode", pace_error=error).infos
        assert info.pace is not None
        assert info.pace.prompt_s(3000, cached=1000) == pytest.approx(error * (0.010 + 0.2 + 8e6 * 1e-8))
        assert info.pace.queue_s(5000, 0.0) == pytest.approx(3 * error * 0.010)
        assert info.pace.step_s(3, 500) == pytest.approx(error * (0.005 + 3e-4 + 5e-4))


def test_a_replica_tells_its_load_when_it_changes_and_every_10_ms_until_it_is_gone() -> None:
    load = [request(0.0, [1, 2], output_tokens=4)]
    loads = listen(load, {"prefill": None, "decode": "decode-0"}, "decode").loads
    first_s = ENGINE_S + PROFILE.prefill_s(1024)
    end_s = first_s + sum(PROFILE.step_s(1, 1025 + n) for n in range(3))
    times = [moment - 0.001 for moment, _ in loads]
    assert times == pytest.approx([*(0.01 * n for n in range(13)), first_s, 0.13, 0.14, end_s, 0.15])
    compute_s = PROFILE.prefill_s(1024) - PROFILE.prefill.base_s
    assert [(each.sequences, each.queued_tokens, each.decoding) for _, each in loads] == [
        *[(1, 1024, 0)] * 13,
        *[(1, 0, 1)] * 3,
        *[(0, 0, 0)] * 2,
    ]
    assert [each.queued_s for _, each in loads] == pytest.approx([compute_s] * 13 + [0.0] * 5)
    shares = [each.prefill_share for _, each in loads]
    assert shares[:14] == sorted(shares[:14])
    assert shares[14:] == sorted(shares[14:], reverse=True)
    assert 0.04 < shares[13] < first_s / FIRST_WINDOW_S
    assert loads[-1][1].slowness == pytest.approx(1.0, abs=0.01)
    assert loads[-1][1].window_s < FIRST_WINDOW_S


def test_a_replica_whose_pace_is_told_too_slow_notices_that_it_is_quicker() -> None:
    load = [request(0.0, [1], output_tokens=600)]
    loads = listen(load, {"prefill": None, "decode": "decode-0"}, "decode", pace_error=2.0).loads
    assert 0.5 < min(each.slowness for _, each in loads) < 0.65


def test_what_comes_from_another_replica_is_no_prefill_and_decodes_once_its_kv_is_there() -> None:
    load = [request(0.0, [1, 2], output_tokens=4)]
    loads = listen(load, {"prefill": "prefill-0", "decode": "decode-0"}, "decode").loads
    assert {each.prefill_share for _, each in loads} == {0.0}
    second_token_s = (
        CALL_S
        + ENGINE_S
        + PROFILE.prefill_s(1024)
        + DELIVERY_S
        + PROFILE.transfer_s(1_024_000)
        + PROFILE.step_s(1, 1025)
    )
    began_s = next(moment for moment, each in loads if each.decoding)
    assert began_s - 0.001 == pytest.approx(second_token_s)
