"""The order in which one sequence is served: place, prefill, decode, fail over.

1. Pick a decode replica.
2. Decide where the prompt is prefilled (app/routing/disaggregation.py).
3. If remotely, pick a prefill replica and start it; what comes back at once is a handoff, not its content.
4. Give request and handoff to the decode replica, which waits for the descriptor, pulls the KV and streams.
   A prefill that fails leaves decode to prefill locally: the request succeeds and its report says why.  Where the
   engine cannot do that (SGLang), another prefill is started.
5. A decode replica that dies before the first token is replaced by another one, with a new prefill: the first
   one may have pulled the KV and thereby freed it on the prefill side, so its handoff cannot be used twice.
   After the first token the sequence fails, since tokens that were sent cannot be taken back.

Cancelling it at any moment cancels whatever runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from typing import Protocol

import msgspec

from app.config import LimitsConfig
from app.engines.base import Emit
from app.errors import BatonError, EngineDead, NoReplica, PrefillFailed, ReplicaLost
from app.messages import GenerateRequest, PrefillReport, TokenDelta
from app.routing.disaggregation import Placement, place_prefill, spoil
from app.routing.load import LoadBalancer

logger = logging.getLogger("baton.orchestrator")


class Handoff(Protocol):
    """A prefill under way, whose descriptor only the decode replica may look at."""

    replica: str
    """The prefill replica."""

    def cancel(self) -> None:
        """Stop the prefill wherever it stands, unless decode has its KV; safe at any time."""


class PrefillPool(Protocol):
    """The prefill replicas as the orchestrator sees them."""

    def replicas(self) -> list[str]:
        """Ids of those that are ready."""

    async def start(self, request: GenerateRequest, replica: str) -> Handoff:
        """Begin to prefill on `replica`.  Raises ReplicaLost if it is gone."""


class DecodePool(Protocol):
    """The decode replicas as the orchestrator sees them."""

    def replicas(self) -> list[str]:
        """Ids of those that are ready."""

    async def generate(
        self, request: GenerateRequest, handoff: Handoff | None, placement: Placement, replica: str, emit: Emit
    ) -> None:
        """Run the sequence on `replica` to its end.

        Raises ReplicaLost, EngineDead, EngineFailed or InvalidRequest, and PrefillFailed before the first delta.
        """


class Orchestrator:
    """Serves sequences on one model's pools."""

    def __init__(
        self, prefill: PrefillPool | None, decode: DecodePool, limits: LimitsConfig, *, can_decode_prefill: bool
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._limits = limits
        self._can_decode_prefill = can_decode_prefill
        self._prefill_load = LoadBalancer()
        self._decode_load = LoadBalancer()

    async def run(self, request: GenerateRequest, emit: Emit) -> None:
        """Serve the sequence, giving `emit` its deltas.

        Raises NoReplica before the first delta if no replica could serve, ReplicaLost after it, TimeoutError if a
        token took longer than the limits allow, and what `DecodePool.generate` raises.
        """
        lost: list[str] = []
        lacking = "decode"
        progress = Progress(emit, self._limits)
        async with progress.in_time():
            for attempt in range(self._limits.max_attempts):
                replica = self._decode_load.pick(self._decode.replicas(), lost)
                if replica is None:
                    raise NoReplica("decode")
                try:
                    with self._decode_load.track(replica):
                        await self._attempt(request, replica, progress, attempt)
                    return
                except PrefillFailed as error:
                    lacking = "prefill"
                    logger.warning("request_id=%s prefill failed: %s", request.request_id, error)
                    if progress.has_started:
                        raise ReplicaLost(replica, str(error)) from error
                except (ReplicaLost, EngineDead) as error:
                    lacking = "decode"
                    lost.append(replica)
                    self._decode_load.avoid(replica)
                    logger.warning("request_id=%s decode_replica=%s failed: %s", request.request_id, replica, error)
                    if progress.has_started:
                        raise ReplicaLost(replica, str(error)) from error
        raise NoReplica(lacking)

    async def _attempt(self, request: GenerateRequest, replica: str, progress: Progress, attempt: int) -> None:
        with ExitStack() as prefill_in_flight:
            handoff, placement = await self._start_prefill(request, prefill_in_flight, attempt)
            has_arrived = False

            def on_first(delta: TokenDelta) -> None:
                nonlocal has_arrived
                has_arrived = delta.report is not None and delta.report.kind == "remote"
                prefill_in_flight.close()
                if handoff is not None and _has_failed(delta.report):
                    self._prefill_load.avoid(handoff.replica)

            progress.on_first = on_first
            try:
                await self._decode.generate(request, handoff, placement, replica, progress.take)
            except PrefillFailed:
                if handoff is not None:
                    self._prefill_load.avoid(handoff.replica)
                raise
            finally:
                if handoff is not None and not has_arrived:
                    handoff.cancel()

    async def _start_prefill(
        self, request: GenerateRequest, in_flight: ExitStack, attempt: int
    ) -> tuple[Handoff | None, Placement]:
        placement = place_prefill(
            request, has_prefill_pool=self._prefill is not None, can_decode_prefill=self._can_decode_prefill
        )
        if self._prefill is None or placement.kind == "local":
            return None, placement
        replica = self._prefill_load.pick(self._prefill.replicas())
        if replica is None:
            return self._without_prefill(NoReplica("prefill"))
        in_flight.enter_context(self._prefill_load.track(replica))
        try:
            handoff = await self._prefill.start(_to_prefill(request, attempt), replica)
        except ReplicaLost as error:
            in_flight.close()
            self._prefill_load.avoid(replica)
            return self._without_prefill(PrefillFailed(str(error)))
        return handoff, placement

    def _without_prefill(self, error: BatonError) -> tuple[None, Placement]:
        """Have decode prefill.  Raises `error` where it cannot."""
        if not self._can_decode_prefill:
            raise error
        return None, Placement("local", "no_prefill_replica")


class Progress:
    """How far a sequence has come, and by when it must have come further."""

    def __init__(self, emit: Emit, limits: LimitsConfig) -> None:
        self.has_started = False
        self.on_first: Emit = lambda delta: None
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._patience_s = limits.itl_timeout_s
        self._due = self._loop.time() + limits.ttft_timeout_s
        self._timer = self._loop.call_at(self._due, lambda: None)
        self._timeout = asyncio.timeout(None)

    def take(self, delta: TokenDelta) -> None:
        """Pass a delta on."""
        self._due = self._loop.time() + self._patience_s
        if not self.has_started:
            self.has_started = True
            self._watch()  # the timer was set for the first token
            self.on_first(delta)
        self._emit(delta)

    @asynccontextmanager
    async def in_time(self) -> AsyncGenerator[None, None]:
        """Raises TimeoutError inside and out of the block once a delta is overdue."""
        async with asyncio.timeout(None) as self._timeout:
            self._watch()
            try:
                yield
            finally:
                self._timer.cancel()

    def _watch(self) -> None:
        # Looks again when a delta may be overdue: moving a timer with every delta would cost more than the delta.
        self._timer.cancel()
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._watch)
        else:
            self._timeout.reschedule(self._due)


def _to_prefill(request: GenerateRequest, attempt: int) -> GenerateRequest:
    """What the prefill replica gets, with an id of its own: an earlier attempt may still be ending there."""
    prefilled = spoil(request) if request.prefill_mode == "spoiled" else request
    if attempt:
        prefilled = msgspec.structs.replace(prefilled, request_id=f"{request.request_id}-{attempt}")
    return prefilled


def _has_failed(report: PrefillReport | None) -> bool:
    """Whether decode had to prefill although it had a handoff; a prompt that it had cached is no failure."""
    return report is not None and report.kind == "local" and report.reason != "already_cached"
