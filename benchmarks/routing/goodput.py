"""Compares the goodput of Baton's default with that of fixed ways, on the same requests in virtual time.

The fixed ways are what an operator could choose instead, each with the production router over the same number of
replicas: one pool that serves all requests whole (`aggregated`), all prompts on prefill (`remote`), all prompts where
they are decoded (`local`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import msgspec

from app.config import RemotePlacement, RoutingConfig, SloConfig
from app.engines.sim.profile import SimProfile
from benchmarks.routing.fleet import Fleet, FleetResult, Outcome, Way
from benchmarks.routing.goodput_oracle import oracle_num_good
from benchmarks.routing.policies import Baton, Policy
from benchmarks.routing.replica import FleetSpec
from benchmarks.routing.scenarios import Scenario
from benchmarks.routing.timeline import Timeline

Contender = Literal["default", "aggregated", "remote", "local"]
CONTENDERS: tuple[Contender, ...] = get_args(Contender)
FIXED: tuple[Contender, ...] = ("aggregated", "remote", "local")
LEAST_SHARE = 0.97
"""Of the best fixed way's goodput that the default must have in each scenario."""
BLOCK_SIZE = 64
"""Tokens; engines have 16, which takes longer and changes nothing (docs/benchmarks/2026-11-21-routing.md)."""
KV_GB = 90.0
"""Of each replica, as in `python -m benchmarks.routing fleet`."""

WINDOW_S = 5
"""The length of the windows in which goodput is looked at after a change of the load."""
NEAR_STEADY = 0.1
"""A share of requests in time that is at most so far from the steady one counts as near it."""
WAYS: tuple[Way, ...] = get_args(Way)


class Second(msgspec.Struct):
    """The requests that arrived in one second."""

    num_arrived: int = 0
    num_good: int = 0
    num_by_way: dict[str, int] = {}


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """How one contender did."""

    scenario: str
    contender: str
    num_requests: int
    num_good: int
    num_refused: int
    arrival_s: float
    """The time in which the requests arrived."""
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    end_s: float
    """When the last request ended."""
    by_way: dict[str, float]
    """The share of each way among the requests."""
    seconds: list[Second]

    @property
    def goodput_per_s(self) -> float:
        """Requests whose TTFT and TPOT are within the SLO, over the time in which requests arrive."""
        return self.num_good / self.arrival_s

    @property
    def good_share(self) -> float:
        return self.num_good / self.num_requests


