"""What a campaign found: by kind of fault, how answers ended that were under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.faults.load import Answer, End, judge

ENDS: tuple[End, ...] = ("right", "refused", "ended", "cut", "hung", "wrong")


class Struck(msgspec.Struct, frozen=True):
    """One fault that was made.  Times are in seconds of the monotonic clock."""

    name: str
    began_at: float
    ended_at: float
    recovery_s: float | None
    """Until all replicas were back; None if that did not happen."""
    problem: str = ""
    """What the fault itself showed to be wrong."""
    seen: str = ""
    """What it measured."""


class Row(msgspec.Struct):
    """All faults of one kind."""

    name: str
    num_faults: int
    ends: Counter[str]
    longest_stall_s: float
    """The longest time that the client of a right answer waited for an event, of those that lasted during a fault."""
    longest_lag_s: float
    """How late the clients themselves got the CPU, at most."""
    recoveries_s: list[float]
    problems: list[str]

    @property
    def num_answers(self) -> int:
        return self.ends.total()


def summarise(
    struck: Sequence[Struck],
    answers: Sequence[Answer],
    right: Sequence[Answer],
    lags: Sequence[tuple[float, float]] = (),
) -> list[Row]:
    """Return a row for each kind.

    An answer counts for each fault during which it was under way, but one that is not right for the last fault that
    began before its end, and for no other: those before had not kept it from being right.
    """
    rows: dict[str, Row] = {}
    for fault in struck:
        row = rows.setdefault(fault.name, Row(fault.name, 0, Counter(), 0.0, 0.0, [], []))
        row.num_faults += 1
        if fault.recovery_s is not None:
            row.recoveries_s.append(fault.recovery_s)
        if fault.problem:
            row.problems.append(fault.problem)
        during = [lag_s for at, lag_s in lags if fault.began_at <= at <= fault.ended_at]
        row.longest_lag_s = max(row.longest_lag_s, *during, 0.0)
    for answer in answers:
        begun = [fault for fault in struck if fault.began_at <= answer.ended_at]
        if (end := judge(answer, right[answer.question])) != "right":
            befell = begun[-1:]
        else:
            befell = [fault for fault in begun if answer.began_at <= fault.ended_at]
        for fault in befell:
            row = rows[fault.name]
            row.ends[end] += 1
            if end == "right":
                row.longest_stall_s = max(row.longest_stall_s, answer.stall_s(fault.began_at, fault.ended_at))
    return sorted(rows.values(), key=lambda row: row.name)


def print_rows(rows: Sequence[Row], num_leaked: int, console: Console) -> None:
    table = Table(
        "fault",
        "times",
        "answers",
        *ENDS,
        "right %",
        "longest stall s",
        "clients late s",
        "whole after s",
        box=None,
        pad_edge=False,
    )
    total: Counter[str] = Counter()
    for row in rows:
        total += row.ends
        share = f"{row.ends['right'] / row.num_answers:.1%}" if row.num_answers else "-"
        recovery = f"{median(row.recoveries_s):.1f} (most {max(row.recoveries_s):.1f})" if row.recoveries_s else "-"
        table.add_row(
            row.name,
            str(row.num_faults),
            str(row.num_answers),
            *(str(row.ends[end]) for end in ENDS),
            share,
            f"{row.longest_stall_s:.1f}",
            f"{row.longest_lag_s:.1f}",
            recovery,
        )
    console.print(table)
    num = sum(row.num_faults for row in rows)
    console.print(
        f"{num} faults, {total.total()} answers: {total['wrong']} wrong, {total['hung']} hung, {num_leaked} KV blocks "
        "leaked"
    )
    for row in rows:
        for problem in dict.fromkeys(row.problems):
            console.print(f"{row.name}: {problem}", markup=False, soft_wrap=True)
