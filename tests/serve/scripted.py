"""An engine that does what the request says, for tests of what happens between the deployments.

It computes nothing: a sequence's tokens are those of its prompt, shifted by one.  Its prefix cache keeps every prompt.
The request's ``extra_args`` say what goes wrong.  What happened is recorded as files in ``engine_args["diary"]``.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ray import serve

from app.config import BatonConfig, parse
from app.engines.base import Engine, EngineInfo, EngineSpec
from app.engines.prompt_queue import PromptQueue
from app.engines.transport import NamedTransport, TransportWatch
from app.errors import EngineDead, EngineFailed
from app.frontend.sequence_progress import SequenceProgress
from app.messages import (
    BlockStored,
    Emit,
    EngineName,
    EngineStats,
    GenerateRequest,
    KvEvent,
    PrefillReport,
    Role,
    TokenDelta,
    TransferDescriptor,
)
from deployments.frontend.served_model import ServedModel
from deployments.replica.worker import AggregatedWorker, DecodeWorker, PrefillWorker


class Diary:
    """The events of all processes of a test, as files in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def write(self, event: str, request_id: str = "") -> None:
        (self._folder / f"{event}--{request_id}--{os.getpid()}--{uuid.uuid4().hex}").touch()

    def count(self, event: str, request_id: str = "") -> int:
        return len(list(self._folder.glob(f"{event}--{request_id or '*'}--*")))

    def erase(self, event: str) -> None:
        for path in self._folder.glob(f"{event}--*"):
            path.unlink()

    def pids(self, event: str) -> set[int]:
        return {int(path.name.split("--")[2]) for path in self._folder.glob(f"{event}--*")}


class TracedParams(dict[str, Any]):
    """Descriptor parameters that record which process unpickles them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_traced, (dict(self),)


def _unpickle_traced(fields: dict[str, Any]) -> TracedParams:
    Diary(fields["diary"]).write("descriptor_unpickled")
    return TracedParams(fields)


BLOCK_SIZE = 2
PREFILL_S = 0.25
"""How long a prompt takes, according to the descriptors."""


class ScriptedEngine:
    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._diary = Diary(spec.engine_args["diary"])
        self._is_dead = False
        self.prompt_queue = PromptQueue()
        self.transport_watch: TransportWatch = NamedTransport("scripted")
        self._num_transfers = 0
        self._cached: set[tuple[int, ...]] = set()
        self._events: asyncio.Queue[list[KvEvent] | None] = asyncio.Queue()

    async def start(self) -> EngineInfo:
        self._diary.write("started")
        return EngineInfo(
            engine="scripted",
            version="1",
            num_blocks=64,
            block_size_tokens=BLOCK_SIZE,
            max_model_len=64,
            prefix_cache="published",
        )

    async def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        while (events := await self._events.get()) is not None:
            yield events

    def _cache(self, request: GenerateRequest) -> None:
        """Keep the full blocks of the request's prompt, but not those of a probe, so that tests begin with nothing."""
        prompt = [] if _is_probe(request) else request.prompt_token_ids
        events: list[KvEvent] = []
        for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE):
            block, parent = tuple(prompt[:end]), tuple(prompt[: end - BLOCK_SIZE])
            if block not in self._cached:
                self._cached.add(block)
                before = hash(parent) if parent else None
                events.append(BlockStored([hash(block)], before, list(block[-BLOCK_SIZE:]), BLOCK_SIZE))
        if events:
            self._events.put_nowait(events)

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        script = _script(request)
        self._diary.write("prefill_started", request.request_id)
        leave_queue = self.prompt_queue.enter(request)
        try:
            if script.get("prefill") == "hang":
                await asyncio.sleep(3600)
            if script.get("prefill") == "fail" or (_is_probe(request) and self._diary.count("links_broken")):
                raise EngineFailed("told to")
            if script.get("prefill") == "die":
                os._exit(1)
            leave_queue(is_computed=True)
        except asyncio.CancelledError:
            self._diary.write("prefill_cancelled", request.request_id)
            raise
        finally:
            leave_queue()
        self._cache(request)
        self._diary.write("prefill_done", request.request_id)
        return TransferDescriptor(
            engine="scripted",
            replica_id=self._spec.replica_id,
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            ready_at=time.time(),
            lease_s=-1.0 if script.get("prefill") == "expired" else 30.0,
            params=TracedParams(diary=self._spec.engine_args["diary"], prompt=request.prompt_token_ids),
            prefill_s=PREFILL_S,
        )

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        self._diary.write("released" if descriptor else "abandoned", request_id)

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        script = _script(request)
        await self.check_health()
        self._diary.write("generate_started", request.request_id)
        source = descriptor.params["prompt"] if descriptor else request.prompt_token_ids
        leave_queue = self.prompt_queue.enter(request, descriptor)
        report = PrefillReport(
            kind="remote" if descriptor else "local",
            reason="",
            prefill_replica=descriptor.replica_id if descriptor else None,
            decode_replica=self._spec.replica_id,
            cached_tokens=0,
            transferred_tokens=len(source) if descriptor else 0,
            transport="scripted" if descriptor else "",
        )
        try:
            begin = request.num_replayed
            prompt = source[: len(source) - begin]
            for position, token in enumerate(prompt[begin:], start=begin):
                await self._go_wrong(request.request_id, script, position)
                if position == begin:
                    leave_queue(is_computed=True)
                    self._num_transfers += descriptor is not None
                    self._cache(request)
                is_last = position == len(prompt) - 1
                emit(
                    TokenDelta(
                        [token + 1],
                        finish_reason="length" if is_last else None,
                        report=report if position == begin else None,
                    )
                )
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._diary.write("generate_cancelled", request.request_id)
            raise
        finally:
            leave_queue()

    async def _go_wrong(self, request_id: str, script: dict[str, Any], position: int) -> None:
        """Do what the script says for the token at `position`."""
        is_victim = script.get("decode_victim") in (None, self._spec.replica_id)
        if position == script.get("decode_dies_at") and is_victim:
            os._exit(1)
        if position == script.get("engine_dies_at") and is_victim:
            while not self._diary.count("tokens_received", request_id):  # noqa: ASYNC110  another process writes it
                await asyncio.sleep(0.01)
            self._is_dead = True
            raise EngineDead
        if position == script.get("decode_hangs_at"):
            await asyncio.sleep(3600)
        if position == script.get("decode_waits_at"):
            while not self._diary.count(script["event"]):  # noqa: ASYNC110  another process writes it
                await asyncio.sleep(0.01)

    async def stats(self) -> EngineStats:
        await self.check_health()
        return EngineStats(num_transfers=self._num_transfers)

    async def check_health(self) -> None:
        if self._is_dead:
            raise EngineDead

    async def stop(self) -> None:
        self._diary.write("stopped")
        self._is_dead = True
        self._events.put_nowait(None)


