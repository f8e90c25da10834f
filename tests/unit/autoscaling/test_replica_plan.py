"""How many replicas there shall be: what is measured, what is asked for, and what Serve and the operator get of it."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import pickle
import time
from collections import Counter
from itertools import pairwise
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from app.autoscaling import activity
from app.autoscaling.load import FIELDS, Load, LoadMeter, mean_load
from app.autoscaling.replica_plan import Plan, Replicas, SeenCapacity, Targets, measure, plan_frontend, plan_pool
from app.channel.protocol import Backlog
from app.engines.base import EngineInfo
from app.errors import BatonError, EngineDead
from app.messages import EngineStats, ReplicaLoad
from deployments import autoscaling
from deployments.replica.decode import DecodeHalf
from deployments.replica.prefill import PrefillHalf
from deployments.replica.worker import DecodeWorker, PrefillWorker

PREFILL = Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=True, is_for_decoding=False)
DECODE = Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=False)
QUICK = SeenCapacity(tokens_per_s=12_800, prompt_tokens=1_280)
IDLE = Load()


def of(number: int, *, target: int | None = None, reporting: int | None = None) -> Replicas:
    return Replicas(target=target or number, running=number, reporting=number if reporting is None else reporting)


def plan(*loads: Load, targets: Targets, measured: SeenCapacity = QUICK, target: int | None = None) -> Plan:
    return plan_pool(loads, measured, targets, of(len(loads), target=target))


def decoding(sequences: float, itl_s: float = 0.01, **fields: float) -> Load:
    return Load(decoding=sequences, generated_tokens=sequences / itl_s, **fields)


def test_a_meter_integrates_levels_and_counts_events() -> None:
    now = 10.0
    meter = LoadMeter(lambda: now)
    meter.set_levels(decoding=4, busy=1)
    now = 12.0
    meter.set_levels(decoding=1)
    meter.count(prompts=3)
    now = 13.0
    first = meter.read()
    assert (first["decoding"], first["busy"], first["prompts"]) == (9, 3, 3)
    now = 15.0
    meter.count(prompts=1)
    load = mean_load(first, meter.read(), 2.0)
    assert (load.decoding, load.busy, load.prompts, load.kv_use) == (1, 1, 0.5, 0)


def test_nothing_to_do_asks_for_no_replica() -> None:
    assert plan(IDLE, IDLE, targets=PREFILL).replicas == 0
    assert plan(IDLE, IDLE, targets=DECODE).replicas == 0


def test_prompts_that_would_wait_too_long_ask_for_as_many_as_bring_them_under_the_target() -> None:
    waiting = plan(Load(queued_tokens=41_000, busy=1, computed_tokens=12_800, prompts=10), targets=PREFILL)
    assert waiting.replicas == pytest.approx(41_000 / 12_800 / (2.0 - 0.1))
    assert waiting.reason == "predicted TTFT 3.3 s against 2.0 s: 41000 tokens wait, 12800 tokens/s per replica"
    enough = math.ceil(waiting.replicas)
    after = plan(*[Load(queued_tokens=41_000 / enough, busy=1)] * enough, targets=PREFILL)
    assert after.signals["predicted_ttft_s"] <= 2.0


def test_steady_load_without_a_backlog_asks_for_more_too() -> None:
    busy = plan(Load(busy=0.95, queued_tokens=1_000), targets=PREFILL)
    assert busy.replicas == pytest.approx(0.95 / 0.8)
    assert busy.reason == "prompts are computed 95% of the time against 80%"


def test_long_prompts_leave_less_of_a_replica_to_be_used() -> None:
    """A prompt of half its target has no more than its own time to wait for others, one of all of it no time at all."""
    half, whole = (SeenCapacity(tokens_per_s=12_800, prompt_tokens=12_800 * seconds) for seconds in (1.0, 2.0))
    load = Load(busy=0.6, queued_tokens=100)
    assert plan(load, targets=PREFILL, measured=half).replicas == pytest.approx(1.2)
    assert plan(load, targets=PREFILL, measured=whole).replicas == pytest.approx(1.2)
    # However long they are, no replica is asked for that had no prompt to compute.
    three = Load(busy=1, queued_tokens=3 * whole.prompt_tokens)
    assert plan(three, targets=PREFILL, measured=whole).replicas == pytest.approx(3)


def test_what_was_measured_once_serves_while_no_prompt_ends() -> None:
    before = measure([Load(busy=0.5, computed_tokens=6_400, prompts=5)], SeenCapacity(), PREFILL, 0.0)
    assert (before.tokens_per_s, before.prompt_tokens) == (12_800, 1_280)
    assert measure([Load(busy=1, queued_tokens=200_000)], before, PREFILL, 0.0) == before


def test_decode_beside_prefill_grows_for_prompts_only_where_they_wait_too_long() -> None:
    busy = Load(busy=1.0, queued_tokens=12_800)
    assert plan(busy, targets=DECODE).replicas <= 1
    assert plan(busy, targets=PREFILL).replicas > 1
    late = Load(busy=1.0, queued_tokens=51_200)
    assert plan(late, targets=DECODE).replicas > 2


def test_kv_memory_that_runs_short() -> None:
    full = plan(decoding(40, kv_use=0.97), targets=DECODE)
    assert full.replicas == pytest.approx(0.97 / 0.85)
    assert full.reason == "97% of the KV memory is taken against 85%, by 40 sequences"


def test_one_sequence_needs_no_second_replica() -> None:
    assert plan(decoding(1, kv_use=0.97), targets=DECODE).replicas == 1


def test_tokens_that_come_too_slowly() -> None:
    slow = plan(decoding(80, itl_s=0.06), targets=DECODE)
    assert slow.replicas == pytest.approx(1.2)
    assert slow.reason == "ITL 60 ms against 50 ms with 80 sequences"


def test_an_itl_that_no_number_of_replicas_reaches_does_not_take_them_all() -> None:
    """80 ms is what a step takes of this model, whatever it holds."""
    replicas = 1
    for _ in range(20):
        replicas = math.ceil(plan(*[decoding(20 / replicas, itl_s=0.08)] * replicas, targets=DECODE).replicas)
    assert replicas == 3  # of 20 sequences


def test_slots_are_learnt_where_sequences_wait_and_remembered_afterwards() -> None:
    full = decoding(64, waiting=40, started=10)
    measured = measure([full], QUICK, DECODE, 0.0)
    assert measured.slots == 64
    wish = plan(full, targets=DECODE, measured=measured)
    assert wish.replicas == pytest.approx(104 / 64)
    assert wish.reason == "64 sequences decode and 40 wait for a slot, a replica has 64"
    # A second replica that fills up only does not make it look as if replicas had few slots.
    measured = measure([full, decoding(10)], measured, DECODE, 0.0)
    assert measured.slots == 64
    # With all of them decoding nobody waits, but one replica would be too few again.
    half = decoding(52)
    assert measure([half, half], measured, DECODE, 0.0).slots == 64
    assert plan(half, half, targets=DECODE, measured=measured).replicas == pytest.approx(104 / 64 / 0.85)


def test_local_prompts_that_wait_longer_than_computing_takes_lack_slots_too() -> None:
    load = decoding(8, prefilling=20, prompts=4, busy=1, queued_tokens=400, computed_tokens=80)
    assert measure([load], QUICK, DECODE, 0.0).slots == 8
    # The same where what waits is computed as fast as it can be.
    load = decoding(8, prefilling=20, prompts=4, busy=1, queued_tokens=64_000, computed_tokens=12_800)
    assert measure([load], QUICK, DECODE, 0.0).slots == 0
    # Nor are they in line where it was seen before how many slots there are.
    known = msgspec.structs.replace(QUICK, slots=4)
    wish = plan(load, IDLE, targets=msgspec.structs.replace(DECODE, ttft_s=60), measured=known)
    assert wish.reason == "8 sequences decode and 0 wait for a slot, a replica has 4"


def test_a_replica_is_not_slow_because_it_has_little_to_do() -> None:
    short = Load(busy=1, computed_tokens=200, prompts=10)
    assert measure([short], QUICK, PREFILL, 0.0).tokens_per_s == 12_800
    assert measure([short], QUICK, PREFILL, 300.0).tokens_per_s == 6_400
    assert measure([short], SeenCapacity(), PREFILL, 0.0).tokens_per_s == 200


def test_a_replica_that_mostly_decodes_nothing_is_not_full() -> None:
    """As seen where something else kept 12 sequences waiting: 0.3 slots were learnt, and 12 replicas wanted."""
    load = decoding(0.3, waiting=12)
    assert measure([load], QUICK, DECODE, 0.0).slots == 0
    assert measure([decoding(1.0, waiting=12)], QUICK, DECODE, 0.0).slots == 1


def test_slow_transfers_are_no_lack_of_slots() -> None:
    load = decoding(5, waiting=20, transferring=20, started=1)
    assert measure([load], QUICK, DECODE, 0.0).slots == 0


def test_a_prefill_pool_keeps_the_replicas_on_which_sequences_decode_and_learns_no_slots_from_them() -> None:
    loads = [decoding(3), decoding(1), Load()]
    assert plan(*loads, targets=DECODE).replicas < 1
    wish = plan(*loads, targets=PREFILL)
    assert math.ceil(wish.replicas) == 3
    assert wish.reason.startswith("4 sequences that found no room on decode run here")
    assert plan(Load(), Load(), targets=PREFILL).replicas == 0
    late = decoding(8, prefilling=20, prompts=4, busy=1, queued_tokens=400, computed_tokens=80)
    assert measure([late], QUICK, PREFILL, 0.0).slots == 0


def test_a_prefill_pool_for_which_sequences_wait_as_there_is_no_decode_replica_grows_as_decode_would() -> None:
    full = decoding(8, waiting=12, prompts=1)
    measured = measure([full], QUICK, PREFILL, 0.0)
    wish = plan(full, targets=PREFILL, measured=measured)
    assert wish.replicas == pytest.approx(20 / 8)
    assert wish.reason == "8 sequences decode and 12 wait for a slot, a replica has 8"
    # When nobody waits any more it is kept where sequences decode, and prompts are not taken to wait for a slot.
    late = decoding(4, prefilling=20, prompts=4, busy=0.1, queued_tokens=400, computed_tokens=80)
    measured = measure([late] * 3, measured, PREFILL, 0.0)
    assert (measured.slots, math.ceil(plan(*[late] * 3, targets=PREFILL, measured=measured).replicas)) == (0, 3)


INFO = EngineInfo(engine="sim", version="1", num_blocks=100, block_size_tokens=16, max_model_len=1600)


class Prefill(PrefillWorker):
    """Without an engine to stop."""

    def __init__(self, prompts: str = "", **fields: Any) -> None:
        phases, backlog = fields.pop("phases", {}), fields.pop("backlog", Backlog())
        engine, kv_format = cast(Any, None), cast(Any, None)
        self.role = self.home
        self._server = cast(Any, Mock(backlog=lambda: backlog))
        self._sequences = Mock(phases=Counter(phases))
        self._prefills = PrefillHalf("r", engine, INFO, kv_format)
        self._prefills._running = dict.fromkeys(prompts, cast(Any, None))
        self._decodes = DecodeHalf(MagicMock(), engine, INFO, kv_format, None)

    def __del__(self) -> None: ...  # type: ignore[override]  # nothing to await, and nobody who would


class Decode(DecodeWorker):
    """Likewise."""

    __init__ = Prefill.__init__
    __del__ = Prefill.__del__  # type: ignore[assignment]  # as above


@pytest.mark.parametrize(
    ("stats", "queued"),
    [
        (EngineStats(num_running=1, num_waiting=3, num_blocks=100, num_used_blocks=90), 900),
        (EngineStats(num_running=0, num_waiting=3, num_blocks=100, num_used_blocks=10), 900),
        (EngineStats(num_running=0, num_waiting=3, num_blocks=100, num_used_blocks=90), 0),
    ],
    ids=["it computes", "there is room", "the KV that decode has not pulled fills it"],
)
def test_prompts_that_only_lack_the_blocks_of_unpulled_kv_are_no_load_of_prefill(
    stats: EngineStats, queued: int
) -> None:
    worker = Prefill("abc")
    levels = worker.levels(ReplicaLoad(sequences=3, queued_tokens=900), stats)
    assert levels == {
        "queued_tokens": queued, "busy": float(queued > 0), "prefilling": 3, "waiting": 0, "decoding": 0, "kv_use": 0
    }  # fmt: skip


def test_a_sequence_that_a_prefill_replica_decodes_counts_there_as_on_a_decode_replica() -> None:
    worker = Prefill("ab", phases={"prefilling": 1, "decoding": 4})
    levels = worker.levels(ReplicaLoad(sequences=7), EngineStats(num_running=5))
    assert (levels["prefilling"], levels["waiting"], levels["decoding"]) == (3, 0, 4)


def test_sequences_whose_prompt_is_computed_elsewhere_are_no_load_of_decode() -> None:
    """SGLang gives decode the descriptor, and KV of decode's own, before prefill has begun."""
    worker = Decode(phases={"promised": 6, "decoding": 1, "waiting": 1})
    levels = worker.levels(ReplicaLoad(sequences=20, used_blocks=80, decoding=1), EngineStats())
    assert levels == {
        "queued_tokens": 0, "busy": 0, "prefilling": 0, "waiting": 1, "decoding": 1, "kv_use": pytest.approx(0.2)
    }  # fmt: skip


