"""The waves of `python -m benchmarks.scaling`: what counts as lost, what as shown, and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.bench.report import this_run
from benchmarks.scaling import picture as scaling_picture
from benchmarks.scaling.report import Ended, PoolSample, Sample, ScalingReport, Wave, starts
from benchmarks.scaling.runner import Runner, find

LIGHT = Wave("light", 10, 1, 200, 50)
WAVES = [LIGHT, Wave("long prompts", 10, 3, 8000, 20), LIGHT, Wave("long outputs", 10, 4, 200, 500), LIGHT]
GOOD = [Ended("light", 1.0, 0.1, 0.01)]


def samples(prefill: dict[int, int], decode: dict[int, int]) -> list[Sample]:
    """One each second; the dictionaries say from which second on there are how many replicas."""

    def at(second: int, changes: dict[int, int]) -> PoolSample:
        number = next((n for since, n in sorted(changes.items(), reverse=True) if since <= second), 1)
        return PoolSample(number, number, "so much to do")

    return [
        Sample(float(second), {"prefill-m": at(second, prefill), "decode-m": at(second, decode), "frontend": at(0, {})})
        for second in range(51)
    ]


GREW = samples({12: 3, 25: 1}, {32: 3, 45: 1})


def test_waves_follow_one_another() -> None:
    assert starts(WAVES) == [0, 10, 20, 30, 40, 50]


def test_pools_that_scale_apart_show_all_of_it() -> None:
    found = find(WAVES, GREW, GOOD)
    assert len(found) == 7
    assert all(found.values())


@pytest.mark.parametrize(
    ("what", "watched", "requests"),
    [
        ("no request was lost", GREW, [*GOOD, Ended("light", 2.0, None, None, "status 500")]),
        ("no request was lost", GREW, []),
        ("long prompts grew prefill", samples({}, {32: 3, 45: 1}), GOOD),
        ("long prompts left decode alone", samples({12: 3, 25: 1}, {22: 2, 24: 1, 32: 3, 45: 1}), GOOD),
        ("long outputs grew decode", samples({12: 3, 25: 1}, {}), GOOD),
        ("long outputs left prefill alone", samples({12: 3, 25: 1, 44: 2, 46: 1}, {32: 3, 45: 1}), GOOD),
        ("prefill returned", samples({12: 3}, {32: 3, 45: 1}), GOOD),
        ("decode returned", samples({12: 3, 25: 1}, {32: 3}), GOOD),
    ],
)
def test_what_was_not_so_is_said(what: str, watched: list[Sample], requests: list[Ended]) -> None:
    assert not find(WAVES, watched, requests)[what]


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, 'data: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n', ""),
        (200, 'data: {"a": 1}\n\n', 'status 200, and the last line was data: {"a": 1}'),
        (503, "no replica", "status 503, and the last line was no replica"),
    ],
)
async def test_an_answer_counts_only_if_it_came_to_its_end(status: int, body: str, error: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text=body))
    runner = Runner("http://test", "m", seed=0)
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        await runner._send(client, WAVES[1])
    assert runner.requests[0].error == error
    assert (runner.requests[0].ttft_s is not None) == (status == 200)


async def test_a_connection_that_breaks_is_a_lost_request() -> None:
    def fail(request: httpx.Request) -> Any:
        raise httpx.ConnectError("refused")

    runner = Runner("http://test", "m", seed=0)
    async with httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(fail)) as client:
        await runner._send(client, LIGHT)
    assert "refused" in runner.requests[0].error


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    report = ScalingReport(
        **{name: getattr(this_run(), name) for name in this_run().__struct_fields__},
        model="m",
        ttft_target_ms=2000,
        itl_target_ms=50,
        waves=WAVES,
        requests=[*GOOD, Ended("long outputs", 33.0, 0.3, None)],
        samples=GREW,
        findings={},
    )
    scaling_picture.draw(report, tmp_path / "waves.png")
    assert (tmp_path / "waves.png").stat().st_size > 10_000
