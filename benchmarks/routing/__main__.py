"""``python -m benchmarks.routing``: the commands."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from app.bench.client import find_card, find_version, new_client, parse_url
from app.bench.output import check_files
from app.bench.prefix_cache import find_vocabulary
from app.bench.report import this_run
from app.bench.workload import Request, at_speed, fitting, read_trace
from app.cli.entry import run_app
from app.config import PredictedPlacement, RemotePlacement, RoutingConfig, SloConfig
from app.engines.sim.profile import load_profile
from app.errors import ConfigError
from benchmarks.routing import goodput_picture
from benchmarks.routing.decision_time import measure_decisions
from benchmarks.routing.fleet import Fleet, spread_out
from benchmarks.routing.goodput import compare
from benchmarks.routing.goodput_report import GoodputReport, describe_goodput_fleet, print_goodput
from benchmarks.routing.oracle import oracle_hit_rate
from benchmarks.routing.placement import ANSWER_TIMEOUT_S, measure_placement
from benchmarks.routing.policies import Baton, Policy, PowerOfTwo, RoundRobin
from benchmarks.routing.replica import MAX_MODEL_LEN, FleetSpec
from benchmarks.routing.report import (
    BASELINE,
    DecisionReport,
    FleetReport,
    FleetRow,
    Oracles,
    PlacementReport,
    fleet_row,
    print_decisions,
    print_fleet,
    print_placement,
    wide_console,
    write_json,
)
from benchmarks.routing.scenarios import SCENARIOS, Trace
from benchmarks.routing.tenants import SETTLED_S, TenantsReport, measure_tenants, print_tenants
from benchmarks.routing.timeline import Timeline

TRACE_URL = "https://github.com/kvcache-ai/Mooncake/tree/main/FAST25-release/traces"
SPEEDS = [2.0, 3.0, 4.0]
"""With round robin, a prefill pool of 8 is busy 61 % of the time at speed 3, and requests wait.  At 4 it is busy 80 %,
and at 5 queues grow to half a minute (conversation_trace.jsonl, profile h200-llama-8b)."""
KV_GB = 90.0
"""vLLM takes 127 of an H200's 141 GB (gpu_memory_utilization 0.9).  16 GB hold the weights (8 billion parameters of two
bytes), and some 20 are left for activations, CUDA graphs and a margin.  With 131,072 bytes per token, 90 GB are 687,000
tokens per replica."""
FLEET_SIZES = [8, 64, 512, 4096]
PROMPT_LENGTHS = [1_000, 8_000, 128_000]
MATCHING = [0, 1, 8]
QUICK = 1 / 3
TENANT_FLEETS = [(2, 2, 1), (2, 2, 2), (8, 8, 2)]
"""Prefill and decode replicas, and frontends."""

bench_routing = typer.Typer(no_args_is_help=True, help="Measure the router: its choices and what one costs.")
Json = Annotated[Path | None, typer.Option(help="Write all numbers to this file.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]


@bench_routing.command()
def fleet(
    trace: Annotated[
        Path | None, typer.Option(help=f"A trace in Mooncake's format, such as those at {TRACE_URL}")
    ] = None,
    speed: Annotated[list[float], typer.Option(help="How many times as fast as recorded; repeatable.")] = SPEEDS,
    spread: Annotated[bool, typer.Option(help="Requests of one timestamp come evenly until the next one.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the trace's first requests.")] = None,
    prefill: Annotated[int, typer.Option(min=1, help="Prefill replicas.")] = 8,
    decode: Annotated[int, typer.Option(min=1, help="Decode replicas.")] = 8,
    profile: Annotated[str, typer.Option(help="Timing profile of the sim engine: a name or a file.")] = "h200-llama-8b",
    kv_gb: Annotated[float, typer.Option(help="KV cache of each replica, in GB.")] = KV_GB,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block; 16 takes twice as long.")] = 64,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare policies on a trace, with a fleet of sim engines in virtual time and the production's router."""
    check_files(json, None)
    if trace is None:
        raise ConfigError("--trace", f"needed: for instance conversation_trace.jsonl from {TRACE_URL}")
    if min(speed) <= 0:
        raise ConfigError("--speed", "has to be above 0")
    times = load_profile(profile)
    spec = FleetSpec(
        profile=times,
        num_prefill=prefill,
        num_decode=decode,
        num_blocks=int(kv_gb * 1e9 / times.kv_bytes_per_token / block_size),
        block_size=block_size,
    )
    if spec.num_blocks * block_size < MAX_MODEL_LEN:
        raise ConfigError("--kv-gb", f"one prompt of {MAX_MODEL_LEN} tokens has to fit in")
    recorded = read_trace(trace, limit)
    requests = fitting(spread_out(recorded) if spread else recorded, MAX_MODEL_LEN)
    report = FleetReport(
        source=this_run(),
        workload=_describe_workload(trace, requests, len(recorded) - len(requests)),
        fleet=_describe_fleet(spec, profile),
        seed=seed,
        oracles=Oracles(
            unbounded=oracle_hit_rate(requests, block_size, None),
            prefill_caches=oracle_hit_rate(requests, block_size, prefill * spec.num_blocks),
            all_caches=oracle_hit_rate(requests, block_size, (prefill + decode) * spec.num_blocks),
        ),
    )
    progress = Console(stderr=True)
    for value in sorted(set(speed)):
        report.rows += _compare(spec, at_speed(requests, value), value, seed, report.oracles, progress)
    print_fleet(report, wide_console())
    write_json(report, json)