def test_sequences_that_sglang_has_no_memory_for_wait_on_decode_and_are_no_load_of_prefill() -> None:
    """Most of this replica's KV is its own, so those that find none lack decode replicas, and prefill could do more."""
    held_up = EngineStats(num_held_up=150, num_waiting=150)
    decode = Decode(phases={"promised": 150, "decoding": 50})
    levels = decode.levels(ReplicaLoad(sequences=200, used_blocks=96, decoding=50), held_up)
    assert (levels["waiting"], levels["kv_use"]) == (150, 0.96)
    prefill = Prefill()
    assert prefill.levels(ReplicaLoad(queued_tokens=75_000), held_up)["queued_tokens"] == 0


def test_kv_that_is_only_promised_makes_nobody_wait_for_decode() -> None:
    """Prefill is behind: what fills decode's KV are sequences whose prompt is not computed yet."""
    decode = Decode(phases={"promised": 150, "decoding": 1})
    levels = decode.levels(ReplicaLoad(sequences=151, used_blocks=96, decoding=1), EngineStats(num_held_up=50))
    assert levels["waiting"] < 1
    assert levels["kv_use"] < 0.02


def test_what_waits_in_the_frontends_counts_as_if_it_waited_on_the_replica() -> None:
    prefill = Prefill(backlog=Backlog(queued_tokens=900))
    levels = prefill.levels(ReplicaLoad(), EngineStats())
    assert (levels["queued_tokens"], levels["busy"], levels["waiting"]) == (900, 1, 0)
    decode = Decode(phases={"decoding": 50, "waiting": 2}, backlog=Backlog(sequences=30))
    levels = decode.levels(ReplicaLoad(sequences=52, decoding=50), EngineStats())
    assert (levels["queued_tokens"], levels["busy"], levels["waiting"]) == (0, 0, 32)