def make_spec(scenario: Scenario, contender: Contender, profile: SimProfile) -> FleetSpec:
    is_whole = contender == "aggregated"
    if scenario.link_bytes_per_s is not None:
        transfer = profile.transfer.model_copy(update={"bytes_per_s": scenario.link_bytes_per_s})
        profile = profile.model_copy(update={"transfer": transfer})
    return FleetSpec(
        profile=profile,
        num_prefill=0 if is_whole else scenario.num_prefill,
        num_decode=scenario.num_decode + scenario.num_prefill * is_whole,
        num_blocks=int(KV_GB * 1e9 / profile.kv_bytes_per_token / BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        num_frontends=scenario.num_frontends,
        first_use_s=scenario.first_use_s,
        pace_error=scenario.pace_error,
    )


def make_policy(contender: Contender, slo: SloConfig, timeline: Timeline) -> Policy:
    if contender == "default":
        return Baton(RoutingConfig(), slo, timeline)
    if contender == "aggregated":
        return Baton(RoutingConfig(), slo, timeline, has_prefill=False)
    if contender == "local":
        return Baton(RoutingConfig(), slo, timeline, prefill_mode="local")
    return Baton(RoutingConfig(placement=RemotePlacement(policy="remote")), slo, timeline)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One run: a scenario and a contender."""

    scenario: Scenario
    contender: Contender
    profile: SimProfile
    seed: int
    traces: Path | None


def measure(task: Task) -> Measured:
    """Serve a scenario's requests in one contender's way."""
    timeline = Timeline()
    random.seed(task.seed)  # the router draws from the module `random`, so that frontends differ
    spec = make_spec(task.scenario, task.contender, task.profile)
    requests = task.scenario.requests(task.seed, task.traces)
    result = Fleet(spec, partial(make_policy, task.contender, task.scenario.slo, timeline), timeline).run(requests)
    return _summarize(task, result, requests[-1].at_s)


def _summarize(task: Task, result: FleetResult, last_arrival_s: float) -> Measured:
    import numpy as np

    served = [outcome for outcome in result.outcomes if outcome.way is not None]
    ttft_s = np.asarray([outcome.ttft_s for outcome in served])
    tpot_s = np.asarray([outcome.tpot_s for outcome in served])
    is_good = partial(is_in_time, task.scenario)
    num_good = sum(map(is_good, result.outcomes))
    return Measured(
        scenario=task.scenario.name,
        contender=task.contender,
        num_requests=len(result.outcomes),
        num_good=num_good,
        num_refused=result.num_refused,
        arrival_s=last_arrival_s,
        ttft_p50_s=float(np.percentile(ttft_s, 50)),
        ttft_p99_s=float(np.percentile(ttft_s, 99)),
        tpot_mean_s=float(tpot_s.mean()),
        tpot_p99_s=float(np.percentile(tpot_s, 99)),
        end_s=result.end_s,
        by_way={way: sum(outcome.way == way for outcome in served) / len(result.outcomes) for way in WAYS},
        seconds=_by_second(result.outcomes, is_good),
    )


def is_in_time(scenario: Scenario, outcome: Outcome) -> bool:
    slo = scenario.slo
    return outcome.way is not None and outcome.ttft_s <= slo.ttft_ms / 1e3 and outcome.tpot_s <= slo.itl_ms / 1e3


def _by_second(outcomes: Sequence[Outcome], is_good: Callable[[Outcome], bool]) -> list[Second]:
    seconds = [Second() for _ in range(1 + math.floor(max(outcome.arrived_at for outcome in outcomes)))]
    for outcome in outcomes:
        second = seconds[math.floor(outcome.arrived_at)]
        second.num_arrived += 1
        second.num_good += is_good(outcome)
        if outcome.way is not None:
            second.num_by_way[outcome.way] = second.num_by_way.get(outcome.way, 0) + 1
    return seconds


class Settling(msgspec.Struct, frozen=True, kw_only=True):
    """What the default does after one change of the load."""

    change_s: float
    settled_after_s: float
    """From here on the share of requests in time stays near its steady value, in windows of WINDOW_S seconds."""
    steady_share: float
    """The share of requests in time in the second half of the time until the next change."""
    swing: float
    """The largest share of any way in a window of that half, less the smallest share of the same way."""


def settlings(scenario: Scenario, seconds: Sequence[Second]) -> list[Settling]:
    """Return how the default settles after each change of a scenario's load that is not soon followed by another."""
    moments = [*(math.ceil(moment) for moment in scenario.changes_s), len(seconds)]
    return [_settling(begin, end, seconds) for begin, end in pairwise(moments) if end - begin >= 2 * WINDOW_S]


def _settling(begin: int, end: int, seconds: Sequence[Second]) -> Settling:
    middle = (begin + end) // 2
    steady = good_share(seconds[middle:end])
    settled = end - begin
    for start in range(end - WINDOW_S, begin - 1, -1):
        window = seconds[start : start + WINDOW_S]
        if abs(good_share(window) - steady) > _tolerance(steady, window):
            break
        settled = start - begin
    windows = [seconds[start : start + WINDOW_S] for start in range(middle, end - WINDOW_S + 1, WINDOW_S)]
    shares = [[way_share(window, way) for window in windows] for way in WAYS]
    return Settling(
        change_s=begin,
        settled_after_s=settled,
        steady_share=steady,
        swing=max((max(each) - min(each) for each in shares if each), default=0.0),
    )


def good_share(seconds: Sequence[Second]) -> float:
    """Return the share of the requests that were in time."""
    return sum(second.num_good for second in seconds) / max(1, sum(second.num_arrived for second in seconds))


def way_share(seconds: Sequence[Second], way: Way) -> float:
    """Return the share of the requests that were served in one way."""
    num = sum(second.num_by_way.get(way, 0) for second in seconds)
    return num / max(1, sum(second.num_arrived for second in seconds))


def _tolerance(share: float, window: Sequence[Second]) -> float:
    """Return by how much the share in a window may differ from the steady one: two standard deviations at least."""
    num = max(1, sum(second.num_arrived for second in window))
    return max(NEAR_STEADY, 2 * math.sqrt(share * (1 - share) / num))


class GoodputRow(msgspec.Struct, kw_only=True):
    """One scenario."""

    scenario: str
    is_held_out: bool
    fleet: str
    slo: str
    by_contender: dict[str, Measured]
    oracle_num_good: int
    """What the machine of benchmarks/routing/goodput_oracle.py would serve in time."""
    settlings: list[Settling]
    measured: dict[str, float]
    """`Scenario.measured`."""

    @property
    def best_fixed(self) -> str:
        """The fixed way with the most goodput."""
        return max(FIXED, key=lambda contender: self.by_contender[contender].num_good)

    @property
    def share_of_best(self) -> float:
        """The default's goodput over that of the best fixed way; 1 if no way has any."""
        best = self.by_contender[self.best_fixed].num_good
        return self.by_contender["default"].num_good / best if best else 1.0

    @property
    def oracle_share(self) -> float:
        return self.oracle_num_good / self.by_contender["default"].num_requests

    @property
    def oracle_per_s(self) -> float:
        return self.oracle_num_good / self.by_contender["default"].arrival_s

    @property
    def is_lost(self) -> bool:
        return self.share_of_best < LEAST_SHARE


def compare(
    scenarios: Sequence[Scenario], profile: SimProfile, seed: int, traces: Path | None, num_processes: int
) -> Iterator[GoodputRow]:
    """Serve each scenario's requests in each contender's way, in several processes if there are several."""
    tasks = [
        Task(scenario=scenario, contender=contender, profile=profile, seed=seed, traces=traces)
        for scenario in scenarios
        for contender in CONTENDERS
    ]

    def num_oracle(scenario: Scenario) -> int:
        pace = make_spec(scenario, "default", profile).pace()
        return oracle_num_good(scenario, scenario.requests(seed, traces), pace)

    if num_processes == 1:
        yield from _rows(scenarios, map(measure, tasks), num_oracle)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        yield from _rows(scenarios, pool.map(measure, tasks), num_oracle)


def _rows(
    scenarios: Sequence[Scenario], results: Iterator[Measured], num_oracle: Callable[[Scenario], int]
) -> Iterator[GoodputRow]:
    for scenario in scenarios:
        by_contender: dict[str, Measured] = {contender: next(results) for contender in CONTENDERS}
        yield GoodputRow(
            scenario=scenario.name,
            is_held_out=scenario.is_held_out,
            fleet=f"{scenario.num_prefill}P{scenario.num_decode}D",
            slo=f"{scenario.slo.ttft_ms:g}, {scenario.slo.itl_ms:g}",
            by_contender=by_contender,
            oracle_num_good=num_oracle(scenario),
            settlings=settlings(scenario, by_contender["default"].seconds),
            measured=scenario.measured,
        )