def _compare(
    spec: FleetSpec, requests: list[Request], speed: float, seed: int, oracles: Oracles, progress: Console
) -> list[FleetRow]:
    """Run each policy on the same requests, the baseline first."""
    rows: list[FleetRow] = []
    for name in POLICIES:
        progress.print(f"speed {speed:g}: {name} ...", highlight=False)
        timeline = Timeline()
        random.seed(seed)  # the router draws from the module `random`, so that frontends differ
        result = Fleet(spec, partial(_make_policy, name, spec, timeline, seed), timeline).run(requests)
        rows.append(fleet_row(speed, name, result, oracles, rows[0] if rows else None))
    return rows


POLICIES = (BASELINE, "power of two", "baton, remote", "baton, predicted")


def _make_policy(name: str, spec: FleetSpec, timeline: Timeline, seed: int) -> Policy:
    pools = spec.names("prefill"), spec.names("decode")
    if name == BASELINE:
        return RoundRobin(*pools)
    if name == "power of two":
        return PowerOfTwo(*pools, seed)
    is_remote = name == "baton, remote"
    placement = RemotePlacement(policy="remote") if is_remote else PredictedPlacement()
    return Baton(RoutingConfig(placement=placement), SloConfig(), timeline)


def _describe_workload(trace: Path, requests: list[Request], num_left_out: int) -> str:
    count = len(requests)
    prompt = sum(request.input_tokens for request in requests) / count
    output = sum(request.output_tokens for request in requests) / count
    left_out = f", {num_left_out} left out as too long" if num_left_out else ""
    return (
        f"trace {trace.name}: {count} requests in {requests[-1].at_s:.0f} s as recorded, prompts of {prompt:.0f} and "
        f"outputs of {output:.0f} tokens on average{left_out}"
    )


def _describe_fleet(spec: FleetSpec, profile: str) -> str:
    num_tokens = spec.num_blocks * spec.block_size
    return (
        f"{spec.num_prefill} prefill and {spec.num_decode} decode replicas of the sim engine, profile {profile}, each "
        f"with {spec.num_blocks} blocks of {spec.block_size} ({num_tokens} tokens) and {spec.max_num_batched_tokens} "
        f"tokens per step; loads and KV events are {spec.message_s * 1e3:g} ms old"
    )


@bench_routing.command()
def goodput(
    only: Annotated[str, typer.Option(help="Only scenarios whose names contain this.")] = "",
    traces: Annotated[Path | None, typer.Option(help=f"A folder with Mooncake's traces, of {TRACE_URL}")] = None,
    quick: Annotated[bool, typer.Option(help="A third of each load's time, to see whether all runs.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Run so many at a time.")] = 1,
    profile: Annotated[str, typer.Option(help="Timing profile of the sim engine: a name or a file.")] = "h200-llama-8b",
    seed: Seed = 0,
    json: Json = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it there: .svg, .png or .pdf.")] = None,
) -> None:
    """Compare the default's goodput with that of fixed ways; fails if it is below 0.97 of the best of them anywhere."""
    check_files(json, picture)
    scenarios = [
        scenario.shortened(QUICK) if quick else scenario
        for scenario in SCENARIOS
        if only.lower() in scenario.name.lower() and (traces is not None or not isinstance(scenario.load, Trace))
    ]
    if not scenarios:
        raise ConfigError("--only", f"no scenario's name contains {only!r}")
    source = this_run("python", "-m", "benchmarks.routing")
    report = GoodputReport(source=source, fleet=describe_goodput_fleet(profile), seed=seed)
    progress = Console(stderr=True)
    for row in compare(scenarios, load_profile(profile), seed, traces, processes):
        progress.print(f"{row.scenario}: {row.share_of_best:.2f} of {row.best_fixed}", highlight=False)
        report.rows.append(row)
    print_goodput(report, wide_console())
    write_json(report, json)
    if picture is not None:
        goodput_picture.draw(report, picture)
    if report.lost:
        raise typer.Exit(1)