class Draining:
    """An engine as a prefill replica that is removed asks it."""

    def __init__(self, *stats: EngineStats | BatonError, queued_tokens: int = 0) -> None:
        self.answers = list(stats)
        self.prompt_queue = Mock(queued_tokens=queued_tokens)

    async def stats(self) -> EngineStats:
        answer = self.answers.pop(0)
        if isinstance(answer, BatonError):
            raise answer
        return answer


@pytest.mark.parametrize(
    "engine",
    [
        Draining(EngineStats(num_used_blocks=3), EngineStats(num_waiting=1), EngineStats()),
        Draining(EngineStats(num_used_blocks=3), EngineDead("killed"), queued_tokens=900),
    ],
    ids=["until decode has pulled", "not for what waits in a dead engine"],
)
async def test_a_prefill_replica_that_is_removed_waits(engine: Draining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.replica.prefill.HELD_KV_POLL_S", 0.001)
    half = PrefillHalf("p", cast(Any, engine), INFO, cast(Any, None))
    async with asyncio.timeout(5):
        await half.drain()
    assert engine.answers == []


def test_what_the_user_set_counts_beside_the_rest() -> None:
    own = msgspec.structs.replace(DECODE, sequences=50.0)
    wish = plan(decoding(120, waiting=20, prefilling=10), targets=own)
    assert wish.replicas == 3
    assert wish.reason == "150 sequences, 50 per replica are the target"


def test_frontends_go_by_the_requests_in_flight() -> None:
    wish = plan_frontend(500, 200, of(1))
    assert (wish.replicas, wish.reason) == (2.5, "500 requests in flight, 200 per replica are the target")


def test_replicas_are_given_up_only_if_the_rest_is_well_under_the_target() -> None:
    kept = plan_frontend(390, 200, of(3))
    assert math.ceil(kept.replicas) == 3
    assert kept.reason.endswith("one less would be too near to that")
    assert math.ceil(plan_frontend(330, 200, of(3)).replicas) == 2


def test_none_is_given_up_while_one_has_not_reported() -> None:
    wish = plan_pool([decoding(5)], QUICK, DECODE, of(3, reporting=1))
    assert wish.replicas == 3
    assert wish.reason.endswith("none is given up: 1 of 3 replicas have reported")


def test_a_replica_that_has_not_reported_hides_no_load() -> None:
    assert plan_pool([decoding(40, kv_use=3.0)], QUICK, DECODE, of(3, reporting=1)).replicas > 3


loads = st.builds(
    Load,
    **{field: st.floats(0, 1e5) for field in FIELDS if field not in ("busy", "kv_use")},
    busy=st.floats(0, 1),
    kv_use=st.floats(0, 1),
)
targets = st.builds(Targets, ttft_s=st.floats(0.1, 60), itl_s=st.floats(0.001, 1), is_for_prompts=st.booleans())
measurements = st.builds(
    SeenCapacity, tokens_per_s=st.floats(1, 1e6), prompt_tokens=st.floats(1, 1e5), slots=st.floats(0, 1000)
)
RISING = [["queued_tokens", "prefilling"], ["busy"], ["prefilling"], ["waiting"], ["decoding"], ["kv_use"]]


@given(st.lists(loads, min_size=1, max_size=8), targets, measurements, st.integers(1, 16))
def test_a_plan_is_bounded(loads: list[Load], targets: Targets, measured: SeenCapacity, target: int) -> None:
    wish = plan(*loads, targets=targets, measured=measured, target=target).replicas
    prompts = sum(load.queued_tokens for load in loads) / measured.prompt_tokens
    sequences = sum(load.sequences for load in loads)
    assert 0 <= wish <= max(target, math.ceil(sequences), prompts * 1.001, len(loads) / 0.5)


@given(st.lists(loads, min_size=1, max_size=4), targets, measurements, st.sampled_from(RISING), st.floats(1, 10))
def test_more_load_never_asks_for_fewer(
    loads: list[Load], targets: Targets, measured: SeenCapacity, fields: list[str], factor: float
) -> None:
    more = [
        msgspec.structs.replace(load, **{field: getattr(load, field) * factor for field in fields}) for load in loads
    ]
    fewer = plan(*loads, targets=targets, measured=measured).replicas
    assert plan(*more, targets=targets, measured=measured).replicas >= fewer * (1 - 1e-9)


@given(st.floats(0, 2000), st.floats(0, 1), st.floats(0, 0.05), st.floats(0, 0.001), st.integers(1, 40))
def test_a_constant_load_comes_to_rest(
    sequences: float, work: float, base_s: float, slope_s: float, begin: int
) -> None:
    """Of whatever number it begins with, and in one direction."""
    numbers = [begin]
    for _ in range(300):
        each = sequences / numbers[-1]
        itl_s = base_s + slope_s * each + 1e-6
        load = decoding(each, itl_s, busy=min(1.0, work / numbers[-1]), kv_use=min(1.0, each / 500))
        wish = plan(*[load] * numbers[-1], targets=PREFILL, measured=SeenCapacity()).replicas
        numbers.append(min(64, max(1, math.ceil(wish))))
    assert numbers[-1] == numbers[-2]
    steps = [later - earlier for earlier, later in pairwise(numbers) if later != earlier]
    assert all(step > 0 for step in steps) or all(step < 0 for step in steps)


DEPLOYMENT = DeploymentID(name="decode-tiny", app_name="baton")


def context(
    *reports: list[dict[str, float]],
    target: int = 1,
    at: float = 100.0,
    newest: float = 100.0,
    config: AutoscalingConfig | None = None,
) -> AutoscalingContext:
    """One list of reports for each replica, a second apart, the last one at `newest`."""
    replicas = [ReplicaID(unique_id=str(number), deployment_id=DEPLOYMENT) for number in range(len(reports))]
    raw: dict[str, dict[ReplicaID, Any]] = {field: {} for field in FIELDS}
    for replica, values in zip(replicas, reports, strict=True):
        for field in FIELDS:
            raw[field][replica] = [
                TimeStampedValue(newest - len(values) + 1 + number, value.get(field, 0.0))
                for number, value in enumerate(values)
            ]
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name=DEPLOYMENT.name,
        app_name=DEPLOYMENT.app_name,
        current_num_replicas=len(replicas),
        target_num_replicas=target,
        running_replicas=replicas,
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=at,
        config=config or AutoscalingConfig(max_replicas=8),
    )


