"""The gap that a client sees when its replica dies: what is killed, what counts, and what is compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, cast

import httpx
import psutil
import pytest
from rich.console import Console

from benchmarks.faults import gap
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.gap import GapMeasurement, _fitting
from benchmarks.faults.load import Answer
from benchmarks.faults.questions import Question

STEP_S, GAP_S = 0.02, 0.3


class OneReplica:
    """An application whose only decode replica is a process that sleeps; another one comes when it is gone."""

    url, model = "http://nowhere", "m"

    def __init__(self) -> None:
        self.replica = psutil.Popen(["sleep", "60"])
        self.num_killed = 0

    async def busy_decode_replica(self, timeout_s: float) -> str:
        return "r1"

    async def process_of(self, replica_id: str) -> psutil.Popen:
        assert replica_id == "r1"
        return self.replica

    async def until_succeeded(self, timeout_s: float) -> float:
        assert not self.replica.is_running()
        self.num_killed += 1
        self.replica = psutil.Popen(["sleep", "60"])
        return 0.0

    async def ask(
        self,
        client: httpx.AsyncClient,
        model: str,
        question: Question,
        on_begin: Callable[[httpx.Headers], None],
    ) -> Answer:
        """Answer with six tokens, of which those that come after a loss are late."""
        asked, began_at, heard_at = self.replica, time.monotonic(), []
        on_begin(httpx.Headers({"x-baton-explain": '[{"decode": {"replica": "r1"}}]'}))
        for _ in range(6):
            await asyncio.sleep(STEP_S)
            if not asked.is_running() and self.replica is asked:
                await asyncio.sleep(GAP_S)
                asked = psutil.Process()
            heard_at.append(time.monotonic())
        return Answer(0, began_at, heard_at[-1], status=200, texts=["right"], is_whole=True, heard_at=heard_at)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneReplica]:
    made = OneReplica()
    monkeypatch.setattr(gap, "ask", made.ask)
    yield made
    made.replica.kill()
    made.replica.wait()


async def test_each_answer_loses_its_replica_and_the_longest_wait_after_that_is_the_gap(
    fleet: OneReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explanation(self: Any, question: Question) -> dict[str, Any]:
        return {"resumed_cached_tokens": [448]}

    monkeypatch.setattr(GapMeasurement, "_explanation", explanation)
    measurement = GapMeasurement(cast("Fleet", fleet), "replica", 6, Random(1))
    row = await measurement.measure(500, 2)
    await measurement.close()
    assert fleet.num_killed == 3, "two streams, and the answer that is explained"
    assert len(row.gaps_s) == 2
    assert all(gap_s >= GAP_S for gap_s in row.gaps_s)
    assert STEP_S <= row.step_s < GAP_S
    assert (row.is_steady, row.ends, row.cached_tokens) == (True, {"right": 2}, 448)


def test_lengths_that_the_model_does_not_take_are_left_out_and_said() -> None:
    console = Console(record=True, width=120)
    assert _fitting("500,4000,30000", 7936, console) == [500, 4000]
    assert "at most 7936 tokens: [30000]" in console.export_text()
