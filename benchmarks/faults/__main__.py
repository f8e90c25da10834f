"""``python -m benchmarks.faults``: faults under load on an application that runs on this machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from app.bench.client import find_card, new_client, parse_url
from app.bench.output import check_files
from app.cli.entry import run_app, to_app
from benchmarks.faults.carrying_out import carry_out, choose
from benchmarks.faults.deployed import Deployed
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.kinds import kinds
from benchmarks.faults.load import Load
from benchmarks.faults.questions import PLAIN, draw_questions, sorts_of


def bench_faults(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where Baton serves, on this machine.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 100,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no other fault after so many minutes.")] = math.inf,
    only: Annotated[str, typer.Option(help="Only kinds whose names contain one of these, as: kill,stop.")] = "",
    in_a_row: Annotated[
        int | None,
        typer.Option(min=1, help="Losses of each storm; by default 25 on simulated engines, and 4 on real ones."),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="Streams of requests at a time.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Different ones.")] = 24,
    all_sorts: Annotated[
        bool, typer.Option(help="Ask real engines also for structured output, tool calls, penalties and more.")
    ] = True,
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
    found = choose(kinds(str(card["engine"]), in_a_row), only)
    model_id = str(card["id"])
    sorts = sorts_of(str(card["engine"])) if all_sorts else [PLAIN]
    load = Load(base_url, model_id, draw_questions(questions, seed, sorts), streams)
    carry_out(found, faults, Fleet(base_url, model_id, Deployed("baton")), load, seed, json, 60 * minutes)


if __name__ == "__main__":
    run_app(to_app(bench_faults), "benchmarks.faults")