class Policy(autoscaling.PoolPolicy):
    def __init__(self) -> None:
        super().__init__("tiny", "decode", ttft_s=2.0, itl_s=0.05, sequences=None, is_for_prompts=False)


def replace(monkeypatch: pytest.MonkeyPatch, method: str, name: str, value: Any) -> None:
    """Replace what a method of a policy means by `name`.

    Serve pickles policies by value, and to unpickle one gives this process's class methods with globals of their own.
    """
    monkeypatch.setitem(getattr(autoscaling.Policy, method).__globals__, name, value)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is put into Ray's KV."""
    kept: dict[str, Any] = {}
    replace(monkeypatch, "_publish", "put_internal_kv", lambda key, value: kept.update({key: json.loads(value)}))
    replace(monkeypatch, "__init__", "Gauge", Mock())
    return kept


BUSY = [{}, {"decoding": 40.0, "generated_tokens": 4000.0, "kv_use": 0.97}]


def test_reports_are_integrals_so_two_of_them_tell_the_mean_between() -> None:
    reports = context([{"decoding": 10.0}, {"decoding": 30.0}, {"decoding": 34.0}])
    (load,) = autoscaling.reported_loads(reports, autoscaling.Arrivals(), 0.0, {}).values()
    assert load.decoding == 12


