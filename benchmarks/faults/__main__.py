"""``python -m benchmarks.faults``: faults under load on an application that runs on this machine."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from app.bench.client import find_card, new_client, parse_url
from app.bench.output import check_files
from app.cli.entry import run_app, to_app
from app.errors import ConfigError
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.deployed import Deployed
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.kinds import draw, kinds
from benchmarks.faults.load import Load, draw_questions
from benchmarks.faults.report import print_rows, summarise

WIDTH = 160


def bench_faults(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where Baton serves, on this machine.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 100,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no other fault after so many minutes.")] = math.inf,
    only: Annotated[str, typer.Option(help="Only kinds whose names contain this.")] = "",
    streams: Annotated[int, typer.Option(min=1, help="Streams of requests at a time.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 24,
    seed: Annotated[int, typer.Option(help="Of faults, victims and prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything there.")] = None,
) -> None:
    """Kill, stop and flood what serves, while all answers are compared with those without faults.

    Exits with 1 if any answer was wrong or hung, if KV leaked, or if a fault showed what should not be.
    """
    check_files(json, None)
    _, base_url = parse_url("URL", url)
    with new_client(base_url, 30.0) as client:
        card = find_card("URL", client, model)
    found = [kind for kind in kinds(has_engines=card["engine"] != "sim") if only.lower() in kind.name.lower()]
    if not found:
        raise ConfigError("--only", f"no kind's name contains {only!r}")
    console = Console(highlight=False, width=WIDTH)
    load = Load(base_url, str(card["id"]), draw_questions(questions, seed), streams)
    campaign = Campaign(Fleet(base_url, str(card["id"]), Deployed("baton")), load, console)
    random = Random(seed)
    ended_early = asyncio.run(campaign.run(draw(found, faults, random), random, 60 * minutes))
    rows = summarise(campaign.struck, load.answers, load.right)
    print_rows(rows, campaign.num_leaked, console)
    if ended_early:
        console.print(ended_early, markup=False, soft_wrap=True)
    if json is not None:
        report = {"struck": campaign.struck, "answers": load.answers, "right": load.right, "rows": rows}
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    is_faulty = any(row.ends["wrong"] or row.ends["hung"] or row.problems for row in rows)
    if is_faulty or campaign.num_leaked or ended_early:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(to_app(bench_faults), "benchmarks.faults")
