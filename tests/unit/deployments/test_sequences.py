"""The sequences that run on a replica: their phases, what they have generated, and what the replica tells of that."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from ray.exceptions import RayTaskError

from app.autoscaling.load import LoadMeter
from app.channel.protocol import Backlog, Submit
from app.config import parse
from app.engines.base import EngineInfo
from app.engines.prompt_queue import PromptQueue
from app.errors import BatonError, CannotResume, EngineFailed, InvalidRequest
from app.messages import (
    Emit,
    EngineStats,
    GenerateRequest,
    PrefillReport,
    TokenDelta,
    TransferDescriptor,
    local_prefill,
)
from app.recent_load import FIRST_WINDOW_S, RecentLoad
from deployments.replica.decode import DecodeHalf
from deployments.replica.prefill import PrefillHalf
from deployments.replica.sequences import Sequences
from deployments.replica.worker import DecodeWorker, PrefillWorker

REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1, 2, 3], sampling={})
LOCAL = local_prefill("d", 0)
ON_ITS_WAY = PrefillReport("remote", "", "p", "d", 0, transferred_tokens=None, transport="")
PULLED = PrefillReport("remote", "", "p", "d", 0, transferred_tokens=3, transport="tcp")


def descriptor(prefill_s: float | None = 0.2) -> TransferDescriptor:
    return TransferDescriptor(
        engine="sim",
        replica_id="p",
        request_id="r",
        prompt_tokens=3,
        cached_tokens=1,
        ready_at=time.time(),
        lease_s=30.0,
        params={},
        prefill_s=prefill_s,
        phases={"prefill": 0.2},
    )


class Engine:
    """An engine whose deltas the test emits."""

    def __init__(self) -> None:
        self.prompt_queue = PromptQueue()
        self.emit: Emit = lambda delta: None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        self.emit = emit
        await self.ended


class Replica:
    """What runs on a replica, and what its one frontend gets."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.meter = LoadMeter()
        self.now = 0.0
        self.recent = RecentLoad(None, lambda: self.now)
        self.sequences = Sequences(cast(Any, self.engine), self.meter, self.recent)
        self.sequences.transport_from = lambda prefill_replica: f"probed from {prefill_replica}"
        self.changes: list[dict[str, int]] = []
        self.sequences.on_change = lambda: self.changes.append(self.phases())
        self.deltas: list[TokenDelta] = []

    def phases(self) -> dict[str, int]:
        return {phase: count for phase, count in self.sequences.phases.items() if count}

    async def run(self, descriptor: TransferDescriptor | None = None, reason: str = "") -> asyncio.Task[None]:
        channel: Any = SimpleNamespace(put=lambda number, delta: self.deltas.append(delta))
        call = Submit(0, REQUEST, has_handoff=descriptor is not None, local_reason=reason)
        task = asyncio.create_task(self.sequences.run(channel, call, descriptor, reason))
        await asyncio.sleep(0)
        return task


async def test_a_sequence_that_computes_its_prompt_decodes_from_its_first_token_on() -> None:
    replica = Replica()
    task = await replica.run(reason="prefill_failed")
    assert replica.phases() == {"prefilling": 1}
    replica.engine.emit(TokenDelta([5], report=LOCAL))
    assert replica.phases() == {"decoding": 1}
    replica.engine.emit(TokenDelta([6, 7], finish_reason="length"))
    replica.engine.ended.set_result(None)
    await task
    assert replica.changes == [{"prefilling": 1}, {"decoding": 1}]
    assert (replica.phases(), replica.sequences.generated_tokens) == ({}, 2)
    assert replica.deltas[0].report == msgspec.structs.replace(LOCAL, reason="prefill_failed")
    assert replica.meter.read()["started"] == 0


async def test_a_sequence_waits_until_its_kv_has_come() -> None:
    replica = Replica()
    task = await replica.run(descriptor())
    assert replica.phases() == {"waiting": 1}
    replica.engine.emit(TokenDelta([5], report=ON_ITS_WAY))
    assert replica.phases() == {"waiting": 1}
    replica.engine.emit(TokenDelta([6], report=PULLED))
    assert replica.phases() == {"decoding": 1}
    replica.engine.ended.set_result(None)
    await task
    assert replica.meter.read()["started"] == 1
    report = replica.deltas[1].report
    assert report is not None
    assert (report.transport, report.prefill_s, report.prefill_cached_tokens) == ("probed from p", 0.2, 1)
    assert list(report.phases) == ["prefill", "delivery"]


async def test_a_prompt_that_prefill_has_yet_to_compute_is_promised() -> None:
    replica = Replica()
    task = await replica.run(descriptor(prefill_s=None))
    assert replica.phases() == {"promised": 1}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert replica.phases() == {}