def test_a_replica_with_one_report_or_old_ones_counts_as_silent() -> None:
    arrivals = autoscaling.Arrivals()
    assert autoscaling.reported_loads(context([{}]), arrivals, 0.0, {}) == {}
    assert len(autoscaling.reported_loads(context(BUSY), arrivals, 0.0, {})) == 1
    assert len(autoscaling.reported_loads(context(BUSY), arrivals, 49.0, {})) == 1
    assert autoscaling.reported_loads(context(BUSY), arrivals, 51.0, {}) == {}
    assert len(autoscaling.reported_loads(context(BUSY, newest=101.0), arrivals, 52.0, {})) == 1


@pytest.mark.parametrize("skew_s", [-60.0, 60.0])
def test_the_wall_clock_of_a_replica_does_not_matter(skew_s: float) -> None:
    """Serve's reports have times by the replica's clock, and this process has its own."""
    found = [
        autoscaling.reported_loads(context(BUSY, newest=100.0 + skew), autoscaling.Arrivals(), 0.0, {})
        for skew in (0.0, skew_s)
    ]
    assert len(found[0]) == 1
    assert found[0] == found[1]


def test_a_plan_is_published_in_log_metrics_and_kv(published: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy()
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        for _ in range(3):
            wanted, state = policy(context(BUSY))
            assert wanted == pytest.approx(0.97 / 0.85)
            assert state == {}
    assert [record.getMessage() for record in caplog.records] == [
        "autoscaling deployment=decode-tiny model=tiny role=decode replicas=1 wanted=2 "
        "reason='97% of the KV memory is taken against 85%, by 40 sequences'"
    ]
    plan = published["baton:autoscaling:baton:decode-tiny"]
    assert plan["replicas"] == 1
    assert plan["wanted"] == pytest.approx(0.97 / 0.85)
    assert plan["reason"].startswith("97%")
    assert plan["signals"]["decoding"] == 40


def test_an_unchanged_plan_is_published_again_before_it_looks_old(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    policy = Policy()
    policy(context(BUSY))
    published.clear()
    policy(context(BUSY))
    assert not published
    now += autoscaling.PUBLISH_S
    policy(context(BUSY))
    assert published


def test_a_policy_that_fails_keeps_the_replicas_and_says_so_once(
    published: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy()
    broken = context(BUSY, target=5)
    broken.config = None
    for _ in range(3):
        assert policy(broken) == (5.0, {})
    assert len(caplog.records) == 1
    assert "decode-tiny failed" in caplog.text
    assert "Traceback" in caplog.text
    assert policy(context(BUSY))[0] > 1


def test_a_plan_that_cannot_be_published_counts_all_the_same(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace(monkeypatch, "_publish", "put_internal_kv", Mock(side_effect=ConnectionError("no GCS")))
    assert Policy()(context(BUSY))[0] > 1
    assert "no GCS" in caplog.text


class Sleepy:
    """The policies of a model that may sleep, and what its frontends wish."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.wish: bytes | None = None
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(activity, "_models", {})
        scope = autoscaling.PoolPolicy._awake_or_asleep.__globals__
        monkeypatch.setitem(scope, "get_internal_kv", lambda key: self.wish if key == "baton:wish:baton:tiny" else None)
        targets: dict[str, Any] = {"ttft_s": 2.0, "itl_s": 0.05, "is_for_prompts": True}
        self.prefill, self.decode = (
            autoscaling.PoolPolicy("tiny", role, may_sleep=True, **targets) for role in ("prefill", "decode")
        )

    def wanted(self, policy: autoscaling.PoolPolicy, *reports: list[dict[str, float]], target: int = 1) -> int:
        """How many replicas a pool with these reports is to have, rounded up as Serve does."""
        return math.ceil(policy(context(*reports, target=target, newest=self.now))[0])


NO_WORK: list[dict[str, float]] = [{}, {}]
LITTLE = [{}, {"decoding": 0.01}]


def test_an_idle_model_needs_no_replica_and_a_wish_wakes_all_of_its_pools(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sleepy(monkeypatch)
    model.wish = b"of long ago"
    assert [model.wanted(pool, NO_WORK) for pool in (model.prefill, model.decode)] == [0, 0]
    assert [model.wanted(pool, target=0) for pool in (model.prefill, model.decode)] == [0, 0]
    assert published["baton:autoscaling:baton:decode-tiny"]["reason"] == autoscaling.ASLEEP
    model.wish = b"new"
    assert [model.wanted(pool, target=0) for pool in (model.decode, model.prefill)] == [1, 1]
    model.now += activity.WANTED_S
    assert [model.wanted(pool, target=0) for pool in (model.prefill, model.decode)] == [0, 0]


def test_no_pool_sleeps_while_another_of_the_model_has_work(
    published: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sleepy(monkeypatch)
    assert model.wanted(model.prefill, NO_WORK) == 0
    assert model.wanted(model.decode, LITTLE) == 1
    assert model.wanted(model.prefill, target=0) == 1
    other = autoscaling.PoolPolicy("other", "decode", may_sleep=True, ttft_s=2.0, itl_s=0.05, is_for_prompts=True)
    assert model.wanted(other, NO_WORK) == 0


def test_a_model_that_may_not_sleep_reads_no_wishes(published: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scope = autoscaling.PoolPolicy._awake_or_asleep.__globals__
    monkeypatch.setitem(scope, "get_internal_kv", Mock(side_effect=AssertionError("it was read")))
    assert Policy()(context(NO_WORK))[0] == 0


def test_policies_that_serve_has_unpickled_know_the_same_models() -> None:
    policies = [pickle.loads(cloudpickle.dumps(autoscaling.PoolPolicy)) for _ in range(2)]
    assert {policy._awake_or_asleep.__globals__["activity_of"] for policy in policies} == {activity.activity_of}
