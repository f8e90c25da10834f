"""``python -m benchmarks.gpu``: measures Baton on the GPUs of this machine."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from app.bench.gpus import describe_gpus, too_few
from app.bench.output import check_files, exit_in_order
from app.bench.report import this_run
from app.cli.entry import run_app, to_app
from app.config import parse
from app.errors import ConfigError
from benchmarks.gpu.measure import Extent
from benchmarks.gpu.report import GpuReport, find_commit, page, versions_in
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.setup import Choice, Device, find_setups, find_variants, parse_args, serve_document

PARTS = ("peer-copy", "vllm", "sglang")
MEASUREMENTS = ("hop", "itl", "cache")
LENGTHS = {"cuda": "64,512,2048,8192,15000", "cpu": "64,512,2048"}
CACHE_LENGTHS = {"cuda": "2048,8192", "cpu": "1024"}


def measure(
    source: Annotated[str, typer.Option(help="The model, as in a Serve config.")] = "baton:shape/llama-8b",
    device: Annotated[Device, typer.Option(help="cpu is there to try the benchmark itself.")] = "cuda",
    parts: Annotated[str, typer.Option(help="What to run, comma-separated.")] = ",".join(PARTS),
    measurements: Annotated[str, typer.Option(help="Of each application, comma-separated.")] = ",".join(MEASUREMENTS),
    lengths: Annotated[str | None, typer.Option(help=f"Prompt tokens ({LENGTHS['cuda']}).")] = None,
    cache_lengths: Annotated[
        str | None, typer.Option(help=f"Those of prompts that are sent again ({CACHE_LENGTHS['cuda']}).")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Requests of each length and mode, after a first one.")] = 9,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of each engine.")] = 1,
    required_transport: Annotated[str, typer.Option(help="As transfer.required_transport.")] = "any",
    vllm_args: Annotated[str, typer.Option(metavar="JSON", help="Engine arguments of vLLM.")] = "{}",
    sglang_args: Annotated[str, typer.Option(metavar="JSON", help="Engine arguments of SGLang.")] = "{}",
    sglang_python: Annotated[str, typer.Option(help="Its interpreter; without one SGLang is left out.")] = "",
    variants: Annotated[
        str | None, typer.Option(help="Of vLLM, against it in the same run: names, or a YAML or JSON file.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Start nothing that would end later (s).")] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="How long one may take to start (s).")] = 240,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; by default another in each run.")] = None,
    json: Annotated[Path, typer.Option(help="Write all numbers there, after each measurement.")] = Path("gpu.json"),
    markdown: Annotated[
        Path | None, typer.Option("--page", help="Write the tables there; by default beside --json.")
    ] = None,
) -> None:
    """Measure TTFT with prefill and decode apart and together, KV transfers, decode steps and the prefix cache.

    Exits with 1 if there are too few GPUs, or if a part failed; what was measured is written in any case.
    """
    if device == "cuda" and (problem := too_few(2 * tensor_parallel_size)):
        typer.echo(problem)
        raise typer.Exit(1)
    check_files(json, None)
    chosen = _words("--parts", parts, PARTS)
    extent = Extent(
        lengths=_numbers("--lengths", lengths or LENGTHS[device]),
        cache_lengths=_numbers("--cache-lengths", cache_lengths or CACHE_LENGTHS[device]),
        repeat=repeat,
        parts=_words("--measurements", measurements, MEASUREMENTS),
    )
    setups = find_setups(
        Choice(
            engines=chosen,
            source=source,
            device=device,
            tensor_parallel_size=tensor_parallel_size,
            required_transport=required_transport,
            vllm_args=parse_args("--vllm-args", vllm_args),
            sglang_args=parse_args("--sglang-args", sglang_args),
            sglang_python=sglang_python,
            variants=find_variants(variants),
        )
    )
    for setup in setups:  # so that a mistake is said before anything starts
        parse(serve_document(setup, port=8000)["applications"][0]["args"])
    report = GpuReport(
        **msgspec.structs.asdict(this_run("python", "-m", "benchmarks.gpu")),
        commit=find_commit(),
        gpus=describe_gpus(),
        source=source,
        device=device,
        tensor_parallel_size=tensor_parallel_size,
        sglang_versions=versions_in(sglang_python) if sglang_python else {},
    )
    signal.signal(signal.SIGTERM, exit_in_order)
    runner = Runner(report, extent, seed, json, markdown or json.with_suffix(".md"), time_limit)
    if "peer-copy" in chosen:
        runner.copy(device)
    for setup in setups:
        runner.run(setup, start_timeout)
    Console().print(page([report]), markup=False, highlight=False, soft_wrap=True)
    if report.failures:
        raise typer.Exit(1)


def join(
    reports: Annotated[list[Path], typer.Argument(help="What --json of `measure` has written.")],
    markdown: Annotated[Path, typer.Option("--page", help="Write one page of them there.")],
) -> None:
    """Write one page of several runs, for docs/benchmarks."""
    try:
        found = [msgspec.json.decode(path.read_bytes(), type=GpuReport) for path in reports]
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError("REPORTS", str(error)) from None
    markdown.write_text(page(found))


def _words(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            raise ConfigError(option, f"{word!r} is unknown; known are {', '.join(known)}")
    return words


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(option, f"{text!r} are no comma-separated whole numbers") from None
    if min(numbers) < 1:
        raise ConfigError(option, f"{text!r}: a prompt has at least one token")
    return numbers


if __name__ == "__main__":
    run_app(to_app(measure, join), "benchmarks.gpu")
