"""Sends waves of long prompts and of long outputs to a running application, and records what its pools do.

The waves test that the pools scale separately.  Long prompts must make only prefill grow, and long outputs only decode.
Both must be back at their minimum afterwards, and no request may be lost.  The command says whether that was so.

vLLM's client, which sends the load of `baton bench` (docs/decisions/0009), is not used: it keeps only sums, but the
moment of each answer matters here.  This client takes 0.1 ms per chunk, which is negligible at the rates used here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from random import Random

import httpx
from rich.console import Console

from app.bench.client import EventParser, new_async_client
from benchmarks.scaling.report import (
    ANSWER_TIMEOUT_S,
    SAMPLE_S,
    VOCABULARY,
    Ended,
    PoolSample,
    Sample,
    Wave,
    WaveKind,
    describe,
    starts,
)


class Runner:
    """Sends the waves, and polls the pools meanwhile."""

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
        try:
            async with (
                new_async_client(self._url, ANSWER_TIMEOUT_S) as client,
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
            watching.result()  # raises the exception that ended it

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
        sent_at = self._now()
        times: list[float] = []
        try:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                error = await self._read(answer, times)
        except httpx.HTTPError as problem:
            error = repr(problem)
        itl_s = (times[-1] - times[0]) / (wave.output_tokens - 1) if len(times) > 1 else None
        self.requests.append(Ended(wave.kind, sent_at, times[0] - sent_at if times else None, itl_s, error))

    async def _read(self, answer: httpx.Response, times: list[float]) -> str:
        """Add the moment of each event to `times`.  Returns what was wrong with the answer; empty if nothing was."""
        last, parser = "", EventParser()
        if not answer.is_success:
            last = (await answer.aread()).decode(errors="replace")
        async for chunk in answer.aiter_bytes():
            for data in parser.feed(chunk):
                if data.startswith(b"{"):
                    times.append(self._now())
                last = f"data: {data.decode()}"
        if last == "data: [DONE]":
            return ""
        return f"status {answer.status_code}, and the last line was {last}"

    async def _watch(self) -> None:
        from deployments.application import read_status

        while True:
            status = (await asyncio.to_thread(read_status))[0]
            pools = {
                pool.name: PoolSample(pool.replicas.get("running", 0), pool.target, (pool.plan or {}).get("reason", ""))
                for pool in status.pools
            }
            self.samples.append(Sample(self._now(), pools))
            await asyncio.sleep(SAMPLE_S)


def find(waves: Sequence[Wave], samples: Sequence[Sample], requests: Sequence[Ended]) -> dict[str, bool]:
    """Return what the waves should show, and whether they did."""
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
