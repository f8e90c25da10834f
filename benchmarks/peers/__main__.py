"""``python -m benchmarks.peers``: the command."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.console import Console

from app.bench.output import exit_in_order, write_files
from app.bench.report import TABLE_WIDTH, this_run
from app.cli.check import check_document
from app.cli.entry import run_app, to_app
from app.errors import ConfigError
from app.serve_document import load_document
from benchmarks.peers.report import PeersReport, environment_versions, print_all
from benchmarks.peers.runner import WARM_UP, Runner, Schedule
from benchmarks.peers.suites import SUITES
from benchmarks.peers.targets import Setup

SuiteName = Literal["engine", "control-plane", "paced"]
Prompts = Literal["text", "ids"]


def measure(
    config: Annotated[Path, typer.Argument(help="The Serve config file that Baton starts from.")] = Path(
        "serve_config.yaml"
    ),
    suite: Annotated[SuiteName, typer.Option(help="Real engines, or none: at full speed or paced.")] = "engine",
    environments: Annotated[
        Path | None, typer.Option(help="The peers' Python environments (benchmarks/peers/environments.sh).")
    ] = None,
    targets: Annotated[str | None, typer.Option(help="Comma-separated; by default all of the suite.")] = None,
    concurrency: Annotated[str, typer.Option(help="Comma-separated numbers of streams.")] = "1,8,32,128",
    requests: Annotated[int | None, typer.Option(min=1, help="Per load, at least; by default the suite's.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each target is started and measured.")] = 5,
    prompts: Annotated[Prompts, typer.Option(help="How prompts are sent; sglang-router takes text only.")] = "text",
    baseline: Annotated[str | None, typer.Option(help="What ratios refer to; by default the first target.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw one page: .svg, .png or .pdf.")] = None,
) -> None:
    """Start and measure Baton and its peers under the same load.  Takes a minute or two per target and repetition."""
    chosen = SUITES[suite]
    names = _names("targets", targets, chosen.targets) if targets else list(chosen.targets)
    schedule = Schedule(
        targets=names,
        concurrencies=[_positive("concurrency", word) for word in concurrency.split(",")],
        requests=requests or chosen.requests,
        requests_per_stream=chosen.requests_per_stream,
        repetitions=repetitions,
        is_text=prompts == "text",
    )
    document = load_document(config)
    folders = environments.absolute() if environments else None
    setup = Setup(document, check_document(document), folders, chosen.token_ms)
    report = PeersReport(
        **msgspec.structs.asdict(this_run("python", "-m", "benchmarks.peers")),
        device=setup.device if suite == "engine" else "",
        baseline=_names("baseline", baseline, names)[0] if baseline else names[0],
        workload=f"500 prompt tokens as {prompts}, 64 output tokens, no prompt twice, streamed, closed loop"
        + f", an engine step of {chosen.token_ms:g} ms" * bool(chosen.token_ms),
        seed=WARM_UP.seed,
        suite=suite,
        environments=environment_versions(setup.environments),
    )
    signal.signal(signal.SIGTERM, exit_in_order)
    folder = Path(tempfile.mkdtemp(prefix="baton-peers-"))
    console = Console(stderr=True)
    try:
        Runner(setup, schedule, report, folder, console).run()
    finally:
        # An interrupted benchmark, too, reports what it has measured so far.
        print_all(report, Console(width=TABLE_WIDTH))
        write_files(report, json, picture)
    if report.missing:
        console.print(f"logs: {folder}", highlight=False, soft_wrap=True)
    else:
        shutil.rmtree(folder)
    if not report.measurements:
        raise typer.Exit(1)


def _names(option: str, text: str, known: Collection[str]) -> list[str]:
    names = [word.strip() for word in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--{option}", f"there is no target {name!r}; known are {', '.join(known)}")
    return names


def _positive(option: str, word: str) -> int:
    if not word.strip().isdigit() or int(word) == 0:
        raise ConfigError(f"--{option}", f"{word!r} is no positive number")
    return int(word)


if __name__ == "__main__":
    run_app(to_app(measure), "benchmarks.peers")
