"""One attempt to serve a sequence on the replicas that were chosen for it, and what its outcome says of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Protocol

import msgspec

from app.errors import BatonError, EngineDead, EngineFailed, HandoffNotTaken, PrefillFailed, ReplicaLost
from app.frontend.sequence_progress import ResumeReason, SequenceProgress
from app.messages import GenerateRequest, PrefillReport, Role
from app.routing.decision import Candidate, Decision, RoutingHints
from app.routing.ejection import STRONG, WEAK
from app.routing.in_flight import InFlight
from app.routing.placement import corrupt_prompt
from app.routing.quarantine import Quarantine
from app.routing.router import Router
from app.routing.waiting_line import WaitingLine

logger = logging.getLogger("baton.orchestrator")

LOOK_AGAIN_AT = 0.6
"""The share of the predicted time of a remote prefill after which the decode replica is chosen again.  Predictions are
off by a third at times, and decode has to be ready before the descriptor is."""
LOOK_AGAIN_S = 0.05
"""It is not chosen again for less than so many seconds, in which little changes."""
LATE_S, LATE_OF_PREDICTED = 5.0, 10.0
"""A client that gives up speaks against the replicas if the token that it waited for is late by both: so many seconds,
and so many times the predicted time to the first token.  Predictions under load are off by less."""


Lost = asyncio.Future[EngineDead | ReplicaLost]
"""Done when a replica is gone: with the error that it told, or ReplicaLost if it told none."""


class Handoff(Protocol):
    """A prefill that has been started.  Only the decode replica reads its descriptor."""

    replica: str
    """The prefill replica."""
    lost: Lost
    """Of the prefill replica."""

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

        Raises ReplicaLost, EngineDead, EngineFailed or InvalidRequest, PrefillFailed before the first delta, and
        TakenElsewhere once `SequenceProgress.let_go` was called.
        """


class Pools(msgspec.Struct, frozen=True):
    """One model's pools as attempts call them, and the router that knows their replicas."""

    router: Router
    prefill: PrefillPool | None
    serving: Mapping[Role, DecodePool | None]
    hands_over_early: bool
    """Whether prefill needs to know where it is decoded before it computes (SGLang)."""


class Job(msgspec.Struct):
    """A sequence to serve, and what its attempts have shown so far."""

    request: GenerateRequest
    """What the next attempt is to do: `original`, or the rest of it."""
    original: GenerateRequest
    hints: RoutingHints
    progress: SequenceProgress
    lost: set[str] = set()
    """Replicas that are gone.  They must not be tried again."""
    suspects: set[str] = set()
    """Replicas that took part in a failure whose cause is not known, or were too slow.  Others are preferred."""
    num_attempts: int = 0
    """The attempts that have begun."""
    num_failed: int = 0
    """The attempts that failed."""
    num_failed_on_engines: int = 0
    """The attempts that failed when an engine had the sequence, rather than on the way there."""
    woken_at: float = 0.0
    """When it last could be served by a model that had slept; until then it waited in no line."""
    why_again: ResumeReason = "lost"
    """Why the last attempt did not serve it."""
    num_preempted: int = 0
    """How often it gave way to a request of a higher class."""
    place: tuple[Decision, InFlight] | None = None
    """What the next attempt is to go by, if it was decided already; the sequence counts on its replicas."""


