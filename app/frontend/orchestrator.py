"""The order in which one sequence is served: decide, prefill, decode, fail over.

1. Wait, if need be, until replicas have room (app/routing/waiting_line.py), and decide which of them serve it and where
   its prompt is prefilled (app/routing/router.py).
2. If that is remotely, start the prefill.  A handoff comes back at once, before its content exists.
   When it is nearly done, look again which replica is to decode.
3. Give the request and the handoff to the decode replica, which waits for the descriptor, pulls the KV and streams.
   If the prefill fails, decode prefills locally: the request succeeds, and its report says why.  If the engine cannot
   do that (SGLang), or if the prefill replica itself is gone, step 1 is repeated without that replica.
4. If the decode replica dies before the first token, another one takes its place, with a new prefill.  The handoff
   cannot be used twice: the first replica may have pulled the KV, which frees it on the prefill replica.
   After the first token the sequence fails, as tokens that were sent cannot be taken back.

Cancelling `Orchestrator.run` at any moment cancels everything that runs for the sequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec

from app.config import LimitsConfig
from app.errors import BatonError, EngineDead, NoReplica, PrefillFailed, ReplicaLost
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport
from app.routing.decision import Candidate, Decision, RoutingHints
from app.routing.in_flight import InFlight
from app.routing.placement import corrupt_prompt
from app.routing.router import NO_HINTS, Router
from app.routing.waiting_line import WaitingLine

logger = logging.getLogger("baton.orchestrator")

MAX_TTFT_OF_SLO = 10
"""The default of ``limits.max_ttft_ms``, in times of the model's ``slo.ttft_ms``."""
LOOK_AGAIN_AT = 0.6
"""The share of the predicted time of a remote prefill after which the decode replica is chosen again.  Predictions are
off by a third at times, and decode has to be ready before the descriptor is."""
LOOK_AGAIN_S = 0.05
"""It is not chosen again for less than so many seconds, in which little changes."""


class Handoff(Protocol):
    """A prefill that has been started.  Only the decode replica reads its descriptor."""

    replica: str
    """The prefill replica."""
    lost: asyncio.Future[None]
    """Done when the prefill replica is gone."""

    def cancel(self) -> None:
        """Stop the prefill, however far it is.  Safe at any time; it does nothing if decode already has the KV."""


class PrefillPool(Protocol):
    """The prefill replicas as the orchestrator calls them."""

    async def start(self, request: GenerateRequest, replica: str) -> Handoff:
        """Start the prefill on `replica`.  Raises ReplicaLost if the replica is gone."""


