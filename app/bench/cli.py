"""``baton bench``: the command."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from app import launch
from app.bench.report import TABLE_WIDTH, Report, describe_machine, installed_versions, print_report, to_json
from app.bench.runner import Runner, Schedule
from app.bench.targets import TARGETS, Setup
from app.errors import ConfigError


def bench(
    config: Annotated[Path, typer.Argument(help="The Serve config file that Baton starts from.")] = Path(
        "serve_config.yaml"
    ),
    targets: Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(TARGETS)}.")] = ",".join(TARGETS),
    concurrency: Annotated[str, typer.Option(help="Comma-separated numbers of streams.")] = "1,8,32",
    requests: Annotated[int, typer.Option(min=1, help="Per load, at least; never under 4 per stream.")] = 24,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each target is started and measured.")] = 3,
    baseline: Annotated[str | None, typer.Option(help="What ratios refer to; by default the first target.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything that was measured to this file.")] = None,
    ray_llm_python: Annotated[
        Path | None, typer.Option(help="The Python of Ray Serve LLM's environment (scripts/ray_llm_env.sh).")
    ] = None,
) -> None:
    """Measure Baton, plain vLLM and Ray Serve LLM under the same load.  Takes minutes per target and repetition."""
    names = _names("targets", targets, TARGETS)
    levels = [_positive("concurrency", word) for word in concurrency.split(",")]
    document = launch.load_document(config)
    setup = Setup(document, launch.check_document(document), ray_llm_python)
    report = Report(
        command=shlex.join(["baton", *sys.argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=installed_versions(),
        ray_llm_versions=installed_versions(ray_llm_python) if ray_llm_python else {},
        device=setup.device,
        baseline=_names("baseline", baseline, names)[0] if baseline else names[0],
    )
    signal.signal(signal.SIGTERM, _exit_in_order)
    folder = Path(tempfile.mkdtemp(prefix="baton-bench-"))
    console = Console(stderr=True)
    try:
        Runner(setup, Schedule(names, levels, requests, repetitions), report, folder, console).run()
    finally:
        # Also what an interrupted benchmark has measured so far.
        print_report(report, Console(width=TABLE_WIDTH))
        if json is not None:
            json.write_bytes(to_json(report))
    if report.missing:
        console.print(f"logs: {folder}", highlight=False, soft_wrap=True)
    else:
        shutil.rmtree(folder)
    if not report.measurements:
        raise typer.Exit(1)


def _exit_in_order(*_: object) -> None:
    """End the servers on a plain kill as on Ctrl-C; a second signal (`timeout` sends two) must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)


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
