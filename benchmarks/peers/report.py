"""What this benchmark adds to the report of `baton bench`: versions by environment, and the cost of each process."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from app.bench.processes import Process, RoleMemory, role_of
from app.bench.report import MIB, Report, markdown_table, print_report
from benchmarks.peers.targets import ENVIRONMENTS


class RoleCost(msgspec.Struct, frozen=True):
    """CPU time of the processes in one role of a target under one load."""

    target: str
    repetition: int
    concurrency: int
    role: str
    cpu_ms_per_request: float


class PeersReport(Report, kw_only=True):
    """All results."""

    suite: str
    environments: dict[str, dict[str, str]]
    """The versions of the packages that matter in each peer's own environment."""
    role_costs: list[RoleCost] = msgspec.field(default_factory=list)


def environment_versions(environments: Path | None) -> dict[str, dict[str, str]]:
    """Return the versions of packages in each environment that exists."""
    found: dict[str, dict[str, str]] = {}
    if environments is None:
        return found
    for peer, (_, packages) in ENVIRONMENTS.items():
        folders = [str(path) for path in (environments / peer).glob("lib/python*/site-packages")]
        versions = {d.name: d.version for name in packages for d in metadata.distributions(name=name, path=folders)}
        if versions:
            found[peer] = versions
    return found


def cpu_by_role(before: list[Process], after: list[Process], roots: dict[int, str]) -> dict[str, float]:
    """Return the CPU seconds from one reading of a process tree to the next, by role."""
    earlier = {(process.pid, process.started_at): process.cpu_s for process in before}
    roles: dict[int, str] = {}
    seconds: dict[str, float] = {}
    for process in after:
        role = role_of(process.title, roots.get(process.pid), roles.get(process.parent, ""))
        roles[process.pid] = role
        used = process.cpu_s - earlier.get((process.pid, process.started_at), 0.0)
        seconds[role] = seconds.get(role, 0.0) + used
    return seconds


def control_plane_table(report: PeersReport) -> Table:
    """Return a table with a row per target: the cost of a request, the time to its first token, and the memory."""
    levels = sorted({m.concurrency for m in report.measurements})
    last = f"at c={levels[-1]}"
    columns = ["TTFT ms at c=1", *(f"CPU ms/req at c={level}" for level in levels)]
    columns += [f"tok/s/core {last}", f"tok/event {last}", "MiB at rest", "processes"]
    table = markdown_table(["target", *columns], title="What serving costs where the model costs nothing (medians)")
    for target in dict.fromkeys(m.target for m in report.measurements):
        table.add_row(*_control_plane_row(report, target, levels))
    return table


def _control_plane_row(report: PeersReport, target: str, levels: list[int]) -> list[str]:
    by_level = {c: [m for m in report.measurements if (m.target, m.concurrency) == (target, c)] for c in levels}
    cpu_ms = {c: _median([(m.cpu_s_per_request or 0.0) * 1000 for m in found]) for c, found in by_level.items()}
    last = levels[-1]
    per_request = _median([m.result.output_tokens / m.result.num_completed for m in by_level[last]])
    last_ms = cpu_ms[last]
    per_core = per_request / last_ms * 1000 if per_request is not None and last_ms else None
    memory = [f.memory for f in report.footprints if f.target == target]
    return [
        target,
        _text(_median([m.result.ttft_ms for m in by_level.get(1, [])]), 1),
        *(_text(cpu_ms[c], 2) for c in levels),
        _text(per_core, 0),
        _text(_median([m.result.tokens_per_chunk for m in by_level[last]]), 1),
        _text(_median([_total_mib(roles) for roles in memory]), 0),
        _text(_median([float(sum(role.num_processes for role in roles)) for roles in memory]), 0),
    ]


def _total_mib(roles: list[RoleMemory]) -> float:
    return sum(role.pss_bytes for role in roles) / MIB


def role_table(report: PeersReport) -> Table:
    """Return a table of CPU time per request by role, at the highest concurrency.  Roles below 1 % are left out."""
    last = max((cost.concurrency for cost in report.role_costs), default=0)
    table = markdown_table(
        ["target", "role", "CPU ms per request"], title=f"Where the CPU time goes at c={last} (medians)"
    )
    at_last = [cost for cost in report.role_costs if cost.concurrency == last]
    for target in dict.fromkeys(cost.target for cost in at_last):
        mine: dict[str, list[float]] = {}
        for cost in at_last:
            if cost.target == target:
                mine.setdefault(cost.role, []).append(cost.cpu_ms_per_request)
        medians = {role: median(values) for role, values in mine.items()}
        total = sum(medians.values())
        for role, value in sorted(medians.items(), key=lambda item: -item[1]):
            if value >= total / 100:
                table.add_row(target, role, f"{value:.2f}")
    return table


def _median(values: list[float | None] | list[float]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_all(report: PeersReport, console: Console) -> None:
    """Print the tables of `baton bench` and those of this module as Markdown."""
    print_report(report, console)
    for peer, versions in report.environments.items():
        listed = ", ".join(f"{name} {version}" for name, version in versions.items())
        console.print(f"{peer}: {listed}", soft_wrap=True, markup=False, highlight=False)
    tables = [role_table(report)] if report.measurements else []
    if report.measurements and report.suite != "engine":
        tables.insert(0, control_plane_table(report))
    for table in tables:
        console.print()
        console.print(table)
