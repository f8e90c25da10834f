"""Measures on a running server whether the choice between local and remote prefill is right.

Each case is a kind of prompt in a kind of situation.  Three prompts of that kind are served, none of which the server
has seen: one as the router chooses, one prefilled locally, one remotely.  The router's choice is right if it is the
faster one in the medians of the other two.  The predicted interference of a local prefill with the sequences that run
there counts as time of the local prefill.  Predicted and real TTFT come from the response header ``x-baton-explain``,
so both are the frontend's.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any, Literal

import httpx
import msgspec

from app.bench.client import describe, new_async_client
from app.errors import BatonError

Mode = Literal["auto", "local", "remote"]
MODES: tuple[Mode, ...] = ("auto", "local", "remote")
STREAM_TOKENS = 400
"""Output tokens of each sequence that keeps decode busy; when it has ended, another follows."""
WARM_UPS = 3
"""How many prompts of each length the router learns from, local and remote each, before anything is measured."""
ANSWER_TIMEOUT_S = 300.0
BUSY_TIMEOUT_S = 60.0
NEAR = 1.1
"""If the worse choice costs at most so many times what the better one costs, it hardly matters which is taken."""


class PlacementBenchError(BatonError):
    """The server did not answer as it should."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class Case(msgspec.Struct, frozen=True):
    """A kind of prompt in a kind of situation."""

    tokens: int
    history: Literal["none", "on decode", "on both"] = "none"
    """Where the first 90 % of the prompt are cached: nowhere, only on decode, or on prefill too."""
    streams: int = 0
    """Sequences that decode meanwhile."""
    queue: int = 0
    """Prompts of `tokens` tokens that are sent right before."""
    queue_way: Mode = "remote"
    """Where those are prefilled."""

    @property
    def title(self) -> str:
        parts = [f"{self.tokens} tokens"]
        if self.history != "none":
            parts.append(f"90 % cached {self.history}")
        if self.streams:
            parts.append(f"{self.streams} streams")
        if self.queue:
            parts.append(f"{self.queue} prompts waiting on {'prefill' if self.queue_way == 'remote' else 'decode'}")
        return ", ".join(parts)


