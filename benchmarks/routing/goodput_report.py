"""The results of ``python -m benchmarks.routing goodput``, as JSON and as Markdown."""

from __future__ import annotations

import msgspec
from rich.console import Console

from app.bench.report import Source, markdown_table
from benchmarks.routing.goodput import BLOCK_SIZE, FIXED, KV_GB, LEAST_SHARE, WAYS, WINDOW_S, GoodputRow
from benchmarks.routing.report import print_source

SETTLES_WITHIN_S = 10.0
"""The longest time that the default may take to settle after a change of the load."""


class GoodputReport(msgspec.Struct, kw_only=True):
    """All results of the goodput benchmark."""

    source: Source
    fleet: str
    seed: int
    rows: list[GoodputRow] = []

    @property
    def lost(self) -> list[GoodputRow]:
        """The rows in which the default is too far below the best fixed way."""
        return [row for row in self.rows if row.is_lost]


def print_goodput(report: GoodputReport, console: Console) -> None:
    """Print the tables, and in how many scenarios the default lost."""
    print_source(report.source, [report.fleet, f"seed {report.seed}"], console)
    columns = ["for", "fleet", "TTFT, TPOT ms", "offered", "default", *FIXED, "oracle", "of best", "verdict"]
    table = markdown_table(["scenario", *columns], "Goodput: requests/s within the limits, in virtual time")
    for row in report.rows:
        default = row.by_contender["default"]
        table.add_row(
            *(row.scenario, "held out" if row.is_held_out else "tuning", row.fleet, row.slo),
            *(f"{default.num_requests / default.arrival_s:.2f}", f"{default.goodput_per_s:.2f}"),
            *(f"{row.by_contender[contender].goodput_per_s:.2f}" for contender in FIXED),
            *(
                f"{row.oracle_share * default.num_requests / default.arrival_s:.2f}",
                f"{row.share_of_best:.2f}",
                "LOST" if row.is_lost else "",
            ),
        )
    console.print(table)
    console.print()
    _print_default(report, console)
    _print_settlings(report, console)
    _print_measured(report, console)
    for line in _verdicts(report):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_default(report: GoodputReport, console: Console) -> None:
    columns = ["TTFT p50 ms", "p99", "TPOT mean ms", "p99", "refused", *WAYS]
    table = markdown_table(["scenario", *columns], "What the default does: latencies, and the ways of its requests")
    for row in report.rows:
        default = row.by_contender["default"]
        table.add_row(
            *(row.scenario, f"{default.ttft_p50_s * 1e3:.0f}", f"{default.ttft_p99_s * 1e3:.0f}"),
            *(f"{default.tpot_mean_s * 1e3:.1f}", f"{default.tpot_p99_s * 1e3:.1f}", f"{default.num_refused}"),
            *(f"{default.by_way[way]:.0%}" for way in WAYS),
        )
    console.print(table)
    console.print()


def _print_settlings(report: GoodputReport, console: Console) -> None:
    columns = ["change at s", "settled after s", "steady share in time", "swing of ways", "verdict"]
    title = f"After a change of the load: windows of {WINDOW_S} s"
    table = markdown_table(["scenario", *columns], title)
    for row in report.rows:
        for each in row.settlings:
            is_late = each.settled_after_s > SETTLES_WITHIN_S
            table.add_row(
                *(row.scenario, f"{each.change_s:g}", f"{each.settled_after_s:g}", f"{each.steady_share:.0%}"),
                *(f"{each.swing:.0%}", "LATE" if is_late else ""),
            )
    if table.row_count:
        console.print(table)
        console.print()


def _print_measured(report: GoodputReport, console: Console) -> None:
    """Print how far the simulation is from real engines, where these were measured."""
    columns = ["way", "offered", "measured", "simulated", "error", "of offered"]
    table = markdown_table(["scenario", *columns], "Goodput until the last answer: two H200s, and here")
    for row in report.rows:
        for way, measured in row.measured.items():
            here = row.by_contender[way]
            simulated, offered = here.num_good / here.end_s, here.num_requests / here.arrival_s
            table.add_row(
                *(row.scenario, way, f"{offered:.2f}", f"{measured:.2f}", f"{simulated:.2f}"),
                *(f"{simulated / measured - 1:+.0%}" if measured else "-", f"{(simulated - measured) / offered:+.0%}"),
            )
    if table.row_count:
        console.print(table)
        console.print()


def _verdicts(report: GoodputReport) -> list[str]:
    lines = []
    for name, is_held_out in (("tuning", False), ("held out", True)):
        rows = [row for row in report.rows if row.is_held_out == is_held_out]
        if rows:
            num_lost = sum(row.is_lost for row in rows)
            worst = min(rows, key=lambda row: row.share_of_best)
            lines.append(
                f"{name}: the default is below {LEAST_SHARE:g} of the best fixed way in {num_lost} of {len(rows)} "
                f"scenarios; the least share is {worst.share_of_best:.2f} ({worst.scenario})"
            )
    return lines


def describe_goodput_fleet(profile: str) -> str:
    return (
        f"sim engines, profile {profile}, each with {KV_GB:g} GB of KV in blocks of {BLOCK_SIZE} tokens; "
        "aggregated has as many replicas as prefill and decode together"
    )