class DecodePool(Protocol):
    """The replicas of a decode or aggregated pool, as the orchestrator calls them."""

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        """Run the sequence on `replica` to its end, and give every delta to `progress`.

        Without a handoff, `local_reason` says why there is none.

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
        on_prefill: DecodePool | None = None,
        hands_over_early: bool = False,
    ) -> None:
        """`on_prefill` are the prefill replicas as they serve whole sequences.

        `hands_over_early` says that prefill needs to know where it is decoded before it computes (SGLang).
        """
        self._router = router
        self._prefill = prefill
        self._serving = {"decode": decode, "aggregated": aggregated, "prefill": on_prefill}
        self._limits = limits
        self._hands_over_early = hands_over_early
        max_ttft_ms = limits.max_ttft_ms or MAX_TTFT_OF_SLO * router.slo.ttft_ms
        self.line = WaitingLine(router, max_ttft_ms / 1e3, asyncio.get_running_loop().call_later)

    async def run(
        self,
        request: GenerateRequest,
        progress: SequenceProgress,
        *,
        hints: RoutingHints = NO_HINTS,
        on_decision: Callable[[Decision], object] = lambda decision: None,
    ) -> None:
        """Serve the sequence.  `progress` gets its deltas, and `on_decision` the decision of each attempt.

        Before the first delta, raises NoReplica or Overloaded if no replica could serve the sequence; after it,
        ReplicaLost.  Raises TimeoutError if a token took longer than the limits allow, and whatever
        `DecodePool.generate` raises.
        """
        lost: list[str] = []
        async with in_time(progress, self._limits):
            for attempt in range(self._limits.max_attempts):
                decision, in_flight = await self._turn(request, hints, lost, progress.arrived_at)
                try:
                    on_decision(decision)
                    progress.begin_attempt()
                    await self._attempt(request, hints, lost, decision, in_flight, progress, attempt)
                    return
                except (PrefillFailed, ReplicaLost, EngineDead) as error:
                    lost.append(self._blame(request, decision, in_flight.serving.replica, error))
                    if progress.has_first_token:
                        raise ReplicaLost(in_flight.serving.replica, str(error)) from error
                finally:
                    in_flight.end()
                    self.line.on_news()
        raise NoReplica("prefill" if decision.prefill and lost[-1] == decision.prefill.replica else "decode")

    async def _turn(
        self, request: GenerateRequest, hints: RoutingHints, lost: list[str], arrived_at: float
    ) -> tuple[Decision, InFlight]:
        """Wait until replicas have room for the request.  Raises NoReplica, Overloaded or InvalidRequest."""
        turn: asyncio.Future[tuple[Decision, InFlight]] = asyncio.get_running_loop().create_future()

        def on_turn(decision: Decision, in_flight: InFlight) -> None:
            turn.set_result((decision, in_flight))

        ticket = self.line.join(request, hints, lost, arrived_at, on_turn, turn.set_exception)
        if ticket is None:
            return turn.result()
        try:
            await asyncio.wait([turn])
        except asyncio.CancelledError:
            self.line.leave(ticket)
            if turn.done() and turn.exception() is None:
                turn.result()[1].end()
            raise
        return turn.result()

    def _blame(self, request: GenerateRequest, decision: Decision, serving: str, error: BatonError) -> str:
        """Make the router avoid the replica that caused an attempt on `serving` to fail.  Returns its id."""
        role, replica = decision.serving_role, serving
        if isinstance(error, PrefillFailed) and decision.prefill is not None:
            role, replica = "prefill", decision.prefill.replica
        self._router.pools[role].avoid(replica)
        logger.warning("request_id=%s %s_replica=%s failed: %s", request.request_id, role, replica, error)
        return replica

    async def _attempt(
        self,
        request: GenerateRequest,
        hints: RoutingHints,
        lost: list[str],
        decision: Decision,
        in_flight: InFlight,
        progress: SequenceProgress,
        attempt: int,
    ) -> None:
        handoff, local_reason = await self._start_prefill(request, decision, attempt)
        if handoff is not None and not self._hands_over_early:
            await self._look_again(request, hints, lost, decision, in_flight, handoff)

        def on_first(attempt_ttft_s: float) -> None:
            in_flight.first_token(progress.report, attempt_ttft_s)
            self.line.on_news()

        def on_report(report: PrefillReport) -> None:
            if handoff is not None and _has_failed(report):
                self._router.pools["prefill"].avoid(handoff.replica)

        progress.on_first, progress.on_report = on_first, on_report
        pool = self._serving[decision.serving_role]
        assert pool is not None
        serving = in_flight.serving.replica
        if handoff is None:
            request = msgspec.structs.replace(request, expected_cached_tokens=decision.serving.cached_tokens)
        try:
            await pool.generate(request, handoff, local_reason, serving, progress)
        finally:
            if handoff is not None and not progress.has_remote_kv:
                handoff.cancel()

    async def _look_again(
        self,
        request: GenerateRequest,
        hints: RoutingHints,
        lost: list[str],
        decision: Decision,
        in_flight: InFlight,
        handoff: Handoff,
    ) -> None:
        """Wait until the prefill is nearly done, and choose the decode replica again, as others may be better by then.

        Raises PrefillFailed if the prefill replica is gone.
        """
        wait_s = LOOK_AGAIN_AT * decision.predicted_ttft_s
        if wait_s < LOOK_AGAIN_S or len(self._router.pools["decode"].replicas) < 2:
            return
        try:
            if (await asyncio.wait([handoff.lost], timeout=wait_s))[0]:
                raise PrefillFailed("the prefill replica is gone")
            in_flight.choose_again(lambda: self._router.receiver(request, hints, lost, decision))
        except BaseException:
            handoff.cancel()
            raise

    async def _start_prefill(
        self, request: GenerateRequest, decision: Decision, attempt: int
    ) -> tuple[Handoff | None, str]:
        """Start the prefill if the decision is to prefill remotely.

        Returns the handoff that decode has to wait for, or None and the reason why decode prefills locally.  Raises
        PrefillFailed if the prefill replica is gone and the serving replica cannot prefill instead.
        """
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


@asynccontextmanager
async def in_time(progress: SequenceProgress, limits: LimitsConfig) -> AsyncGenerator[None, None]:
    """Cancel the block and raise TimeoutError from it once a delta is overdue.

    Deltas cost nothing here: a timer checks now and then whether one is overdue.  It does so at least every
    `itl_timeout_s`, so that it is in time for the second delta too, whenever the first one comes.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.Handle

    def look() -> None:
        nonlocal timer
        if progress.has_first_token and not progress.waits_for_kv:
            due = progress.last_token_at + limits.itl_timeout_s
        else:
            due = progress.arrived_at + limits.ttft_timeout_s
        if (remaining_s := due - progress.now()) > 0:
            timer = loop.call_later(min(remaining_s, limits.itl_timeout_s), look)
        else:
            timeout.reschedule(loop.time())

    async with asyncio.timeout(None) as timeout:
        timer = loop.call_soon(look)
        try:
            yield
        finally:
            timer.cancel()


def _to_prefill(request: GenerateRequest, prefill: Candidate, attempt: int) -> GenerateRequest:
    """Make the request for the prefill replica.

    It has an id of its own, because an earlier attempt may not have ended yet on that replica.
    """
    prefilled = corrupt_prompt(request) if request.prefill_mode == "corrupted" else request
    return msgspec.structs.replace(
        prefilled,
        request_id=f"{request.request_id}-{attempt}" if attempt else request.request_id,
        expected_cached_tokens=prefill.cached_tokens,
        sent_at=time.time(),
    )


def _has_failed(report: PrefillReport) -> bool:
    """Whether decode had to prefill although it had a handoff.  A prompt that it had cached counts as no failure."""
    return report.kind == "local" and report.reason != "already_cached"