def mixed_cases(longest: int) -> list[Case]:
    """Return the cases that are measured by default.  No prompt is longer than `longest` tokens."""
    lengths = [longest // 32, longest // 8, longest // 3, longest]
    return [
        *(Case(n) for n in lengths),
        *(Case(n, "on decode") for n in lengths[1:]),
        *(Case(n, "on both") for n in lengths[1:]),
        *(Case(n, streams=8) for n in lengths),
        *(Case(n, queue=4) for n in lengths[:3]),
        *(Case(n, queue=4, queue_way="local") for n in lengths[:3]),
    ]


class Sample(msgspec.Struct, frozen=True):
    """One request that was measured."""

    mode: Mode
    kind: Literal["local", "remote"]
    """How it was really prefilled."""
    ttft_ms: float
    predicted_ms: float | None
    """The predicted TTFT of a prefill of this kind."""
    interference_ms: float
    """What a local prefill would cost the others, as predicted."""
    cached_tokens: int
    expected_cached_tokens: int


class CaseResult(msgspec.Struct, frozen=True):
    """The results of one case.  Times are medians, in ms."""

    case: Case
    samples: list[Sample]

    def ttft_ms(self, mode: Mode) -> float:
        return median(s.ttft_ms for s in self.samples if s.mode == mode)

    @property
    def interference_ms(self) -> float:
        return median(s.interference_ms for s in self.samples)

    @property
    def costs_ms(self) -> dict[str, float]:
        """What a local and a remote prefill cost, in ms: the TTFT, and for a local one the interference."""
        return {"local": self.ttft_ms("local") + self.interference_ms, "remote": self.ttft_ms("remote")}

    @property
    def better(self) -> str:
        costs = self.costs_ms
        return min(costs, key=costs.__getitem__)

    @property
    def is_near(self) -> bool:
        costs = self.costs_ms.values()
        return max(costs) <= NEAR * min(costs)

    @property
    def choices(self) -> list[str]:
        return [s.kind for s in self.samples if s.mode == "auto"]

    @property
    def num_right(self) -> int:
        return sum(choice == self.better for choice in self.choices)


def prediction_errors(results: Sequence[CaseResult]) -> list[float]:
    """Return abs(predicted - real) / real of every request with a prediction for the prefill that it got; sorted."""
    samples = [sample for result in results for sample in result.samples]
    return sorted(abs(s.predicted_ms - s.ttft_ms) / s.ttft_ms for s in samples if s.predicted_ms is not None)


def cache_mismatches(results: Sequence[CaseResult]) -> int:
    """Return for how many requests the engines had cached another number of tokens than the router expected."""
    return sum(s.cached_tokens != s.expected_cached_tokens for result in results for s in result.samples)


class ExplainedClient:
    """A client of a running Baton that sends prompts which Baton has not seen, and reads the explanations."""

    def __init__(self, client: httpx.AsyncClient, model: str, vocabulary: Sequence[int], rng: random.Random) -> None:
        self._client = client
        self._model = model
        self._vocabulary = vocabulary
        self._rng = rng

    def new_prompt(self, num_tokens: int) -> list[int]:
        return self._rng.choices(self._vocabulary, k=num_tokens)

    async def complete(self, prompt: list[int], mode: Mode, max_tokens: int = 2) -> Sample:
        """Serve one prompt.  Raises PlacementBenchError."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "vllm_xargs": {"baton_prefill": mode},
        }
        try:
            answer = await self._client.post("/v1/completions", json=body, headers={"x-baton-explain": "1"})
        except httpx.HTTPError as error:
            raise PlacementBenchError(f"the server does not answer: {error!r}") from error
        if not answer.is_success:
            raise PlacementBenchError(f"/v1/completions answered {describe(answer)}")
        if "x-baton-explain" not in answer.headers:
            raise PlacementBenchError("answers have no header x-baton-explain: is this Baton?")
        explained = msgspec.json.decode(answer.headers["x-baton-explain"])[0]
        return _to_sample(mode, explained)

    @asynccontextmanager
    async def busy(self, streams: int) -> AsyncIterator[None]:
        """Keep `streams` sequences decoding while the block runs."""
        tasks = [asyncio.create_task(self._keep_decoding()) for _ in range(streams)]
        try:
            async with asyncio.timeout(BUSY_TIMEOUT_S):
                while tasks and await self._num_running() < streams:
                    for task in tasks:
                        if task.done():
                            task.result()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep_decoding(self) -> None:
        while True:
            await self.complete(self.new_prompt(16), "local", STREAM_TOKENS)

    async def _num_running(self) -> int:
        replicas = (await self._client.get("/stats")).json()["replicas"]
        return sum(replica.get("num_running", 0) for replica in replicas if replica["model"] == self._model)


def _to_sample(mode: Mode, explained: dict[str, Any]) -> Sample:
    expected, actual = explained["expected"], explained["actual"]
    ways = {way["kind"]: way for way in reversed(expected["ways"])}  # a whole one on prefill comes last
    return Sample(
        mode=mode,
        kind=actual["kind"],
        ttft_ms=actual["ttft_ms"],
        predicted_ms=ways[actual["kind"]]["ttft_ms"] if actual["kind"] in ways else None,
        interference_ms=ways["local"]["interference_ms"] if "local" in ways else 0.0,
        cached_tokens=actual["cached_tokens"],
        expected_cached_tokens=expected["cached_tokens"],
    )


async def warm_up(server: ExplainedClient, longest: int, repeat: int) -> None:
    """Let the router learn from local and remote prefills of several lengths, one request at a time."""
    for _ in range(repeat):
        for num_tokens in (longest // 32, longest // 8, longest // 3, longest):
            for mode in ("remote", "local"):
                await server.complete(server.new_prompt(num_tokens), mode)


async def measure_case(server: ExplainedClient, case: Case, repeat: int) -> CaseResult:
    """Serve `repeat` prompts of each mode, in turn, so that a drift of the machine affects all modes alike."""
    samples = []
    async with server.busy(case.streams):
        for number in range(repeat):
            for offset in range(len(MODES)):
                mode = MODES[(number + offset) % len(MODES)]
                samples.append(await _measure_once(server, case, mode))
    return CaseResult(case, samples)


async def _measure_once(server: ExplainedClient, case: Case, mode: Mode) -> Sample:
    prompt = server.new_prompt(case.tokens)
    if case.history != "none":
        await server.complete(prompt[: case.tokens * 9 // 10], "local" if case.history == "on decode" else "remote")
    waiting = [
        asyncio.create_task(server.complete(server.new_prompt(case.tokens), case.queue_way)) for _ in range(case.queue)
    ]
    await asyncio.sleep(0)  # so that they are sent before the measured prompt
    try:
        return await server.complete(prompt, mode)
    finally:
        await asyncio.gather(*waiting)


async def measure_placement(
    url: str, model: str, vocabulary: Sequence[int], longest: int, repeat: int, rng: random.Random
) -> AsyncIterator[CaseResult]:
    """Measure the mixed cases one after another.  Raises PlacementBenchError."""
    async with new_async_client(url, ANSWER_TIMEOUT_S) as client:
        server = ExplainedClient(client, model, vocabulary, rng)
        await warm_up(server, longest, WARM_UPS)
        for case in mixed_cases(longest):
            yield await measure_case(server, case, repeat)
