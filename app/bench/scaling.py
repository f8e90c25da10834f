"""``baton bench-scaling``: waves of long prompts and of long outputs on a running application, and what its pools do.

The waves are the test of pools that scale apart: long prompts must grow prefill alone, long outputs decode alone, and
both must be back at their least afterwards, with no request lost on the way.  The command says whether that was so.

The client is a small one of its own, since it has to know when each answer came (docs/decisions/0009 is about
`baton bench`, whose client keeps sums only); a chunk costs it 0.1 ms, which is nothing at the rates used here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import httpx
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from app.bench import scaling_picture
from app.bench.cli import check_files
from app.bench.endpoint import find_card, new_client, parse_url
from app.bench.report import Source, this_run

SAMPLE_S = 0.5
ANSWER_TIMEOUT_S = 300.0
VOCABULARY = range(1000, 2000)
"""Tokens that any model has; which ones they are makes no difference to the sim engine."""
WaveKind = Literal["light", "long prompts", "long outputs"]


class Wave(msgspec.Struct, frozen=True):
    """A time with one kind of load: a Poisson process of requests of one size."""

    kind: WaveKind
    duration_s: float
    rate: float
    """Requests/s."""
    input_tokens: int
    output_tokens: int


class Ended(msgspec.Struct, frozen=True):
    """One request, its times in seconds; `at_s` counts from the begin of the run."""

    kind: WaveKind
    at_s: float
    ttft_s: float | None
    itl_s: float | None
    """Mean over the answer; None for an answer of one chunk."""
    error: str = ""


class PoolSample(msgspec.Struct, frozen=True):
    """A deployment at one moment."""

    ready: int
    target: int
    reason: str


class Sample(msgspec.Struct, frozen=True):
    """All deployments at one moment."""

    at_s: float
    pools: dict[str, PoolSample]
    """By the deployment's name."""

    def pool(self, role: str) -> PoolSample:
        return next(pool for name, pool in self.pools.items() if name.startswith(role))


class ScalingReport(Source, frozen=True, kw_only=True):
    """A run of the waves."""

    model: str
    ttft_target_ms: float
    itl_target_ms: float
    waves: list[Wave]
    requests: list[Ended]
    samples: list[Sample]
    findings: dict[str, bool]
    """What was to be shown, and whether it was."""

    def wave_starts(self) -> list[float]:
        return starts(self.waves)


def starts(waves: Sequence[Wave]) -> list[float]:
    """When each wave begins, and at the end when the last one ends, in seconds."""
    return list(accumulate((wave.duration_s for wave in waves), initial=0.0))


def describe(wave: Wave) -> str:
    return f"{wave.kind}: {wave.rate:g} requests/s of {wave.input_tokens} + {wave.output_tokens} tokens"


class Runner:
    """Sends the waves and looks at the pools meanwhile."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self._url = url
        self._model = model
        self._random = Random(seed)
        self._began = time.monotonic()
        self.requests: list[Ended] = []
        self.samples: list[Sample] = []

    async def run(self, waves: Sequence[Wave], console: Console) -> None:
        self._began = time.monotonic()
        watching = asyncio.create_task(self._watch())
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            async with (
                httpx.AsyncClient(base_url=self._url, timeout=ANSWER_TIMEOUT_S, limits=limits) as client,
                asyncio.TaskGroup() as group,
            ):
                for wave, begin in zip(waves, starts(waves), strict=False):
                    console.print(f"{begin:5.0f} s  {describe(wave)} for {wave.duration_s:g} s")
                    for at_s in self._arrivals(wave, begin):
                        await self._sleep_until(at_s)
                        group.create_task(self._send(client, wave))
                    await self._sleep_until(begin + wave.duration_s)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        if not watching.cancelled():
            watching.result()  # raises what ended it

    def _now(self) -> float:
        return time.monotonic() - self._began

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self._now()))

    def _arrivals(self, wave: Wave, begin: float) -> Iterator[float]:
        at_s = begin
        while (at_s := at_s + self._random.expovariate(wave.rate)) < begin + wave.duration_s:
            yield at_s

    async def _send(self, client: httpx.AsyncClient, wave: Wave) -> None:
        body = {
            "model": self._model,
            "prompt": self._random.choices(VOCABULARY, k=wave.input_tokens),
            "max_tokens": wave.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        sent_at, times, last = self._now(), [], ""
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(self._now())
                    last = line or last
                error = "" if last == "data: [DONE]" else f"status {answer.status_code}, and the last line was {last}"
        except httpx.HTTPError as problem:
            error = repr(problem)
        itl_s = (times[-1] - times[0]) / (wave.output_tokens - 1) if len(times) > 1 else None
        self.requests.append(Ended(wave.kind, sent_at, times[0] - sent_at if times else None, itl_s, error))

    async def _watch(self) -> None:
        from app.running import read_status

        while True:
            status = (await asyncio.to_thread(read_status))[0]
            pools = {
                pool.name: PoolSample(pool.replicas.get("running", 0), pool.target, (pool.plan or {}).get("reason", ""))
                for pool in status.pools
            }
            self.samples.append(Sample(self._now(), pools))
            await asyncio.sleep(SAMPLE_S)


def find(waves: Sequence[Wave], samples: Sequence[Sample], requests: Sequence[Ended]) -> dict[str, bool]:
    """What the waves were to show, and whether they did."""
    found = {"no request was lost": bool(requests) and not any(request.error for request in requests)}
    grows: dict[WaveKind, tuple[str, str]] = {
        "long prompts": ("prefill", "decode"),
        "long outputs": ("decode", "prefill"),
    }
    begins = [(begin, wave.kind) for begin, wave in zip(starts(waves), waves, strict=False) if wave.kind != "light"]
    ends = [begin for begin, _ in begins[1:]] + [samples[-1].at_s]
    for (begin, kind), end in zip(begins, ends, strict=True):
        grown, still = grows[kind]
        meanwhile = [sample for sample in samples if begin <= sample.at_s <= end]
        found[f"{kind} grew {grown}"] = max(each.pool(grown).ready for each in meanwhile) > samples[0].pool(grown).ready
        found[f"{kind} left {still} alone"] = all(
            each.pool(still).target == samples[0].pool(still).target for each in meanwhile
        )
    for role in ("prefill", "decode"):
        found[f"{role} returned"] = samples[-1].pool(role).ready == samples[0].pool(role).ready
    return found


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
    """Each change of a target, and why."""
    for before, after in pairwise(report.samples):
        for name, pool in after.pools.items():
            was = before.pools.get(name, pool)
            if pool.target != was.target:
                change = f"{after.at_s:5.0f} s  {name}: {was.target} -> {pool.target}  {pool.reason}"
                console.print(change, markup=False, soft_wrap=True)


def _quantiles(values: Sequence[float]) -> list[str]:
    """The median and the 95th percentile."""
    ordered = sorted(values)
    return [f"{ordered[int(len(ordered) * share)]:.0f}" if ordered else "-" for share in (0.5, 0.95)]
