"""``baton bench``: the command."""

from __future__ import annotations

import math
import secrets
import signal
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from app.bench.client import use_key
from app.bench.endpoint import Endpoint, find_endpoint
from app.bench.load import LoadClient
from app.bench.measure import Benchmark, Workload
from app.bench.output import check_files, exit_in_order, write_files
from app.bench.report import (
    TABLE_WIDTH,
    Level,
    Report,
    print_report,
    this_run,
)
from app.bench.workload import GRAMMAR, LoadSpec, parse_lengths, read_trace
from app.cli.options import ApiKey
from app.errors import ConfigError

CONCURRENCY, INPUT, OUTPUT, REQUESTS = "1,8,32", "500", "64", 24
LIMITED = ("ttft", "tpot", "e2e")


def bench(
    url: Annotated[str, typer.Argument(metavar="[NAME=]URL", help="What to measure.")] = "http://127.0.0.1:8000",
    against: Annotated[str | None, typer.Option(metavar="[NAME=]URL", help="Measured side by side with it.")] = None,
    model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models.")] = None,
    against_model: Annotated[str | None, typer.Option(help="By default the first of GET /v1/models there.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or id; by default the model's root if it is a folder here, or its name.")
    ] = None,
    pid: Annotated[
        list[int] | None, typer.Option(help="A server's process here, for its CPU time; repeatable.")
    ] = None,
    against_pid: Annotated[list[int] | None, typer.Option(help="The same for --against.")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help=f"Closed loop: comma-separated numbers of streams ({CONCURRENCY}).")
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Open loop: comma-separated requests/s.")] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Open loop: 1 (default) is a Poisson process, less is more bursty.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help=f"Per level, at least ({REQUESTS}); never under 4 per stream or 10 s of arrivals."),
    ] = None,
    input_lengths: Annotated[str | None, typer.Option("--input", help=f"Prompt tokens ({INPUT}): {GRAMMAR}.")] = None,
    output_lengths: Annotated[str | None, typer.Option("--output", help=f"Output tokens ({OUTPUT}).")] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prompts begin with a shared prefix of so many; those of --input follow.")
    ] = None,
    prefixes: Annotated[int | None, typer.Option(min=1, help="How many prefixes there are (1).")] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay this trace in Mooncake's format.")] = None,
    speed: Annotated[str | None, typer.Option(help="Trace: comma-separated, how many times as fast (1).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Trace: only its first requests.")] = None,
    slo: Annotated[
        str | None, typer.Option(help="Limits in ms for goodput, such as ttft:500,tpot:50,e2e:4000.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn; by default another in each run.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="How often each level is measured.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw one page: .svg, .png or .pdf.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Measure an OpenAI endpoint that already runs, alone or side by side with another.

    Prompts are token ids, sent to /v1/completions with ignore_eos, as vLLM, SGLang and Baton understand them.
    A server that was measured with the same --seed before answers from its prefix cache.
    """
    use_key(api_key)
    check_files(json, picture)
    closed_or_open = {"--concurrency": concurrency, "--rate": rate, "--burstiness": burstiness}
    drawing = {"--input": input_lengths, "--output": output_lengths, "--requests": requests}
    prefix = {"--prefixes": prefixes, "--prefix-tokens": prefix_tokens}
    if trace is not None:
        _refuse("--trace brings its own", {**drawing, **prefix, **closed_or_open})
        levels = [Level(speed=value) for value in _numbers("--speed", speed or "1")]
        workload = Workload(f"trace {trace.name}", trace=read_trace(trace, limit))
    else:
        _refuse("there is no --trace", {"--speed": speed, "--limit": limit})
        levels = _levels(concurrency, rate, burstiness)
        lengths = (input_lengths or INPUT, output_lengths or OUTPUT)
        workload = _drawn(*lengths, requests or REQUESTS, burstiness, prefix_tokens, prefixes)
    endpoints = [find_endpoint("URL", url, model, tokenizer, pid or [])]
    if against is None:
        _refuse("there is no --against", {"--against-model": against_model, "--against-pid": against_pid})
    else:
        endpoints.append(find_endpoint("--against", against, against_model, tokenizer, against_pid or [], "--against-"))
    report = Report(
        **msgspec.structs.asdict(this_run()),
        baseline=endpoints[-1].name,
        endpoints=_distinct(endpoints),
        workload=workload.title,
        seed=str(secrets.randbelow(1_000_000) if seed is None else seed),
        limits_ms=_limits(slo),
    )
    _run(report, workload, levels, repetitions, json, picture)


def _refuse(reason: str, options: Mapping[str, object]) -> None:
    """Raise ConfigError if any of these options was given."""
    for option, value in options.items():
        if value is not None:
            raise ConfigError(option, f"does nothing here: {reason}")


def _levels(concurrency: str | None, rate: str | None, burstiness: float | None) -> list[Level]:
    if rate is None:
        _refuse("there is no --rate", {"--burstiness": burstiness})
        numbers = _numbers("--concurrency", concurrency or CONCURRENCY)
        if any(number != int(number) for number in numbers):
            raise ConfigError("--concurrency", f"{concurrency!r} are not whole numbers")
        return [Level(concurrency=int(number)) for number in numbers]
    _refuse("--rate is an open loop", {"--concurrency": concurrency})
    return [Level(rate=number) for number in _numbers("--rate", rate)]


def _numbers(option: str, text: str) -> list[float]:
    """Parse comma-separated numbers above 0.  Returns each once, in rising order.  Raises ConfigError."""
    try:
        numbers = sorted({float(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(option, f"{text!r} are no comma-separated numbers") from None
    if numbers[0] <= 0 or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(option, f"{text!r}: every number has to be above 0")
    return numbers


def _limits(text: str | None) -> dict[str, float]:
    """Parse ``--slo``.  Returns the limit of each latency in ms.  Raises ConfigError."""
    limits = {}
    for word in text.split(",") if text else []:
        name, _, value = word.strip().partition(":")
        if name not in LIMITED:
            raise ConfigError("--slo", f"there is no latency {name!r}; known are {', '.join(LIMITED)}")
        limits[name] = _numbers("--slo", value)[0]
    return limits


def _drawn(
    input_lengths: str,
    output_lengths: str,
    requests: int,
    burstiness: float | None,
    prefix_tokens: int | None,
    prefixes: int | None,
) -> Workload:
    if prefix_tokens is None:
        _refuse("there are no --prefix-tokens", {"--prefixes": prefixes})
    if burstiness is not None and not 0 < burstiness < math.inf:
        raise ConfigError("--burstiness", "has to be above 0")
    num_prefixes = (prefixes or 1) if prefix_tokens else 0
    shared = f" after one of {num_prefixes} shared prefixes of {prefix_tokens}" if num_prefixes else ""
    spec = LoadSpec(
        concurrency=None,
        num_requests=requests,
        input_tokens=parse_lengths("--input", input_lengths),
        output_tokens=parse_lengths("--output", output_lengths),
        burstiness=burstiness or 1.0,
        num_prefixes=num_prefixes,
        prefix_tokens=prefix_tokens or 0,
    )
    return Workload(f"prompts of {input_lengths} tokens{shared}, outputs of {output_lengths}", spec)


def _distinct(endpoints: list[Endpoint]) -> list[Endpoint]:
    if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
        raise ConfigError("--against", f"both are called {endpoints[0].name!r}; write NAME=URL")
    return endpoints


def _run(
    report: Report, workload: Workload, levels: list[Level], repetitions: int, json: Path | None, picture: Path | None
) -> None:
    """Measure, then print and write the results, even if the benchmark is interrupted."""
    signal.signal(signal.SIGTERM, exit_in_order)
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="baton-bench-") as folder,
        closing(LoadClient(Path(folder, "log"))) as client,
    ):
        try:
            Benchmark(client, report, workload, console).run(levels, repetitions)
        finally:
            if report.measurements:
                print_report(report, Console(width=TABLE_WIDTH))
                write_files(report, json, picture)
            else:
                console.print("nothing was measured")
    if not report.measurements:
        raise typer.Exit(1)
