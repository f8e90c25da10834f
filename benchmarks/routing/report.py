"""The results of the routing benchmarks, as JSON and as Markdown."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from app.bench.report import TABLE_WIDTH, Source, markdown_table
from benchmarks.routing.decision_time import DecisionTime
from benchmarks.routing.fleet import FleetResult
from benchmarks.routing.placement import NEAR, CaseResult, cache_mismatches, prediction_errors

BASELINE = "round robin"
AIM_OF_ORACLE = 0.95
"""The least share of an oracle's hit rate.  If decode prefills too, both oracles are given: prefill's caches alone are
less than the fleet has, and those of both pools are more, because a prompt prefilled remotely takes room in both."""
AIM_OF_TTFT = 1 / 3
"""The greatest share of the baseline's mean TTFT."""
AIM_DECISION_US = 200.0
"""The greatest median time of a decision with AIM_REPLICAS replicas and AIM_TOKENS tokens."""
AIM_REPLICAS, AIM_TOKENS = 64, 8_000
AIM_RIGHT = 0.9


class Oracles(msgspec.Struct, frozen=True):
    """Hit rates that depend only on the trace and on the caches' sizes (benchmarks/routing/oracle.py)."""

    unbounded: float
    prefill_caches: float
    """The hit rate of one cache as large as those of the prefill pool together."""
    all_caches: float
    """The hit rate of one cache as large as those of both pools.  To reach it, every prompt would have to be in only
    one of the pools."""


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One policy at one speed of the trace.  Ratios compare with BASELINE at the same speed; below 1 is better."""

    speed: float
    policy: str
    num_requests: int
    num_refused: int
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    ttft_mean_ratio: float | None = None
    ttft_p50_ratio: float | None = None
    ttft_p99_ratio: float | None = None
    itl_mean_ms: float
    itl_p99_ms: float
    itl_mean_ratio: float | None = None
    itl_p99_ratio: float | None = None
    hit_rate: float
    of_prefill_oracle: float
    """`hit_rate` over `Oracles.prefill_caches`."""
    of_all_oracle: float
    """`hit_rate` over `Oracles.all_caches`."""
    local_share: float
    transferred_share: float
    """Prompt tokens whose KV moved, over prompt tokens."""
    prefill_busy: float
    decode_busy: float
    """Share of the time in which a replica computes; a decode replica with one sequence computes all the time."""
    predicted_to_actual_p10: float | None
    predicted_to_actual_p50: float | None
    predicted_to_actual_p90: float | None
    reasons: dict[str, int]


class FleetReport(msgspec.Struct, kw_only=True):
    """All results of the fleet benchmark."""

    source: Source
    workload: str
    fleet: str
    seed: int
    oracles: Oracles
    rows: list[FleetRow] = []


def fleet_row(speed: float, policy: str, result: FleetResult, oracles: Oracles, baseline: FleetRow | None) -> FleetRow:
    """Return the summary of one run."""
    import numpy as np

    ttft_ms, itl_ms = np.asarray(result.ttft_s) * 1e3, np.asarray(result.itl_s) * 1e3
    hit_rate = result.cached_tokens / result.prompt_tokens
    errors = np.asarray(result.predicted_to_actual)
    low, middle, high = (float(x) for x in np.percentile(errors, [10, 50, 90])) if len(errors) else (None,) * 3
    row = FleetRow(
        speed=speed,
        policy=policy,
        num_requests=len(ttft_ms) + result.num_refused,
        num_refused=result.num_refused,
        ttft_mean_ms=float(ttft_ms.mean()),
        ttft_p50_ms=float(np.percentile(ttft_ms, 50)),
        ttft_p99_ms=float(np.percentile(ttft_ms, 99)),
        itl_mean_ms=float(itl_ms.mean()),
        itl_p99_ms=float(np.percentile(itl_ms, 99)),
        hit_rate=hit_rate,
        of_prefill_oracle=hit_rate / oracles.prefill_caches,
        of_all_oracle=hit_rate / oracles.all_caches,
        local_share=result.num_local / len(ttft_ms),
        transferred_share=result.transferred_tokens / result.prompt_tokens,
        prefill_busy=result.prefill_utilisation,
        decode_busy=result.decode_utilisation,
        predicted_to_actual_p10=low,
        predicted_to_actual_p50=middle,
        predicted_to_actual_p90=high,
        reasons=dict(result.reasons.most_common()),
    )
    against = baseline or row
    ratios = {
        f"{name}_ratio": getattr(row, f"{name}_ms") / getattr(against, f"{name}_ms")
        for name in ("ttft_mean", "ttft_p50", "ttft_p99", "itl_mean", "itl_p99")
    }
    return msgspec.structs.replace(row, **ratios)


def print_fleet(report: FleetReport, console: Console) -> None:
    """Print two tables, and whether the aims were reached."""
    print_source(report.source, [report.workload, report.fleet, f"seed {report.seed}"], console)
    latencies = [
        "TTFT mean ms",
        "ratio",
        "p50 ms",
        "ratio",
        "p99 ms",
        "ratio",
        "ITL mean ms",
        "ratio",
        "p99 ms",
        "ratio",
    ]
    table = markdown_table(["speed", "target", *latencies], f"Latency: in virtual time; ratios to {BASELINE}")
    for row in report.rows:
        cells = [f"{row.speed:g}", row.policy]
        for name, digits in (("ttft_mean", 0), ("ttft_p50", 0), ("ttft_p99", 0), ("itl_mean", 2), ("itl_p99", 1)):
            cells += [f"{getattr(row, f'{name}_ms'):.{digits}f}", f"{getattr(row, f'{name}_ratio'):.2f}"]
        table.add_row(*cells)
    console.print(table)
    console.print()
    console.print(_caches_table(report))
    console.print()
    for line in [*_describe_oracles(report.oracles), *_fleet_aims(report)]:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _caches_table(report: FleetReport) -> Table:
    columns = ["hit rate", "of oracle P", "of oracle P+D", "local", "moved", "refused", "P busy", "D busy"]
    columns.append("predicted/actual TTFT p10 p50 p90")
    table = markdown_table(["speed", "target", *columns], "Caches, and where prompts went")
    for row in report.rows:
        quantiles = (row.predicted_to_actual_p10, row.predicted_to_actual_p50, row.predicted_to_actual_p90)
        table.add_row(
            *(f"{row.speed:g}", row.policy, f"{row.hit_rate:.1%}", f"{row.of_prefill_oracle:.1%}"),
            *(f"{row.of_all_oracle:.1%}", f"{row.local_share:.1%}", f"{row.transferred_share:.1%}"),
            *(f"{row.num_refused}", f"{row.prefill_busy:.0%}", f"{row.decode_busy:.0%}"),
            " ".join("-" if quantile is None else f"{quantile:.2f}" for quantile in quantiles),
        )
    return table


def _describe_oracles(oracles: Oracles) -> list[str]:
    return [
        f"oracles' hit rates, one LRU cache for all requests: unbounded {oracles.unbounded:.1%}; as large as prefill's "
        f"caches together (P) {oracles.prefill_caches:.1%}; as those of both pools (P+D) {oracles.all_caches:.1%}, "
        "though what is prefilled remotely takes room in both",
    ]


def _fleet_aims(report: FleetReport) -> list[str]:
    """Return for each of Baton's rows whether it reaches the aims."""
    lines = []
    for row in report.rows:
        if not row.policy.startswith("baton"):
            continue
        ratio = row.ttft_mean_ratio or 1.0
        of_oracles = {"P": row.of_prefill_oracle, **({"P+D": row.of_all_oracle} if row.local_share else {})}
        hits = ", ".join(
            f"{share:.1%} of oracle {name}: {_verdict(share >= AIM_OF_ORACLE)}" for name, share in of_oracles.items()
        )
        lines.append(
            f"aims: {row.policy} at speed {row.speed:g}: hit rate, aim {AIM_OF_ORACLE:.0%}: {hits}; "
            f"mean TTFT, aim {AIM_OF_TTFT:.2f} of {BASELINE}: {ratio:.2f}: {_verdict(ratio <= AIM_OF_TTFT)}"
        )
    return lines


