"""What a replica does for others as prefill: a prompt comes in, and the descriptor of its KV goes out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from app.engines.base import Engine, EngineInfo
from app.errors import BatonError, PrefillFailed
from app.handoff_seal import pack, seal
from app.messages import (
    EngineStats,
    GenerateRequest,
    HopPhase,
    KvFormat,
    ReplicaLoad,
    TransferDescriptor,
    TransportEvidence,
)

logger = logging.getLogger("baton.prefill")

HELD_KV_POLL_S = 0.1
"""How often a replica that is being removed checks whether decode has pulled its KV."""

TURN_WAIT_S = 132.0
"""How long a turn may be awaited while others probe."""
SILENT_S = 10.0
"""A turn ends if nothing was heard for so long of the decode replica that has it; it has died then, or stands still.
One that probes says so every second (prefill_peers.py)."""


class ProbeTurns:
    """Lets one decode replica at a time probe, so that what the engine says meanwhile is about that one."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._prober = ""
        self._waiting: set[str] = set()
        self.mark = 0
        """Where in the engine's `transport_watch` the present turn began."""
        self._expiry: asyncio.TimerHandle | None = None

    async def begin(self, decode_replica: str) -> None:
        """Wait for a turn.  Raises PrefillFailed if there is none in time, or if `end` is called meanwhile."""
        self._waiting.add(decode_replica)
        try:
            async with asyncio.timeout(TURN_WAIT_S):
                await self._lock.acquire()
        except TimeoutError:
            raise PrefillFailed("other decode replicas probe it all the time") from None
        finally:
            is_awaited = decode_replica in self._waiting
            self._waiting.discard(decode_replica)
        if not is_awaited:
            self._lock.release()
            raise PrefillFailed("the decode replica has withdrawn")
        self._prober = decode_replica
        self._expire_later()

    def _expire_later(self) -> None:
        self._expiry = asyncio.get_running_loop().call_later(SILENT_S, self.end, self._prober)

    def keep(self, decode_replica: str) -> None:
        """Take note that whoever has the turn still probes."""
        if self._prober == decode_replica and self._expiry is not None:
            self._expiry.cancel()
            self._expire_later()

    def end(self, decode_replica: str) -> bool:
        """End a turn, or no longer wait for it.  Returns whether it lasted until now."""
        self._waiting.discard(decode_replica)
        if self._prober != decode_replica or self._expiry is None:
            return False
        self._expiry.cancel()
        self._prober, self._expiry = "", None
        self._lock.release()
        return True


class PrefillHalf:
    """The part of a replica that computes prompts for others."""

    def __init__(self, replica_id: str, engine: Engine, info: EngineInfo, kv_format: KvFormat) -> None:
        self.on_change: Callable[[], object] = lambda: None
        """Called when a prompt has come or has gone."""
        self.has_served = False
        """Whether any prompt has come, so that KV of it may still be here."""
        self._replica_id = replica_id
        self._engine = engine
        self._info = info
        self._kv_format = kv_format
        self._running: dict[str, asyncio.Task[TransferDescriptor]] = {}
        self._turns = ProbeTurns()

    def __len__(self) -> int:
        """Return how many prompts have not been computed."""
        return len(self._running)

    async def prefill(self, request: GenerateRequest) -> bytes:
        """Return the packed descriptor (app/handoff_seal.py)."""
        arrived_at = time.time()
        self.has_served = True
        task = asyncio.create_task(self._engine.prefill(request), name=request.request_id)
        self._running[request.request_id] = task
        self.on_change()
        try:
            descriptor = await task
            phases = _phases(request, arrived_at, descriptor)
            return pack(seal(msgspec.structs.replace(descriptor, phases=phases, kv_format=self._kv_format), request))
        finally:
            del self._running[request.request_id]
            self.on_change()

    async def begin_probe(self, decode_replica: str) -> None:
        """Wait until no other decode replica probes this one (links.py)."""
        await self._turns.begin(decode_replica)
        self._turns.mark = await self._engine.transport_watch.mark()

    def keep_probe(self, decode_replica: str) -> None:
        """Be told that a decode replica that has the turn still probes."""
        self._turns.keep(decode_replica)

    async def end_probe(self, decode_replica: str) -> TransportEvidence | None:
        """Let the next one probe.  Returns by which transport the engine says that it sent KV meanwhile, if it can."""
        evidence = await self._engine.transport_watch.since(self._turns.mark)
        return evidence if self._turns.end(decode_replica) else None

    def computable(self, load: ReplicaLoad, stats: EngineStats) -> ReplicaLoad:
        """Return the load without what waits for decode: KV to be pulled, and prompts that only lack a slot there."""
        if self._is_held_up(load, stats):
            return msgspec.structs.replace(load, queued_tokens=0)
        if not stats.num_held_up:
            return load
        computable = max(0, stats.num_waiting + stats.num_running - stats.num_held_up)
        share = computable / (computable + stats.num_held_up)
        return msgspec.structs.replace(load, queued_tokens=round(share * load.queued_tokens))

    def _is_held_up(self, load: ReplicaLoad, stats: EngineStats) -> bool:
        """Whether nothing is being computed because there is no room for a typical waiting prompt."""
        free_tokens = (stats.num_blocks - stats.num_used_blocks) * self._info.block_size_tokens
        is_short = free_tokens * max(1, len(self._running)) < load.queued_tokens
        return stats.num_running == 0 < stats.num_waiting and is_short

    async def drain(self) -> None:
        """Wait until decode has pulled all KV that this replica holds, or the leases have ended."""
        began = time.monotonic()
        try:
            # `stats` comes first, as it raises if the engine is dead: in a dead engine requests would wait for ever.
            while _has_work(await self._engine.stats()) or self._engine.prompt_queue.queued_tokens:  # noqa: ASYNC110  there is no event
                await asyncio.sleep(HELD_KV_POLL_S)
        except BatonError as error:
            logger.warning("the KV that decode has not pulled is lost: %s", error)
        logger.info("replica_id=%s has handed over all KV drained_s=%.1f", self._replica_id, time.monotonic() - began)

    async def abandon(self, request_id: str) -> None:
        """Stop a prefill, or what is left of it after `prefill` has returned, because nobody will pull its KV.

        It would not be enough to cancel the call of `prefill`.  The cancellation may come between the engine's answer
        and Serve's, and the descriptor, which decode needs to free the KV, would be lost.
        """
        if (task := self._running.get(request_id)) is not None:
            task.cancel()
        await self._engine.release(request_id)


def _phases(request: GenerateRequest, arrived_at: float, descriptor: TransferDescriptor) -> dict[HopPhase, float]:
    """Return the phases of the hop that end here; `arrived_at` is the request's arrival, in Unix time."""
    phases: dict[HopPhase, float] = {}
    if request.sent_at is not None:
        phases["prefill_call"] = arrived_at - request.sent_at
    if descriptor.prefill_s is not None:
        phases["prefill"] = descriptor.prefill_s
    return phases


def _has_work(stats: EngineStats) -> bool:
    return bool(stats.num_used_blocks or stats.num_running or stats.num_waiting)