class Attempt:
    """One attempt.  `serve` runs it; if that raises, `fail` or `give_up` draws the conclusions."""

    def __init__(
        self,
        pools: Pools,
        job: Job,
        decision: Decision,
        in_flight: InFlight,
        line: WaitingLine,
        quarantine: Quarantine,
        exposure: ExitStack,
    ) -> None:
        """`line` is told when the first token has come, as a replica has more room then.

        `quarantine` is told when the serving engine has computed a token, so that none died of the sequence; then
        `exposure` is closed, which its owner does in any case.
        """
        self._pools = pools
        self._quarantine = quarantine
        self._exposure = exposure
        self._router = pools.router
        self._ejections = pools.router.ejections
        self._job = job
        self._progress = job.progress
        self._decision = decision
        self._in_flight = in_flight
        self._line = line
        self._number = job.num_attempts
        self.prefill = decision.prefill.replica if decision.prefill is not None else None
        """The replica that prefills for it; None if the serving replica does that itself."""
        self._handoff: Handoff | None = None
        self._was_sound = False
        """Whether the serving replica was there and not known to be bad when it got the sequence."""
        job.num_attempts += 1
        job.progress.begin_attempt(job.why_again)

    @property
    def serving(self) -> str:
        """The replica that decodes, or is to."""
        return self._in_flight.serving.replica

    async def serve(self) -> None:
        """Raises what `DecodePool.generate` raises, and PrefillFailed if the prefill replica is gone."""
        decision, progress, request = self._decision, self._progress, self._job.request
        self._handoff, local_reason = handoff, _ = await self._start_prefill()
        if handoff is not None and not self._pools.hands_over_early:
            await self._look_again(handoff)
        progress.on_first, progress.on_report = self._on_first, self._on_report
        pool = self._pools.serving[decision.serving_role]
        assert pool is not None
        if handoff is None:
            request = msgspec.structs.replace(request, expected_cached_tokens=decision.serving.cached_tokens)
        is_there = self._router.by_role.find(self.serving) is not None
        self._was_sound = is_there and not self._ejections.is_ejected(self.serving)
        replicas = [self.serving] if handoff is None else [self.serving, handoff.replica]
        self._exposure.enter_context(self._quarantine.exposing(*replicas))
        try:
            await pool.generate(request, handoff, local_reason, self.serving, progress)
        finally:
            if handoff is not None and not progress.has_remote_kv:
                handoff.cancel()

    async def _start_prefill(self) -> tuple[Handoff | None, str]:
        """Start the prefill if the decision is to prefill remotely.

        Returns the handoff that decode has to wait for, or None and the reason why decode prefills locally.  Raises
        PrefillFailed if the prefill replica is gone and the serving replica cannot prefill instead.
        """
        decision = self._decision
        if decision.prefill is None:
            return None, decision.reason
        assert self._pools.prefill is not None
        replica = decision.prefill.replica
        try:
            level = self._line.level(self._job.hints, is_again=self._number > 0)
            priority = self._job.request.priority if self._pools.hands_over_early else level
            request = _to_prefill(self._job.request, decision.prefill, self._number, priority)
            return await self._pools.prefill.start(request, replica), ""
        except ReplicaLost as error:
            if self._router.local_role() != decision.serving_role:
                raise PrefillFailed(str(error)) from error
            self._ejections.failed(replica, STRONG, self._in_flight.began_at)
            self.prefill = None
            return None, "no_prefill_replica"

    async def _look_again(self, handoff: Handoff) -> None:
        """Wait until the prefill is nearly done, and choose the decode replica again, as others may be better by then.

        Raises PrefillFailed if the prefill replica is gone.
        """
        job, decision = self._job, self._decision
        wait_s = LOOK_AGAIN_AT * decision.predicted_ttft_s
        if wait_s < LOOK_AGAIN_S or len(self._router.pools["decode"].replicas) < 2:
            return
        try:
            if (await asyncio.wait([handoff.lost], timeout=wait_s))[0]:
                raise PrefillFailed("the prefill replica is gone")
            without = job.lost | job.suspects
            self._in_flight.choose_again(lambda: self._router.receiver(job.request, job.hints, without, decision))
        except asyncio.CancelledError:
            # Decode gets the handoff all the same, and is cancelled with it: only its engine can free the KV of a
            # prefill that is over.
            _cancel_later()
        except BaseException:
            handoff.cancel()
            raise

    def _on_first(self, attempt_ttft_s: float) -> None:
        self._in_flight.first_token(self._progress.report, attempt_ttft_s)
        if not self._progress.waits_for_kv:
            self._ejections.succeeded(self.serving, self._in_flight.began_at)
        self._line.on_news()

    def _on_report(self, report: PrefillReport) -> None:
        if report.is_complete:
            # Not after `serve`: with its last token a sequence is cancelled, mostly before that returns.
            self._quarantine.on_success(self._job.original)
            self._exposure.close()
        if (handoff := self._handoff) is None:
            return
        if report.kind == "remote" and report.is_complete:
            self._ejections.pair_succeeded(handoff.replica, self.serving, self._in_flight.began_at)
            if self._progress.has_first_token and (transfer_s := report.phases.get("transfer")) is not None:
                self._in_flight.pulled(report.transferred_tokens or 0, transfer_s)
        elif _has_failed(report):
            self._blame_prefill_or_pair(STRONG)

    def fail(self, error: BatonError) -> None:
        """Tell the router what failed, and the job what its next attempt has to leave out."""
        job, handoff, prefill = self._job, self._handoff, self.prefill
        logger.warning(
            "request_id=%s prefill_replica=%s serving_replica=%s failed: %s",
            *(job.request.request_id, prefill or "none", self.serving, error),
        )
        has_lost_prefill = handoff is not None and handoff.lost.done()
        if isinstance(error, PrefillFailed) and prefill is not None:
            if handoff is None or has_lost_prefill:
                job.lost.add(prefill)
            else:
                job.suspects |= {prefill, self.serving}
            self._blame_prefill_or_pair(STRONG)
            return
        if isinstance(error, HandoffNotTaken):  # it may only be slow: better it again than none
            job.suspects.add(self.serving)
        else:
            job.lost.add(self.serving)
        self._ejections.failed(self.serving, STRONG, self._in_flight.began_at)
        if handoff is not None and has_lost_prefill:
            job.lost.add(handoff.replica)
            self._blame_prefill_or_pair(STRONG)

    def was_on_engine(self, error: BatonError) -> bool:
        """Whether an engine that was sound got the sequence and then failed by `error`: it may have died of it."""
        if isinstance(error, PrefillFailed):
            return self._handoff is not None
        return self._was_sound and not isinstance(error, HandoffNotTaken)

    def death(self, error: BatonError) -> str | None:
        """Return a replica of which it is known that its engine died while it had the sequence, or None.

        The sequence had no token then, or was in decode's first step.  A prefill and a decode engine that die at once
        are one death.
        """
        if self._progress.has_first_token and not self._progress.waits_for_kv:
            return None
        if self._was_sound and isinstance(error, EngineDead):
            return self.serving
        handoff = self._handoff
        if handoff is not None and handoff.lost.done() and isinstance(handoff.lost.result(), EngineDead):
            return handoff.replica
        return None

    def suspected_death(self, error: BatonError) -> str | None:
        """Return a replica whose engine may have died in the same way, or None: only its connection ended, or no KV
        came from it."""
        if not self.was_on_engine(error) or (self._progress.has_first_token and not self._progress.waits_for_kv):
            return None
        return self.prefill if isinstance(error, PrefillFailed) else self.serving

    def give_up(self, error: BaseException, *, token_is_overdue: bool) -> None:
        """Tell the router of an attempt that ends the sequence, and for which no replica need be at fault."""
        is_decoding = self._progress.has_first_token and not self._progress.waits_for_kv
        if token_is_overdue:
            if not (is_decoding or self._had_most_of_the_time()):
                return
            evidence = STRONG
        elif isinstance(error, EngineFailed) or (isinstance(error, asyncio.CancelledError) and self._token_is_late()):
            evidence = WEAK
        else:
            return
        if is_decoding:
            self._ejections.failed(self.serving, evidence, self._in_flight.began_at)
        else:
            self._blame_prefill_or_pair(evidence)

    def _had_most_of_the_time(self) -> bool:
        """Whether a first token that is overdue was awaited here for longer than in the line and earlier attempts."""
        progress = self._progress
        return progress.now() - progress.attempt_began_at >= progress.attempt_began_at - progress.arrived_at

    def _token_is_late(self) -> bool:
        progress = self._progress
        since = progress.last_token_at if progress.has_first_token else progress.attempt_began_at
        waited_s = progress.now() - since
        return waited_s > max(LATE_S, LATE_OF_PREDICTED * self._decision.predicted_ttft_s)

    def _blame_prefill_or_pair(self, evidence: int) -> None:
        """Blame whoever may have kept the first token from coming: the pair, or one end if it must have been that."""
        began_at, prefill = self._in_flight.began_at, self.prefill
        if prefill is None:
            self._ejections.failed(self.serving, evidence, began_at)
        elif self._handoff is None or self._handoff.lost.done():
            self._ejections.failed(prefill, evidence, began_at)
        else:
            self._ejections.pair_failed(prefill, self.serving, evidence, began_at)


def _to_prefill(request: GenerateRequest, prefill: Candidate, attempt: int, priority: int) -> GenerateRequest:
    """Make the request for the prefill replica.

    It has an id of its own, because an earlier attempt may not have ended yet on that replica.
    """
    prefilled = corrupt_prompt(request) if request.prefill_mode == "corrupted" else request
    return msgspec.structs.replace(
        prefilled,
        request_id=f"{request.request_id}-{attempt}" if attempt else request.request_id,
        expected_cached_tokens=prefill.cached_tokens,
        priority=priority,
        sent_at=time.time(),
    )


def _cancel_later() -> None:
    """Cancel the current task where it waits next, instead of here, where it is being cancelled."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()
    task.cancel()


def _has_failed(report: PrefillReport) -> bool:
    """Whether decode had to prefill although it had a handoff.  A prompt that it had cached counts as no failure."""
    return report.kind == "local" and report.reason != "already_cached"