def _verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "MISSED"


class DecisionReport(msgspec.Struct, kw_only=True):
    """All results on decision times."""

    source: Source
    num_blocks: int
    """How many blocks the index of each pool has."""
    repeat: int
    seed: int
    rows: list[DecisionTime] = []


def print_decisions(report: DecisionReport, console: Console) -> None:
    """Print one table, and whether the aim was reached."""
    what = f"{report.num_blocks:,} blocks in each pool's index, {report.repeat} decisions a line, seed {report.seed}"
    print_source(report.source, [what], console)
    columns = ["replicas per pool", "prompt tokens", "have it cached", "median us", "p99 us", "hashing alone us"]
    table = markdown_table(columns, "Time of one decision of Router.decide, hashing included")
    for row in report.rows:
        table.add_row(
            *(f"{row.num_replicas}", f"{row.prompt_tokens}", f"{row.num_matching}", f"{row.median_us:.0f}"),
            *(f"{row.p99_us:.0f}", f"{row.hashing_us:.0f}"),
        )
    console.print(table)
    console.print()
    for line in _decision_aims(report.rows):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _decision_aims(rows: list[DecisionTime]) -> list[str]:
    """Return whether the bound is kept at its size, and how the time grows there with matching and all replicas."""
    lines = []
    at_aim = [row for row in rows if (row.num_replicas, row.prompt_tokens) == (AIM_REPLICAS, AIM_TOKENS)]
    for row in at_aim:
        lines.append(
            f"aim: at {AIM_REPLICAS} replicas and {AIM_TOKENS} tokens, {row.num_matching} with it cached, below "
            f"{AIM_DECISION_US:.0f} us: {row.median_us:.0f} us: {_verdict(row.median_us < AIM_DECISION_US)}"
        )
    for first, last in pairwise([row for row in at_aim if row.num_matching]):
        growth, most = last.median_us / first.median_us, last.num_matching / first.num_matching
        lines.append(
            f"aim: from {first.num_matching} to {last.num_matching} replicas that have it cached at most {most:g} "
            f"times as long: {growth:.2f}: {_verdict(growth <= most)}"
        )
    for row in at_aim:
        alike = [r for r in rows if (r.prompt_tokens, r.num_matching) == (row.prompt_tokens, row.num_matching)]
        sizes = ", ".join(f"{r.median_us / row.median_us:.2f} at {r.num_replicas}" for r in alike)
        lines.append(
            f"by replicas per pool, {row.num_matching} with the prompt cached, in times of {row.num_replicas}: {sizes}"
        )
    return lines


