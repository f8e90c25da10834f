"""The order in which one sequence is served: decide, prefill, decode, fail over.

1. Decide which replicas serve it and where its prompt is prefilled (app/routing/router.py).
2. If remotely, start the prefill; what comes back at once is a handoff, not its content.
3. Give request and handoff to the decode replica, which waits for the descriptor, pulls the KV and streams.
   A prefill that fails leaves decode to prefill locally: the request succeeds and its report says why.  Where the
   engine cannot do that (SGLang), or the prefill replica itself is gone, it is decided anew without that one.
4. A decode replica that dies before the first token is replaced by another one, with a new prefill: the first
   one may have pulled the KV and thereby freed it on the prefill side, so its handoff cannot be used twice.
   After the first token the sequence fails, since tokens that were sent cannot be taken back.

Cancelling it at any moment cancels whatever runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from app.config import LimitsConfig
from app.errors import BatonError, EngineDead, NoReplica, PrefillFailed, ReplicaLost
from app.messages import Emit, GenerateRequest, PrefillReport, TokenDelta
from app.routing.decision import Candidate, Decision, RoutingHints
from app.routing.in_flight import InFlight
from app.routing.placement import corrupt_prompt
from app.routing.router import NO_HINTS, Router

logger = logging.getLogger("baton.orchestrator")


class Handoff(Protocol):
    """A prefill under way, whose descriptor only the decode replica may look at."""

    replica: str
    """The prefill replica."""

    def cancel(self) -> None:
        """Stop the prefill wherever it stands, unless decode has its KV; safe at any time."""


class PrefillPool(Protocol):
    """The prefill replicas as the orchestrator calls them."""

    async def start(self, request: GenerateRequest, replica: str) -> Handoff:
        """Begin to prefill on `replica`.  Raises ReplicaLost if it is gone."""


class DecodePool(Protocol):
    """The replicas of a pool that decodes, as the orchestrator calls them."""

    async def generate(
        self, request: GenerateRequest, handoff: Handoff | None, local_reason: str, replica: str, emit: Emit
    ) -> None:
        """Run the sequence on `replica` to its end; `local_reason` says why it has no handoff.

        Raises ReplicaLost, EngineDead, EngineFailed or InvalidRequest, and PrefillFailed before the first delta.
        """


class Orchestrator:
    """Serves sequences on one model's pools."""

    def __init__(
        self,
        router: Router,
        prefill: PrefillPool | None,
        decode: DecodePool,
        limits: LimitsConfig,
        *,
        aggregated: DecodePool | None = None,
    ) -> None:
        self._router = router
        self._prefill = prefill
        self._serving = {"decode": decode, "aggregated": aggregated}
        self._limits = limits

    async def run(
        self,
        request: GenerateRequest,
        emit: Emit,
        *,
        hints: RoutingHints = NO_HINTS,
        on_decision: Callable[[Decision], object] = lambda decision: None,
    ) -> None:
        """Serve the sequence, giving `emit` its deltas, and `on_decision` what was decided for each attempt.

        Raises NoReplica or Overloaded before the first delta if no replica could serve, ReplicaLost after it,
        TimeoutError if a token took longer than the limits allow, and what `DecodePool.generate` raises.
        """
        lost: list[str] = []
        progress = Progress(emit, self._limits)
        async with progress.in_time():
            for attempt in range(self._limits.max_attempts):
                decision = self._router.decide(request, hints, lost)
                on_decision(decision)
                in_flight = self._router.begin(request, decision)
                try:
                    await self._attempt(request, decision, in_flight, progress, attempt)
                    return
                except (PrefillFailed, ReplicaLost, EngineDead) as error:
                    lost.append(self._blame(request, decision, error))
                    if progress.has_started:
                        raise ReplicaLost(decision.serving.replica, str(error)) from error
                finally:
                    in_flight.end()
        raise NoReplica("prefill" if decision.prefill and lost[-1] == decision.prefill.replica else "decode")

    def _blame(self, request: GenerateRequest, decision: Decision, error: BatonError) -> str:
        """Have the replica passed over that an attempt failed by; returns which."""
        role, replica = decision.serving_role, decision.serving.replica
        if isinstance(error, PrefillFailed) and decision.prefill is not None:
            role, replica = "prefill", decision.prefill.replica
        self._router.pools[role].avoid(replica)
        logger.warning("request_id=%s %s_replica=%s failed: %s", request.request_id, role, replica, error)
        return replica

    async def _attempt(
        self, request: GenerateRequest, decision: Decision, in_flight: InFlight, progress: Progress, attempt: int
    ) -> None:
        handoff, local_reason = await self._start_prefill(request, decision, attempt)
        has_arrived = False

        def on_first(delta: TokenDelta) -> None:
            nonlocal has_arrived
            has_arrived = delta.report is not None and delta.report.kind == "remote"
            in_flight.first_token(delta.report)
            if handoff is not None and _has_failed(delta.report):
                self._router.pools["prefill"].avoid(handoff.replica)

        progress.on_first = on_first
        pool = self._serving[decision.serving_role]
        assert pool is not None
        if handoff is None:
            request = msgspec.structs.replace(request, expected_cached_tokens=decision.serving.cached_tokens)
        try:
            await pool.generate(request, handoff, local_reason, decision.serving.replica, progress.take)
        finally:
            if handoff is not None and not has_arrived:
                handoff.cancel()

    async def _start_prefill(
        self, request: GenerateRequest, decision: Decision, attempt: int
    ) -> tuple[Handoff | None, str]:
        """What the decode replica is to wait for, or None and why it prefills itself.  Raises PrefillFailed."""
        if decision.prefill is None:
            return None, decision.reason
        assert self._prefill is not None
        replica = decision.prefill.replica
        try:
            return await self._prefill.start(_to_prefill(request, decision.prefill, attempt), replica), ""
        except ReplicaLost as error:
            if self._router.local_role() != decision.serving_role:
                raise PrefillFailed(str(error)) from error
            self._router.pools["prefill"].avoid(replica)
            return None, "no_prefill_replica"


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


def _to_prefill(request: GenerateRequest, prefill: Candidate, attempt: int) -> GenerateRequest:
    """What the prefill replica gets, with an id of its own: an earlier attempt may still be ending there."""
    prefilled = corrupt_prompt(request) if request.prefill_mode == "corrupted" else request
    return msgspec.structs.replace(
        prefilled,
        request_id=f"{request.request_id}-{attempt}" if attempt else request.request_id,
        expected_cached_tokens=prefill.cached_tokens,
    )


def _has_failed(report: PrefillReport | None) -> bool:
    """Whether decode had to prefill although it had a handoff; a prompt that it had cached is no failure."""
    return report is not None and report.kind == "local" and report.reason != "already_cached"
