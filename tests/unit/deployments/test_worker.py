"""What a replica does before it is ready: it measures its engine, and whatever comes of that it starts."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from app.config import parse
from app.engines.base import EngineInfo, EngineSpec
from app.engines.prompt_queue import PromptQueue
from app.errors import EngineDead, EngineFailed
from app.messages import Emit, GenerateRequest, Role, TokenDelta, TransferDescriptor
from deployments.replica import worker as module
from deployments.replica.worker import Worker

SPEC = EngineSpec(
    role="decode",
    is_disaggregated=False,
    replica_id="r",
    model_path="model",
    device="cpu",
    tensor_parallel_size=1,
    engine_args={},
)


class Engine:
    """An engine that answers, or fails, or dies."""

    def __init__(self, error: Exception | None = None) -> None:
        self.prompt_queue = PromptQueue()
        self.error = error
        self.num_requests = 0

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        self.num_requests += 1
        if self.error is not None:
            raise self.error
        for _ in range(request.sampling["max_tokens"]):
            emit(TokenDelta([1]))

    async def check_health(self) -> None:
        if isinstance(self.error, EngineDead):
            raise self.error


class Replica(Worker):
    """A replica without Ray."""

    def __init__(self, engine: Engine, role: Role = "decode", engine_name: str = "vllm") -> None:
        pool = {"engine": engine_name}
        model = {"name": "m", "source": "owner/m", "decode": pool, "prefill": pool}
        self.home = role
        self._replica_id = "r"
        self._model = parse({"models": [model], "transfer": {}}).models[0]
        self._engine = cast(Any, engine)
        self._info = EngineInfo(engine="sim", version="1", num_blocks=64, block_size_tokens=16, max_model_len=512)

    def __del__(self) -> None: ...  # type: ignore[override]  # nothing to await, and nobody who would


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_an_engine_is_measured(role: Role, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pace = await Replica(Engine(), role)._measure_pace(SPEC)
    assert pace is not None
    assert pace.chunk_tokens == 2048
    assert "replica_id=r measured_s=" in caplog.text
    assert str(pace) in caplog.text


async def test_a_measurement_that_fails_keeps_no_replica_from_starting(caplog: pytest.LogCaptureFixture) -> None:
    assert await Replica(Engine(EngineFailed("broken")))._measure_pace(SPEC) is None
    assert "replica_id=r nobody knows its pace" in caplog.text
    assert "broken" in caplog.text


async def test_a_measurement_without_end_is_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MEASUREMENT_TIMEOUT_S", 0.0)
    assert await Replica(Engine(TimeoutError()))._measure_pace(SPEC) is None
    assert "replica_id=r nobody knows its pace" in caplog.text


async def test_a_replica_whose_engine_dies_meanwhile_does_not_start() -> None:
    with pytest.raises(EngineDead):
        await Replica(Engine(EngineDead("gone")))._measure_pace(SPEC)


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_engines_that_run_no_whole_sequences_are_not_measured(role: Role) -> None:
    engine = Engine()
    assert await Replica(engine, role, "sglang")._measure_pace(SPEC) is None
    assert engine.num_requests == 0
