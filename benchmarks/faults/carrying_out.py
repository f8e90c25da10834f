"""Carries out a campaign and tells what came of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import typer
from rich.console import Console

from app.errors import ConfigError
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.fault import Fault
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.kinds import draw
from benchmarks.faults.load import Load
from benchmarks.faults.report import print_rows, summarise

WIDTH = 160


def choose(kinds: Sequence[Fault], only: str) -> list[Fault]:
    """Return the kinds whose names contain one of the parts of `only`.  Raises ConfigError if there are none."""
    parts = only.lower().split(",")
    found = [kind for kind in kinds if any(part in kind.name.lower() for part in parts)]
    if not found:
        raise ConfigError("--only", f"no kind's name contains one of {', '.join(parts)}")
    return found


def carry_out(
    kinds: Sequence[Fault],
    num: int,
    fleet: Fleet,
    load: Load,
    seed: int,
    json: Path | None,
    most_s: float = math.inf,
) -> None:
    """Strike `num` times, but begin nothing more `most_s` after the first; print the table, write all into `json`.

    Ctrl-C ends it early.

    Raises typer.Exit if any answer was wrong or hung, if KV leaked, or if a fault showed what should not be.
    """
    console = Console(highlight=False, width=WIDTH)
    campaign, random = Campaign(fleet, load, console), Random(seed)
    try:
        ended_early = asyncio.run(campaign.run(draw(kinds, num, random), random, most_s))
    except KeyboardInterrupt:
        ended_early = "it was interrupted"
    rows = summarise(campaign.struck, load.answers, load.right, load.lags)
    print_rows(rows, campaign.num_leaked, console)
    if ended_early:
        console.print(ended_early, markup=False, soft_wrap=True)
    if json is not None:
        report = {"struck": campaign.struck, "answers": load.answers, "right": load.right, "rows": rows}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    is_faulty = any(row.ends["wrong"] or row.ends["hung"] or row.problems for row in rows)
    if is_faulty or campaign.num_leaked or ended_early:
        raise typer.Exit(1)
