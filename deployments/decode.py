"""The decode deployment: requests with references to their KV in, token deltas out.

``submit`` runs one sequence; its deltas leave through ``deltas``, the stream of the frontend that submitted it.
A frontend whose stream ends is gone, and its sequences end with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from ray import ObjectRef
from ray.exceptions import TaskCancelledError

from app.config import BatonConfig
from app.messages import GenerateRequest, TokenDelta, TransferDescriptor
from deployments.pools import DeltaBatch, spawn_detached
from deployments.worker import Worker

logger = logging.getLogger("baton.decode")

CANCELLATION_GRACE_S = 1.0
"""How far the cancellations of a request's two legs may lie apart."""


class _Outbox:
    """Deltas that wait for one frontend to take them."""

    def __init__(self) -> None:
        self._waiting: DeltaBatch = []
        self._has_some = asyncio.Event()
        self.running: set[asyncio.Task[Any]] = set()

    def put(self, request_id: str, delta: TokenDelta) -> None:
        self._waiting.append((request_id, delta))
        self._has_some.set()

    async def take(self) -> DeltaBatch:
        """Everything that waits, as soon as there is something."""
        await self._has_some.wait()
        self._has_some.clear()
        batch, self._waiting = self._waiting, []
        return batch


class DecodeWorker(Worker):
    """One decode engine, or the only engine of an aggregated deployment."""

    role = "decode"

    async def __init__(self, config: BatonConfig, device: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._outboxes: defaultdict[str, _Outbox] = defaultdict(_Outbox)
        self._encoder = msgspec.msgpack.Encoder()
        self._releases: set[asyncio.Task[Any]] = set()
        await super().__init__(config, device)

    async def submit(
        self,
        request: GenerateRequest,
        refs: list[ObjectRef],
        local_reason: str,
        *,
        frontend_id: str,
        replica_id: str,
    ) -> None:
        """Run one sequence to its end.

        `refs` holds the reference to the transfer descriptor, or nothing if decode shall prefill, in which case
        `local_reason` says why.
        """
        self.check_is_me(replica_id)
        outbox = self._outboxes[frontend_id]
        task = asyncio.current_task()
        assert task is not None
        outbox.running.add(task)
        try:
            descriptor, reason = await self._receive(request, refs[0]) if refs else (None, local_reason)
            async with aclosing(self._engine.generate(request, descriptor)) as deltas:
                async for delta in deltas:
                    outbox.put(request.request_id, _with_reason(delta, reason))
        finally:
            outbox.running.discard(task)

    async def _receive(self, request: GenerateRequest, ref: ObjectRef) -> tuple[TransferDescriptor | None, str]:
        """The descriptor once prefill has it, or None and why decode has to prefill itself."""
        try:
            async with asyncio.timeout(self._config.limits.prefill_timeout_s):
                descriptor: TransferDescriptor = await ref
        except asyncio.CancelledError:
            self._release_later(ref)
            raise
        except TimeoutError:
            self._release_later(ref)
            reason = "prefill_timeout"
        except TaskCancelledError:
            # Whoever cancelled prefill is about to cancel this call too: do not start work in between.
            await asyncio.sleep(CANCELLATION_GRACE_S)
            reason = "prefill_cancelled"
        except Exception as error:  # noqa: BLE001  whatever ended prefill, decode can do its work
            logger.warning("request_id=%s prefill failed: %r", request.request_id, error)
            reason = "prefill_failed"
        else:
            if not descriptor.has_expired(time.time()):
                return descriptor, ""
            self._release_later(ref)
            reason = "descriptor_expired"
        return None, reason

    def _release_later(self, ref: ObjectRef) -> None:
        task = spawn_detached(self._release(ref), name="release-handoff")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, ref: ObjectRef) -> None:
        """Free the KV of a prefill that nobody will pull, if it still comes to that."""
        try:
            descriptor = await ref
        except Exception as error:  # noqa: BLE001  a prefill that failed or was cancelled holds no KV
            logger.info("abandoned prefill ended: %s", type(error).__name__)
            return
        await self._engine.release(descriptor)

    async def deltas(self, frontend_id: str, *, replica_id: str) -> AsyncGenerator[bytes, None]:
        """Each item is a msgpack-encoded DeltaBatch; merges what a slow frontend has not taken yet."""
        self.check_is_me(replica_id)
        outbox = self._outboxes[frontend_id]
        try:
            while True:
                yield self._encoder.encode(await outbox.take())
        finally:
            del self._outboxes[frontend_id]
            for task in outbox.running:
                task.cancel()


def _with_reason(delta: TokenDelta, reason: str) -> TokenDelta:
    """Say in the report why decode prefilled itself, where this replica knows it and the engine cannot."""
    if delta.report is None or not reason:
        return delta
    return msgspec.structs.replace(delta, report=msgspec.structs.replace(delta.report, reason=reason))
