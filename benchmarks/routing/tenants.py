"""What one tenant's flood does to another tenant, and what overload costs, in virtual time.

Each load is measured on a fleet of its own.  The capacity is what the fleet serves of twice as much as it can.

1. *alone*: the tenant quiet asks for half of its share, which is half of the capacity.
2. *beside a flood*: the same, while the tenant flood asks for ten times its own share.
3. *overload*: flood alone asks for four times the capacity.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from random import Random
from statistics import median, quantiles
from typing import Literal

import msgspec
from rich.console import Console

from app.bench.report import Source, markdown_table
from app.bench.workload import Request
from app.config import RoutingConfig, SloConfig
from app.engines.sim.profile import SimProfile
from app.messages import GenerateRequest
from app.routing.decision import RoutingHints
from benchmarks.routing.fleet import Fleet, Outcome
from benchmarks.routing.policies import Baton
from benchmarks.routing.replica import FleetSpec
from benchmarks.routing.report import print_source
from benchmarks.routing.timeline import Timeline

Tenant = Literal["quiet", "flood"]
SETTLED_S = 10.0
"""What arrives before is not counted: a line first has to learn how quick it is, and that it is too long."""
SHARE = 0.5
"""Of each of two tenants with one weight."""
SOON_S = 0.05
"""Within which a refusal is to come."""
PROMPT_TOKENS = 1_000, 7_000
OUTPUT_TOKENS = 128


class TenantLoad(msgspec.Struct, frozen=True):
    """What came of one load."""

    name: str
    rates: dict[Tenant, float]
    """Requests/s."""
    ttft_s: dict[Tenant, list[float]]
    """Of what was served."""
    refused_s: list[float]
    """How long each refusal took."""
    served_per_s: float
    """Requests that ended while it was measured, in a second."""
    in_time_per_s: float
    """Those of them whose first token came within `slo.ttft_ms`."""


class TenantsOfFleet(msgspec.Struct, frozen=True):
    """All loads of one fleet."""

    num_prefill: int
    num_decode: int
    num_frontends: int
    capacity: float
    loads: list[TenantLoad]


def measure_tenants(spec: FleetSpec, slo: SloConfig, seconds: float, seed: int) -> TenantsOfFleet:
    """Serve all loads, each for `seconds` of virtual time."""
    guess = spec.num_prefill / _mean_prompt_s(spec.profile)
    capacity = _serve("capacity", spec, slo, seconds, {"flood": 2 * guess}, seed).served_per_s
    quiet, flood = SHARE / 2 * capacity, 10 * SHARE * capacity
    wanted: list[tuple[str, dict[Tenant, float]]] = [
        ("alone", {"quiet": quiet}),
        ("beside a flood", {"quiet": quiet, "flood": flood}),
        ("overload", {"flood": 4 * capacity}),
    ]
    loads = [_serve(name, spec, slo, seconds, rates, seed) for name, rates in wanted]
    return TenantsOfFleet(spec.num_prefill, spec.num_decode, spec.num_frontends, capacity, loads)


def _mean_prompt_s(profile: SimProfile) -> float:
    times, mean = profile.prefill, sum(PROMPT_TOKENS) / 2
    return times.base_s + times.per_token_s * mean + times.per_token_squared_s * mean**2


def _serve(
    name: str, spec: FleetSpec, slo: SloConfig, seconds: float, rates: Mapping[Tenant, float], seed: int
) -> TenantLoad:
    random.seed(seed)  # the router draws from the module `random`, so that frontends differ
    requests, tenants = _draw(seconds, rates, Random(seed))
    timeline = Timeline()

    def hints_of(request: GenerateRequest) -> RoutingHints:
        return RoutingHints(tenant=tenants[int(request.request_id)])

    result = Fleet(spec, lambda: Baton(RoutingConfig(), slo, timeline, hints_of=hints_of), timeline).run(requests)
    counted = [outcome for outcome in result.outcomes if outcome.arrived_at >= SETTLED_S]
    served = [outcome for outcome in counted if outcome.way is not None]
    ended = [outcome for outcome in result.outcomes if outcome.way and SETTLED_S <= outcome.ended_at < seconds]
    times: dict[Tenant, list[float]] = {tenant: [] for tenant in rates}
    for outcome in served:
        times[tenants[outcome.number]].append(outcome.ttft_s)
    return TenantLoad(
        name,
        dict(rates),
        times,
        [outcome.ttft_s for outcome in counted if outcome.way is None],
        _per_s(ended, seconds),
        _per_s([outcome for outcome in ended if outcome.ttft_s <= slo.ttft_ms / 1e3], seconds),
    )


def _per_s(outcomes: Sequence[Outcome], seconds: float) -> float:
    return len(outcomes) / (seconds - SETTLED_S)


def _draw(seconds: float, rates: Mapping[Tenant, float], draw: Random) -> tuple[list[Request], list[Tenant]]:
    """Return the requests in Poisson processes of these rates, and the tenant of each."""
    arrivals: list[tuple[float, Tenant]] = []
    for tenant, rate in rates.items():
        at_s = 0.0
        while (at_s := at_s + draw.expovariate(rate)) < seconds:
            arrivals.append((at_s, tenant))
    arrivals.sort()
    requests = [
        Request(at_s, [(PROMPT_TOKENS[1] * number, draw.randint(*PROMPT_TOKENS))], OUTPUT_TOKENS)
        for number, (at_s, _) in enumerate(arrivals)
    ]
    return requests, [tenant for _, tenant in arrivals]


class TenantsReport(msgspec.Struct, kw_only=True):
    """What `python -m benchmarks.routing tenants` measures."""

    source: Source
    profile: str
    seed: int
    fleets: list[TenantsOfFleet] = []


def print_tenants(report: TenantsReport, console: Console) -> None:
    print_source(report.source, [f"engines with the profile {report.profile}", f"seed {report.seed}"], console)
    times = ["TTFT p50 ms", "p95", "p95 of alone"]
    refusals = ["refused", "after p50 ms", "p95", "within 50 ms"]
    columns = ["fleet", "load", "tenant", "asks/s", "served/s", "of capacity", "in time/s", *times, *refusals]
    table = markdown_table(columns, "Tenants in virtual time")
    for fleet in report.fleets:
        alone = _p95(fleet.loads[0].ttft_s["quiet"])
        for load in fleet.loads:
            for tenant, ttft_s in load.ttft_s.items():
                refused = load.refused_s if tenant == "flood" else []
                table.add_row(
                    f"{fleet.num_prefill}P{fleet.num_decode}D, {fleet.num_frontends} frontends",
                    *(load.name, tenant, f"{load.rates[tenant]:.1f}", f"{load.served_per_s:.1f}"),
                    *(f"{load.served_per_s / fleet.capacity:.2f}", f"{load.in_time_per_s:.1f}"),
                    *(f"{1e3 * median(ttft_s):.0f}", f"{1e3 * _p95(ttft_s):.0f}", f"{_p95(ttft_s) / alone:.2f}"),
                    *_refusals(refused, load),
                )
    console.print(table)


def _refusals(refused_s: Sequence[float], load: TenantLoad) -> list[str]:
    if len(refused_s) < 2:
        return ["-"] * 4
    soon = sum(after_s <= SOON_S for after_s in refused_s) / len(refused_s)
    return [
        f"{len(refused_s)}",
        f"{1e3 * median(refused_s):.0f}",
        f"{1e3 * _p95(refused_s):.0f}",
        f"{soon:.3f}",
    ]


def _p95(seconds: Sequence[float]) -> float:
    return quantiles(seconds, n=20, method="inclusive")[-1]
