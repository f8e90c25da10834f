"""The report of ``python -m benchmarks.gpu``: JSON, and tables for a page in docs/benchmarks."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from app.bench.gpus import Gpu
from app.bench.report import Source, divide, markdown_table, shown
from benchmarks.gpu.measure import Application
from benchmarks.gpu.peer_copy import PeerCopy

REPOSITORY = Path(__file__).parents[2]
VERSIONS_OF = ("torch", "sglang", "ray", "nixl")
VERSION_TIMEOUT_S = 60.0
PAGE_WIDTH = 400


class Failure(msgspec.Struct, frozen=True):
    """A part that has no or not all numbers."""

    part: str
    reason: str


class GpuReport(Source, frozen=True, kw_only=True):
    """Everything that one run found.  The first of the applications is what variants are compared with."""

    commit: str
    gpus: list[Gpu]
    source: str
    device: str
    tensor_parallel_size: int
    sglang_versions: dict[str, str] = msgspec.field(default_factory=dict)
    """The versions in SGLang's environment."""
    peer_copies: list[PeerCopy] = msgspec.field(default_factory=list)
    applications: list[Application] = msgspec.field(default_factory=list)
    failures: list[Failure] = msgspec.field(default_factory=list)


def find_commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` where files have changed; empty outside of git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()


def versions_in(python: str) -> dict[str, str]:
    """Return the versions of VERSIONS_OF in another interpreter's environment; none if it does not run."""
    code = (
        "from importlib.metadata import distributions; import json; "
        f"print(json.dumps({{name: each.version for name in {VERSIONS_OF} for each in distributions(name=name)}}))"
    )
    try:
        answer = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return msgspec.json.decode(answer.stdout.splitlines()[-1], type=dict[str, str]) if answer.returncode == 0 else {}


def to_json(report: GpuReport) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def page(reports: Sequence[GpuReport]) -> str:
    """Return the Markdown page of one or several runs."""
    parts = [
        "# Baton on GPUs\n",
        "Times are medians in ms, of one request at a time on an idle machine.",
    ]
    for report in reports:
        parts += ["", *(f"{line}  " for line in describe(report))]
        parts += [_text(table) for table in tables(report) if table.row_count]
        parts += [f"Not measured: {failure.part}: {failure.reason}  " for failure in report.failures]
    return "\n".join(parts) + "\n"


def describe(report: GpuReport) -> list[str]:
    """Say where, when and of what a run's numbers are."""
    names = [f"{gpu.name} ({gpu.memory_mib} MiB)" for gpu in report.gpus]
    gpus = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "no GPU"
    driver = f", driver {report.gpus[0].driver}" if report.gpus else ""
    machine = report.machine
    lines = [
        f"{report.date}, {gpus}{driver}, {machine.num_cores} cores of {machine.cpu}, {machine.kernel}",
        f"model {report.source}, engines on {report.device}, tensor parallel {report.tensor_parallel_size}",
        _listed(report.versions),
        *([f"SGLang's environment: {_listed(report.sglang_versions)}"] if report.sglang_versions else []),
        f"commit {report.commit or 'unknown'}: `{report.command}`",
    ]
    for each in report.applications:
        sections = ("engine_args", "prefill_args", "decode_args", "environment")
        arguments = {name: getattr(each, name) for name in sections}
        given = "".join(f", {name} `{msgspec.json.encode(args).decode()}`" for name, args in arguments.items() if args)
        lines.append(f"{each.name}: {each.engine}, {each.mode}, ready after {each.ready_after_s:.0f} s{given}")
        if transport := next((hop.moved.transport for hop in each.hops if hop.moved.transport), ""):
            lines.append(f"{each.name}: KV by `{transport}`")
    return lines


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "versions unknown"


def tables(report: GpuReport) -> list[Table]:
    """Return every table; those without measurements are empty."""
    applications = report.applications
    return [
        first_table(applications),
        *(hop_table(each) for each in applications),
        copy_table(report.peer_copies),
        transfer_table(applications, report.peer_copies),
        steps_table(applications),
        cache_table(applications),
        ratio_table(applications),
        aggregated_table(applications),
    ]


def first_table(applications: Sequence[Application]) -> Table:
    """Return the TTFT of the first requests after the start."""
    table = markdown_table(
        ["target", "first", "second", "third"], "The first requests after the start and its probes: TTFT ms"
    )
    for each in applications:
        if each.first_ttfts_ms:
            shown = [_ms(value) for value in each.first_ttfts_ms]
            table.add_row(each.name, *shown, *[""] * (3 - len(shown)))
    return table


def hop_table(application: Application) -> Table:
    """Return TTFT by length and mode, what a remote prefill adds, and the phases of remote prefills."""
    modes = list(dict.fromkeys(mode for hop in application.hops for mode in hop.series))
    phases = list(dict.fromkeys(name for hop in application.hops for name in hop.phases_ms))
    has_difference = {"remote", "local"} <= set(modes)
    columns = ["prompt tokens", *(f"TTFT {mode}" for mode in modes), *(f"its first {mode}" for mode in modes)]
    columns += ["difference"] * has_difference + [f"2nd token after, {mode}" for mode in modes] + phases + ["n"]
    table = markdown_table(columns, f"{application.name}: time to first token, ms")
    for hop in application.hops:
        series = [hop.series.get(mode) for mode in modes]
        cells = [_ms(each.ttft_ms if each else None) for each in series]
        cells += [_ms(each.first.ttft_ms if each else None) for each in series]
        cells += [_ms(hop.difference_ms)] * has_difference
        cells += [_ms(each.second_token_ms if each else None) for each in series]
        cells += [_ms(hop.phases_ms.get(name)) for name in phases]
        table.add_row(str(hop.prompt_tokens), *cells, str(len(next(iter(hop.series.values())).answers)))
    return table


def transfer_table(applications: Sequence[Application], copies: Sequence[PeerCopy]) -> Table:
    """Return the rate of KV transfers beside that of the plain copy whose size is nearest."""
    columns = ["target", "prompt tokens", "MB each", "ms each", "GB/s", "peer copy GB/s", "share"]
    table = markdown_table(columns, "KV transfers by /stats, and a plain copy from GPU to GPU")
    for application in applications:
        for hop in application.hops:
            moved = hop.moved
            if not moved.num_transfers:
                continue
            each = moved.num_bytes / moved.num_transfers
            bound = nearest(copies, each)
            rate, bound_rate = moved.gb_per_s, bound.gb_per_s if bound else None
            table.add_row(
                *(application.name, str(hop.prompt_tokens), f"{each / 1e6:.1f}"),
                _ms(moved.seconds / moved.num_transfers * 1e3 if rate else None),
                *(_number(rate), _number(bound_rate), _number(divide(rate, bound_rate))),
            )
    return table


def copy_table(copies: Sequence[PeerCopy]) -> Table:
    """Return what plain copies take."""
    table = markdown_table(["MB", "ms", "GB/s"], "Plain copies from GPU to GPU, before any engine starts")
    for copy in copies:
        table.add_row(f"{copy.size_bytes / 1e6:.1f}", f"{copy.seconds * 1e3:.3f}", _number(copy.gb_per_s))
    return table


def nearest(copies: Sequence[PeerCopy], num_bytes: float) -> PeerCopy | None:
    """Return the copy whose size is nearest to `num_bytes`, by their ratio; None without copies."""

    def distance(copy: PeerCopy) -> float:
        return max(copy.size_bytes / num_bytes, num_bytes / copy.size_bytes)

    return min(copies, key=distance) if copies and num_bytes else None


def steps_table(applications: Sequence[Application]) -> Table:
    """Return the time of a decode step with one sequence."""
    table = markdown_table(["target", "ITL p50", "p99", "n"], "Decode steps of one sequence: ms for each token")
    for each in applications:
        if (steps := each.steps) is not None:
            table.add_row(each.name, _number(steps.p50_ms), _number(steps.p99_ms), str(len(steps.gaps_ms)))
    return table


def cache_table(applications: Sequence[Application]) -> Table:
    """Return the TTFT of prompts that are sent twice."""
    columns = ["target", "prompt tokens", "mode", "cold", "cached", "cold : cached", "cached tokens"]
    table = markdown_table(columns, "The same prompt again: TTFT ms")
    for application in applications:
        for each in application.cache:
            ratio = _number(divide(each.cold_ms, each.cached_ms))
            cells = (_ms(each.cold_ms), _ms(each.cached_ms), ratio, str(each.cached_tokens))
            table.add_row(application.name, str(each.prompt_tokens), each.mode, *cells)
    return table


def ratio_table(applications: Sequence[Application]) -> Table:
    """Return each variant's TTFT and ITL divided by those of the first application of the same engine and mode."""
    lengths = sorted({hop.prompt_tokens for each in applications for hop in each.hops})
    columns = ["target", "mode", *map(str, lengths), "ITL p50"]
    table = markdown_table(columns, "Variants: TTFT by prompt length, and ITL, as ratios to the base in the same run")
    bases: dict[tuple[str, str], Application] = {}
    for each in applications:
        base = bases.setdefault((each.engine, each.mode), each)
        if base is each:
            continue
        theirs = {hop.prompt_tokens: hop for hop in base.hops}
        itl = divide(_itl(each), _itl(base))
        for mode in dict.fromkeys(mode for hop in each.hops for mode in hop.series):
            ratios = {
                hop.prompt_tokens: divide(hop.series[mode].ttft_ms, theirs[hop.prompt_tokens].series[mode].ttft_ms)
                for hop in each.hops
                if hop.prompt_tokens in theirs and mode in hop.series
            }
            table.add_row(each.name, mode, *(_number(ratios.get(length)) for length in lengths), _number(itl))
    return table


def _itl(application: Application) -> float | None:
    return application.steps.p50_ms if application.steps else None


def aggregated_table(applications: Sequence[Application]) -> Table:
    """Return TTFT with prefill and decode apart beside that of the same engine aggregated."""
    columns = ["target", "prompt tokens", "apart", "aggregated", "difference", "ratio"]
    table = markdown_table(columns, "Prefill and decode apart against the same engine aggregated: TTFT ms")
    aggregated = {each.engine: each for each in applications if each.mode == "aggregated"}
    for each in applications:
        if each.mode == "aggregated" or each.engine not in aggregated:
            continue
        theirs = {hop.prompt_tokens: hop.series["auto"].ttft_ms for hop in aggregated[each.engine].hops}
        for hop in each.hops:
            if hop.prompt_tokens in theirs and "remote" in hop.series:
                ours, other = hop.series["remote"].ttft_ms, theirs[hop.prompt_tokens]
                cells = (_ms(ours), _ms(other), _ms(ours - other), _number(ours / other))
                table.add_row(each.name, str(hop.prompt_tokens), *cells)
    return table


def _text(table: Table) -> str:
    """Return a table as Markdown, under its title in bold."""
    console = Console(file=io.StringIO(), width=PAGE_WIDTH, color_system=None)
    title, table.title = str(table.title), None
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    lines = [line.strip() for line in file.getvalue().splitlines() if line.strip()]
    return "\n".join(["", f"**{title}**", "", *lines, ""])


def _ms(value: float | None) -> str:
    return shown(value, 1)


def _number(value: float | None) -> str:
    return shown(value, 2)