@pytest.mark.parametrize("error", [None, EngineFailed("broke")])
async def test_only_sequences_that_end_well_say_how_long_sequences_decode(error: Exception | None) -> None:
    replica = Replica()
    task = await replica.run()
    replica.engine.emit(TokenDelta([5], report=LOCAL))
    if error is None:
        replica.engine.ended.set_result(None)
        await task
        assert replica.recent.window_s < FIRST_WINDOW_S
    else:
        replica.engine.ended.set_exception(error)
        with pytest.raises(EngineFailed):
            await task
        assert replica.recent.window_s == FIRST_WINDOW_S


SGLANG = {"engine": "sglang"}


class Prefill(PrefillWorker):
    """A replica without Ray, whose engine the test plays."""

    def __init__(self, replica: Replica) -> None:
        self._engine = cast(Any, replica.engine)
        self._info = EngineInfo(engine="sim", version="1", num_blocks=8, block_size_tokens=2, max_model_len=64)
        self._meter = replica.meter
        self._recent = replica.recent
        self._sequences = replica.sequences
        self.role = self.home
        self._model = parse(
            {"models": [{"name": "m", "source": "o/m", "prefill": SGLANG, "decode": SGLANG}], "transfer": {}}
        ).models[0]
        self._prefills = PrefillHalf("r", self._engine, self._info, cast(Any, None))
        self._decodes = DecodeHalf(
            cast(Any, SimpleNamespace(models=[self._model])), self._engine, self._info, cast(Any, None), None
        )
        self._server = cast(Any, SimpleNamespace(num_sequences=lambda: 1, backlog=Backlog))

    def __del__(self) -> None: ...  # type: ignore[override]  # nothing to await, and nobody who would


class Decode(DecodeWorker):
    __init__ = Prefill.__init__
    __del__ = Prefill.__del__  # type: ignore[assignment]


Make = Callable[[Replica], Any]


@pytest.mark.parametrize("make", [Prefill, Decode])
async def test_a_replica_tells_what_it_notices_of_its_own_speed(make: Make) -> None:
    replica = Replica()
    replica.recent._prefill_share, replica.recent.window_s = 0.123456, 2.345678
    worker = make(replica)
    task = await replica.run()
    replica.engine.prompt_queue.enter(REQUEST)
    load = worker._observe(EngineStats(num_used_blocks=3))
    assert (load.sequences, load.queued_tokens, load.used_blocks, load.decoding) == (1, 3, 3, 0)
    assert load.kv_tokens == 3
    assert (load.prefill_share, load.slowness, load.window_s) == (0.12, 1.0, 2.3)
    replica.engine.emit(TokenDelta([5], report=LOCAL))
    assert worker._observe(EngineStats()).decoding == 1
    replica.now += replica.recent.window_s
    assert worker._observe(EngineStats()).prefill_share == round(0.123456 / math.e + (1 - 1 / math.e), 2)
    replica.engine.ended.set_result(None)
    await task


async def test_a_prefill_replica_runs_whole_sequences_and_takes_no_kv() -> None:
    replica = Replica()
    worker = Prefill(replica)
    channel: Any = SimpleNamespace(put=lambda number, delta: replica.deltas.append(delta))
    with pytest.raises(InvalidRequest, match="a prefill replica takes no KV"):
        await worker._run(channel, Submit(0, REQUEST, has_handoff=True, local_reason=""))
    task = asyncio.create_task(worker._run(channel, Submit(1, REQUEST, has_handoff=False, local_reason="decode_full")))
    await asyncio.sleep(0)
    replica.engine.emit(TokenDelta([5], report=local_prefill("p", 0)))
    replica.engine.ended.set_result(None)
    await task
    assert replica.deltas[0].report == local_prefill("p", 0, "decode_full")


@pytest.mark.parametrize("error", [CannotResume("penalties"), InvalidRequest("no")])
async def test_what_prefill_refuses_for_good_is_no_replicas_fault_where_decode_cannot_prefill(
    error: BatonError,
) -> None:
    """With another error the frontend would blame the pair, try it on others, and blame them too."""

    async def refused() -> None:
        raise RayTaskError("prefill", "traceback", error).as_instanceof_cause()

    decodes = Decode(Replica())._decodes
    decodes._config = cast(Any, SimpleNamespace(limits=SimpleNamespace(prefill_timeout_s=5)))
    decodes._handoffs.open("c")
    decodes._handoffs.attach("c", 0, refused())
    channel: Any = SimpleNamespace(id="c")
    with pytest.raises(type(error)) as raised:
        await decodes.receive(channel, Submit(0, REQUEST, has_handoff=True, local_reason=""))
    assert (type(raised.value), str(raised.value)) == (type(error), str(error))
