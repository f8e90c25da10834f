"""Replicas that let a test call their engines; apart from that they are those of an application.

This is imported in the environment of each engine, so nothing here needs pytest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from app.engines.base import EngineInfo
from app.engines.prompt_queue import PromptQueue
from app.engines.transport import NamedTransport, TransportWatch
from app.messages import Emit, EngineStats, GenerateRequest, KvEvent, TokenDelta, TransferDescriptor
from deployments.replica.worker import AggregatedWorker, DecodeWorker, PrefillWorker, Worker


class Opened(Worker):
    """A replica whose engine can be called."""

    async def call_engine(self, method: str, *arguments: Any, replica_id: str) -> Any:
        self.check_is_me(replica_id)
        return await getattr(self._engine, method)(*arguments)

    async def look_at_engine(self, *, replica_id: str) -> tuple[EngineStats, tuple[int, int, int]]:
        """Return the engine's stats and the counts of its prompt queue."""
        self.check_is_me(replica_id)
        queue = self._engine.prompt_queue
        stats = await self._engine.stats()
        return stats, (queue.queued_tokens, queue.computed_prompts, queue.computed_tokens)

    async def generate(
        self, request: GenerateRequest, descriptor: TransferDescriptor | None, *, replica_id: str
    ) -> AsyncGenerator[TokenDelta, None]:
        self.check_is_me(replica_id)
        deltas: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        task = asyncio.create_task(self._engine.generate(request, descriptor, deltas.put_nowait))
        task.add_done_callback(lambda _: deltas.put_nowait(None))
        try:
            while (delta := await deltas.get()) is not None:
                yield delta
            await task
        finally:
            task.cancel()


class OpenedPrefill(Opened, PrefillWorker):
    pass


class OpenedDecode(Opened, DecodeWorker):
    pass


class OpenedAggregated(Opened, AggregatedWorker):
    pass


class EngineOfReplica:
    """The engine of a pool's only replica, called through Ray.

    The prompt queue is as of the last call of `stats`.  The replica reads the engine's events, and starts and stops it.
    """

    def __init__(self, handle: Any, replica_id: str) -> None:
        self.prompt_queue = PromptQueue()
        self.transport_watch: TransportWatch = NamedTransport("")
        self._handle = handle
        self._replica = {"replica_id": replica_id}

    async def start(self) -> EngineInfo:
        raise NotImplementedError

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        response = self._handle.call_engine.remote("prefill", request, **self._replica)
        try:
            descriptor: TransferDescriptor = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        return descriptor

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        deltas = self._handle.options(stream=True).generate.remote(request, descriptor, **self._replica)
        try:
            async for delta in deltas:
                emit(delta)
        finally:
            deltas.cancel()

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        await self._handle.call_engine.remote("release", request_id, descriptor, **self._replica)

    async def stats(self) -> EngineStats:
        stats, counts = await self._handle.look_at_engine.remote(**self._replica)
        queue = self.prompt_queue
        queue.queued_tokens, queue.computed_prompts, queue.computed_tokens = counts
        found: EngineStats = stats
        return found

    async def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        raise NotImplementedError
        yield []

    async def check_health(self) -> None:
        await self._handle.call_engine.remote("check_health", **self._replica)

    async def stop(self) -> None:
        await self._handle.call_engine.remote("stop", **self._replica)