class PlacementReport(msgspec.Struct, kw_only=True):
    """All results on the choice between local and remote prefill on a running server."""

    source: Source
    server: str
    results: list[CaseResult] = []


def print_placement(report: PlacementReport, console: Console) -> None:
    """Print one table, the errors of the predictions, and whether the aim was reached."""
    print_source(report.source, [report.server], console)
    columns = ["local TTFT ms", "remote TTFT ms", "interference ms", "better", "chosen so", "chosen TTFT ms"]
    table = markdown_table(["case", *columns], "Local or remote prefill: medians; interference is predicted")
    for result in report.results:
        times = (result.ttft_ms("local"), result.ttft_ms("remote"), result.interference_ms)
        better = f"{result.better}{' (near)' if result.is_near else ''}"
        chosen = f"{result.num_right} of {len(result.choices)}"
        table.add_row(
            result.case.title, *(f"{ms:.1f}" for ms in times), better, chosen, f"{result.ttft_ms('auto'):.1f}"
        )
    console.print(table)
    console.print()
    for line in _placement_aims(report.results):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _placement_aims(results: list[CaseResult]) -> list[str]:
    num, right = sum(len(r.choices) for r in results), sum(r.num_right for r in results)
    clear = [r for r in results if not r.is_near]
    num_clear, right_clear = sum(len(r.choices) for r in clear), sum(r.num_right for r in clear)
    errors = prediction_errors(results)
    quantiles = ", ".join(f"p{p} {errors[min(len(errors) - 1, len(errors) * p // 100)]:.0%}" for p in (50, 90))
    samples = sum(len(r.samples) for r in results)
    return [
        f"aim: the better way was chosen for at least {AIM_RIGHT:.0%} of the prompts: {right} of {num}, "
        f"{right / num:.0%}: {_verdict(right >= AIM_RIGHT * num)}; where one way is more than {NEAR - 1:.0%} better: "
        f"{right_clear} of {num_clear}, {right_clear / max(1, num_clear):.0%}",
        f"abs(predicted - real) / real TTFT of {len(errors)} requests: {quantiles}",
        f"cached tokens differed from what the router expected: {cache_mismatches(results)} of {samples} requests",
    ]


def print_source(source: Source, lines: list[str], console: Console) -> None:
    machine = source.machine
    where = f"{machine.num_cores} cores of {machine.cpu}, {machine.memory_gib:.0f} GiB, {machine.kernel}"
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    text = "\n".join(["", f"{source.date}, {where}", versions, *lines, source.command, ""])
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def write_json(report: msgspec.Struct, path: Path | None) -> None:
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))


def wide_console() -> Console:
    """Return a console that is as wide as the tables, however wide the terminal is."""
    return Console(width=TABLE_WIDTH)