@bench_routing.command()
def decisions(
    replicas: Annotated[list[int], typer.Option(min=1, help="Of each pool; repeatable.")] = FLEET_SIZES,
    tokens: Annotated[list[int], typer.Option(min=1, help="Of the prompt; repeatable.")] = PROMPT_LENGTHS,
    matching: Annotated[
        list[int], typer.Option(min=0, help="Replicas of each pool with the prompt cached; repeatable.")
    ] = MATCHING,
    blocks: Annotated[int, typer.Option(min=0, help="In each pool's index.")] = 1_000_000,
    repeat: Annotated[int, typer.Option(min=2, help="Decisions for each line.")] = 200,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure how long one decision takes, by the size of the fleet and of the prompt."""
    check_files(json, None)
    report = DecisionReport(source=this_run(), num_blocks=blocks, repeat=repeat, seed=seed)
    lines = measure_decisions(replicas, tokens, matching, num_blocks=blocks, repeat=repeat, seed=seed)
    progress = Console(stderr=True)
    for row in lines:
        progress.print(
            f"{row.num_replicas} replicas, {row.prompt_tokens} tokens: {row.median_us:.0f} us", highlight=False
        )
        report.rows.append(row)
    print_decisions(report, wide_console())
    write_json(report, json)


@bench_routing.command()
def tenants(
    profile: Annotated[str, typer.Option(help="Timing profile of the sim engine: a name or a file.")] = "h200-llama-8b",
    seconds: Annotated[float, typer.Option(min=2 * SETTLED_S, help="Of each load, in virtual time.")] = 60.0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Measure what a tenant's flood does to another one, and how overload is refused, in virtual time."""
    check_files(json, None)
    times = load_profile(profile)
    report = TenantsReport(source=this_run(), profile=profile, seed=seed)
    for num_prefill, num_decode, num_frontends in TENANT_FLEETS:
        spec = FleetSpec(
            profile=times,
            num_prefill=num_prefill,
            num_decode=num_decode,
            num_blocks=int(KV_GB * 1e9 / times.kv_bytes_per_token / 64),
            block_size=64,
            num_frontends=num_frontends,
        )
        report.fleets.append(measure_tenants(spec, SloConfig(), seconds, seed))
    print_tenants(report, wide_console())
    write_json(report, json)


@bench_routing.command()
def placement(
    url: Annotated[str, typer.Argument(help="Where Baton serves a disaggregated model.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    longest: Annotated[int, typer.Option(min=64, help="Tokens of the longest prompts.")] = 3_000,
    repeat: Annotated[int, typer.Option(min=1, help="Prompts of each case and way.")] = 5,
    json: Json = None,
) -> None:
    """Compare the choice between local and remote prefill, and the predicted times, with what both ways really take."""
    check_files(json, None)
    _, base_url = parse_url("URL", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        card = find_card("URL", client, model)
        vocabulary = find_vocabulary(client, card["id"])
        version = find_version(client)
    if card.get("mode") != "disaggregated" or not card.get("local_prefill"):
        raise ConfigError(
            "URL", f"{card['id']} there has no choice: it needs a prefill pool, and local prefill as well"
        )
    about = (
        f"{card['id']} ({card['engine']}, vLLM's server {version}) at {base_url}, {repeat} prompts of each case and way"
    )
    report = PlacementReport(source=this_run(), server=about)
    progress = Console(stderr=True)

    async def measure() -> None:
        async for result in measure_placement(base_url, card["id"], vocabulary, longest, repeat, random.Random()):
            report.results.append(result)
            progress.print(f"{result.case.title}: {result.better} is better", highlight=False)

    asyncio.run(measure())
    print_placement(report, wide_console())
    write_json(report, json)


if __name__ == "__main__":
    run_app(bench_routing, "benchmarks.routing")