def _is_probe(request: GenerateRequest) -> bool:
    """Whether Baton itself sent the request, to measure a link or the engine."""
    return not request.is_load


def _script(request: GenerateRequest) -> dict[str, Any]:
    return dict(request.sampling.get("extra_args") or {})


def create_scripted_engine(engine: EngineName, spec: EngineSpec) -> Engine:
    return ScriptedEngine(spec)


class ScriptedPrefill(PrefillWorker):
    create_engine = staticmethod(create_scripted_engine)


class ScriptedDecode(DecodeWorker):
    create_engine = staticmethod(create_scripted_engine)

    async def __del__(self) -> None:
        self._engine._diary.write("removed")  # type: ignore[attr-defined]
        await super().__del__()


class ScriptedAggregated(AggregatedWorker):
    create_engine = staticmethod(create_scripted_engine)


class Caller:
    """A frontend without HTTP: runs sequences through the real orchestrator and pools."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: BatonConfig, pools: dict[Role, Any]
    ) -> None:
        self._model = ServedModel(config.models[0], pools, config.limits)
        self._diary = Diary(config.models[0].engine_args["diary"])
        self._diary.write("caller")

    async def run(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        deltas: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        task = asyncio.create_task(self._model.orchestrator.run(request, SequenceProgress(deltas.put_nowait)))
        task.add_done_callback(lambda _: deltas.put_nowait(None))
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            await task
        finally:
            task.cancel()

    async def stats(self) -> list[dict[str, Any]]:
        return await self._model.stats()

    async def health(self) -> dict[str, Any]:
        return self._model.health()

    async def endpoints(self) -> list[dict[str, Any]]:
        return self._model.endpoints()

    async def replicas(self) -> dict[str, list[str]]:
        """Return the replicas of each pool that can be reached."""
        return {role: list(pool.replicas) for role, pool in self._model.router.pools.items()}


def scripted_application(
    diary: Path,
    *,
    prefill: int,
    decode: int,
    aggregated: int = 0,
    autoscaling: dict[str, Any] | None = None,
    **limits: Any,
) -> tuple[serve.Application, Diary]:
    """Run a Caller over the given numbers of replicas with scripted engines, and yield it with their common diary."""
    from deployments.build import build_pools

    pool = {"resources": {"num_cpus": 0.1}, "health_check_period_s": 0.5}
    model: dict[str, Any] = {
        "name": "scripted",
        "source": "owner/scripted",
        "engine_args": {"diary": str(diary)},
        "decode": {**pool, **({"autoscaling": autoscaling} if autoscaling else {"replicas": decode})},
        # The router goes by load alone, although all tests send the same prompt.
        "routing": {"placement": {"policy": "remote"}, "decode_weights": {"prefix": 0}},
    }
    model |= {
        role: {**pool, "replicas": count}
        for role, count in {"prefill": prefill, "aggregated": aggregated}.items()
        if count
    }
    config = parse({"models": [model], "transfer": {}, "limits": limits})
    built = config.models[0]
    workers: dict[Role, type] = {
        "decode": ScriptedDecode,
        "prefill": ScriptedPrefill,
        "aggregated": ScriptedAggregated,
    }
    pools = build_pools(workers, config, built, "cpu")
    caller = serve.deployment(Caller).options(name="caller", max_ongoing_requests=100)
    return caller.bind(config, pools), Diary(str(diary))
