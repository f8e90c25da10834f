"""The benchmark of the choice between local and remote prefill: its cases, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from benchmarks.routing.placement import (
    MODES,
    Case,
    CaseResult,
    ExplainedClient,
    Mode,
    PlacementBenchError,
    Sample,
    cache_mismatches,
    measure_case,
    mixed_cases,
    prediction_errors,
)


def sample(
    mode: Mode, kind: Any, ttft_ms: float, *, interference_ms: float = 0.0, cached: tuple[int, int] = (0, 0)
) -> Sample:
    """Predicted are always 10 ms locally and 20 ms remotely."""
    return Sample(mode, kind, ttft_ms, 10.0 if kind == "local" else 20.0, interference_ms, *cached)


class FakeBaton:
    """Prefills locally in 1 ms per token, remotely in 0.5 ms per token and 50 ms, and chooses as it is told."""

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self.served: list[tuple[str, int, int]] = []
        self.num_running = 0

    async def answer(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        if request.url.path == "/stats":
            return httpx.Response(200, json={"replicas": [{"model": "m", "num_running": self.num_running}]})
        body = json.loads(request.content)
        mode = body["vllm_xargs"]["baton_prefill"]
        num_tokens = len(body["prompt"])
        self.served.append((mode, num_tokens, body["max_tokens"]))
        if body["max_tokens"] > 2:
            await self.decode_for_ever()
        kind = self.choice if mode == "auto" else mode
        ttft_ms = num_tokens if kind == "local" else 50 + num_tokens / 2
        explained = {
            "expected": {"cached_tokens": 0, "ways": [{"kind": "remote", "ttft_ms": 70.0, "interference_ms": 0.0}]},
            "actual": {"kind": kind, "cached_tokens": 0, "ttft_ms": ttft_ms},
        }
        return httpx.Response(200, json={}, headers={"x-baton-explain": json.dumps([explained])})

    async def decode_for_ever(self) -> None:
        self.num_running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.num_running -= 1


def server(answer: Any) -> ExplainedClient:
    client = httpx.AsyncClient(base_url="http://baton", transport=httpx.MockTransport(answer))
    return ExplainedClient(client, "m", range(100), random.Random(1))


@pytest.mark.parametrize(("tokens", "better"), [(64, "local"), (400, "remote")])
@pytest.mark.parametrize("choice", ["local", "remote"])
async def test_a_choice_is_right_where_it_is_the_faster_way(tokens: int, better: str, choice: str) -> None:
    result = await measure_case(server(FakeBaton(choice).answer), Case(tokens), repeat=3)
    assert (result.better, result.is_near) == (better, False)
    assert (result.num_right, len(result.choices)) == (3 if choice == better else 0, 3)


async def test_a_case_is_made_before_its_prompt_is_sent() -> None:
    baton = FakeBaton("local")
    case = Case(100, "on both", queue=2)
    await measure_case(server(baton.answer), case, repeat=1)
    assert len(baton.served) == len(MODES) * 4
    for turn, mode in enumerate(MODES):
        history, *rest = baton.served[4 * turn : 4 * turn + 4]
        assert history == ("remote", 90, 2)
        assert sorted(rest) == sorted([("remote", 100, 2)] * 2 + [(mode, 100, 2)])


async def test_streams_run_while_a_case_is_measured_and_not_after() -> None:
    baton = FakeBaton("local")
    measured = server(baton.answer)
    async with measured.busy(3):
        assert baton.num_running == 3
    assert baton.num_running == 0


def test_interference_counts_as_time_of_the_local_way() -> None:
    samples = [
        sample("local", "local", 100.0, interference_ms=60.0),
        sample("remote", "remote", 150.0, interference_ms=60.0),
    ]
    result = CaseResult(Case(1), [*samples, sample("auto", "remote", 150.0, interference_ms=60.0)])
    assert (result.better, result.num_right, result.is_near) == ("remote", 1, True)


def test_errors_are_those_of_the_way_that_was_taken() -> None:
    samples = [sample("local", "local", 8.0), sample("remote", "remote", 40.0), sample("auto", "local", 10.0)]
    assert prediction_errors([CaseResult(Case(1), samples)]) == [0.0, 0.25, 0.5]


def test_cached_tokens_other_than_expected_are_counted() -> None:
    samples = [sample("auto", "local", 1.0, cached=(32, 32)), sample("auto", "local", 1.0, cached=(32, 0))]
    assert cache_mismatches([CaseResult(Case(1), samples)]) == 1


def test_the_mixed_set_fits_its_longest_prompt() -> None:
    assert max(case.tokens for case in mixed_cases(640)) == 640
    assert min(case.tokens for case in mixed_cases(64)) >= 1


@pytest.mark.parametrize(
    ("response", "said"),
    [
        (httpx.Response(503, text="no replica"), "503: no replica"),
        (httpx.Response(200, json={}), "x-baton-explain"),
    ],
)
async def test_an_answer_that_is_none_ends_it(response: httpx.Response, said: str) -> None:
    with pytest.raises(PlacementBenchError, match=said):
        await server(lambda request: response).complete([1], "auto")
