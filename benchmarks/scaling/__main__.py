"""``python -m benchmarks.scaling``: waves of load on pools that scale."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from app.bench.client import find_card, new_client, parse_url
from app.bench.output import check_files
from app.bench.report import this_run
from app.cli.entry import run_app, to_app
from benchmarks.scaling import picture as scaling_picture
from benchmarks.scaling.report import ANSWER_TIMEOUT_S, ScalingReport, Wave
from benchmarks.scaling.runner import Runner, find


def bench_scaling(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where Baton serves, in this machine's Ray cluster.")] = (
        "http://127.0.0.1:8000"
    ),
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    wave: Annotated[float, typer.Option(min=1, help="Seconds that a wave lasts.")] = 60.0,
    pause: Annotated[float, typer.Option(min=1, help="Seconds of light load before, between and after them.")] = 60.0,
    light: Annotated[float, typer.Option(min=0.01, help="Requests/s of light load.")] = 1.0,
    prompts: Annotated[float, typer.Option(min=0.01, help="Requests/s of long prompts.")] = 3.0,
    outputs: Annotated[float, typer.Option(min=0.01, help="Requests/s of long outputs.")] = 4.0,
    long_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a long prompt.")] = 7500,
    long_output: Annotated[int, typer.Option(min=2, help="Tokens of a long output.")] = 500,
    slo: Annotated[tuple[float, float], typer.Option(metavar="TTFT ITL", help="The model's, in ms, to draw.")] = (
        2000,
        50,
    ),
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything there.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it there: .svg, .png or .pdf.")] = None,
) -> None:
    """Send a wave of long prompts, then one of long outputs, and see which pool grows.

    Exits with 1 if it was another than should.
    """
    check_files(json, picture)
    _, base_url = parse_url("URL", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        name = str(find_card("URL", client, model)["id"])
    quiet = Wave("light", pause, light, 200, 50)
    waves = [
        quiet,
        Wave("long prompts", wave, prompts, long_prompt, 20),
        quiet,
        Wave("long outputs", wave, outputs, 200, long_output),
        quiet,
    ]
    console = Console(highlight=False)
    runner = Runner(base_url, name, seed)
    asyncio.run(runner.run(waves, console))
    findings = find(waves, runner.samples, runner.requests)
    report = ScalingReport(
        **msgspec.structs.asdict(this_run()),
        model=name,
        ttft_target_ms=slo[0],
        itl_target_ms=slo[1],
        waves=waves,
        requests=runner.requests,
        samples=runner.samples,
        findings=findings,
    )
    _print(report, console)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    if picture is not None:
        scaling_picture.draw(report, picture)
    if not all(findings.values()):
        raise typer.Exit(1)


def _print(report: ScalingReport, console: Console) -> None:
    table = Table("load", "requests", "lost", "TTFT p50 ms", "p95 ms", "ITL p50 ms", "p95 ms", box=None, pad_edge=False)
    for kind in dict.fromkeys(wave.kind for wave in report.waves):
        mine = [request for request in report.requests if request.kind == kind]
        lost = sum(bool(request.error) for request in mine)
        ttfts = [request.ttft_s * 1e3 for request in mine if request.ttft_s is not None]
        itls = [request.itl_s * 1e3 for request in mine if request.itl_s is not None]
        table.add_row(kind, str(len(mine)), str(lost), *_quantiles(ttfts), *_quantiles(itls))
    console.print(table)
    _print_reasons(report, console)
    for finding, is_so in report.findings.items():
        console.print(f"{'yes' if is_so else 'NO '}  {finding}")


def _print_reasons(report: ScalingReport, console: Console) -> None:
    """Print each change of a target, and its reason."""
    for before, after in pairwise(report.samples):
        for name, pool in after.pools.items():
            was = before.pools.get(name, pool)
            if pool.target != was.target:
                change = f"{after.at_s:5.0f} s  {name}: {was.target} -> {pool.target}  {pool.reason}"
                console.print(change, markup=False, soft_wrap=True)


def _quantiles(values: Sequence[float]) -> list[str]:
    """Return the median and the 95th percentile."""
    ordered = sorted(values)
    return [f"{ordered[int(len(ordered) * share)]:.0f}" if ordered else "-" for share in (0.5, 0.95)]


if __name__ == "__main__":
    run_app(to_app(bench_scaling), "benchmarks.scaling")
