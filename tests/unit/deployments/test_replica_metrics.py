"""What a replica exports, and when."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.background import BackgroundTasks
from app.engines.base import EngineSpec
from app.engines.prompt_queue import PromptQueue
from app.errors import EngineDead
from app.messages import EngineStats, Link
from deployments.replica import metrics as worker_metrics
from deployments.replica.metrics import WorkerMetrics
from tests.unit.waiting import until

SPEC = EngineSpec(
    role="decode",
    is_disaggregated=True,
    replica_id="r",
    model_path="model",
    device="cpu",
    tensor_parallel_size=1,
    engine_args={},
    required_transport="rdma",
)


class Gauge:
    """Ray's, that keeps what it is told."""

    exported: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name = name
        self._tag_keys = tag_keys
        self._default: dict[str, str] = {}

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self._default = tags

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        all_tags = {**self._default, **(tags or {})}
        self.exported[self._name, *(all_tags.pop(key) for key in self._tag_keys)] = value
        assert not all_tags


class Engine:
    def __init__(self) -> None:
        self.answer = EngineStats(num_blocks=100)
        self.prompt_queue = PromptQueue()
        self.prompt_queue.queued_tokens = 300
        self.error: Exception | None = None
        self.num_polls = 0
        self.deaths: list[EngineDead] = []
        self.metrics: WorkerMetrics

    async def stats(self) -> EngineStats:
        self.num_polls += 1
        if self.error is not None:
            raise self.error
        return self.answer


@pytest.fixture
async def engine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """That of a decode replica with five sequences, of which three decode."""
    monkeypatch.setattr(worker_metrics, "PERIOD_S", 0.001)
    monkeypatch.setattr(worker_metrics, "Gauge", Gauge)
    Gauge.exported = {}
    engine: Any = Engine()
    background = BackgroundTasks("r", engine.deaths.append)
    engine.metrics = WorkerMetrics(engine, lambda: (5, 3), "m", SPEC, background)
    yield engine
    await background.stop()


def exported(name: str, *tags: str) -> float | None:
    return Gauge.exported.get((name, "m", "decode", *tags))


async def test_what_the_engine_says_is_exported_again_and_again(engine: Engine) -> None:
    await until(lambda: exported("baton_kv_blocks") == 100)
    engine.answer = EngineStats(num_transfers=7, num_failed_transfers=2, transferred_bytes=9000, transfer_s=0.5)
    await until(lambda: exported("baton_kv_transfers_total") == 7)
    assert exported("baton_kv_transfer_failures_total") == 2
    assert exported("baton_kv_transferred_bytes_total") == 9000
    assert exported("baton_kv_transfer_seconds_total") == 0.5
    assert (exported("baton_replica_sequences"), exported("baton_decoding_sequences")) == (5, 3)
    assert exported("baton_queued_prompt_tokens") == 300


async def test_links_are_exported_until_they_are_gone(engine: Engine) -> None:
    def usable(*tags: str) -> float | None:
        return exported("baton_link_usable", *tags)

    engine.metrics.set_links([Link("p0", "rc", 2e9, 0.001), Link("p1", problem="broken")])
    assert (usable("p0", "rc"), usable("p1", "")) == (1, 0)
    assert exported("baton_link_bytes_per_second", "p0", "rc") == 2e9
    assert exported("baton_link_latency_seconds", "p0", "rc") == 0.001
    assert math.isnan(exported("baton_link_latency_seconds", "p1", "") or 0)
    engine.metrics.set_links([Link("p1", "rc")])
    assert usable("p1", "rc") == 1
    assert math.isnan(usable("p0", "rc") or 0)
    assert math.isnan(usable("p1", "") or 0)


async def test_a_replica_has_one_transport_at_a_time(engine: Engine) -> None:
    await until(lambda: exported("baton_kv_transport", "", "rdma") == 1)
    engine.answer = EngineStats(transport="rc")
    await until(lambda: exported("baton_kv_transport", "rc", "rdma") == 1)
    assert exported("baton_kv_transport", "", "rdma") == 0
    engine.answer = EngineStats(transport="tcp")
    await until(lambda: exported("baton_kv_transport", "tcp", "rdma") == 1)
    assert exported("baton_kv_transport", "rc", "rdma") == 0


async def test_a_dead_engine_is_left_alone_and_said(engine: Engine) -> None:
    engine.error = EngineDead("gone")
    await until(lambda: engine.deaths == [engine.error])
    num_polls = engine.num_polls
    await asyncio.sleep(0.02)
    assert engine.num_polls == num_polls


async def test_after_an_error_the_export_goes_on(engine: Engine) -> None:
    engine.error = RuntimeError("broken")
    polls = engine.num_polls
    await until(lambda: engine.num_polls > polls)
    engine.error, engine.answer = None, EngineStats(num_blocks=7)
    await until(lambda: exported("baton_kv_blocks") == 7)
