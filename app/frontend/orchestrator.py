"""The order in which one sequence is served: decide, prefill, decode, fail over.

1. Wait, if need be, until the model wakes (app/frontend/waking.py) and until replicas have room
   (app/routing/waiting_line.py).  Decide which of them serve it and where its prompt is prefilled
   (app/routing/router.py).
2. If that is remotely, start the prefill.  A handoff comes back at once, before its content exists.
   When it is nearly done, look again which replica is to decode.
3. Give the request and the handoff to the decode replica, which waits for the descriptor, pulls the KV and streams.
   If the prefill fails, decode prefills locally: the request succeeds, and its report says why.  If the engine cannot
   do that (SGLang), or if the prefill replica itself is gone, step 1 is repeated without that replica.
4. If the decode replica dies, another one takes its place, with a new prefill.  The handoff cannot be used twice: the
   first replica may have pulled the KV, which frees it on the prefill replica.
   After the first token the sequence is resumed: what was generated is added to the prompt, and goes on as output.
5. If the decode replica is being removed and asks for it, the sequence goes on elsewhere in the same way.  Another
   replica must have room for it first; until then it stays where it is, and no attempt counts as failed.
6. If decode has no room for a request of a higher class, a sequence of class `flex` gives up its place and waits in
   line for another one (app/routing/preemption.py).  Its stream pauses meanwhile, and no attempt counts as failed.
7. What failed is left out for a while (app/routing/ejection.py).  A request that may have ended an engine is tried once
   more, and is refused when it has ended two, or three if others may have done it (app/routing/quarantine.py).  All
   retries together are bounded (app/routing/retry_budget.py).

Cancelling `Orchestrator.run` at any moment cancels everything that runs for the sequence.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

import msgspec

from app.config import LimitsConfig
from app.errors import (
    BatonError,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    NoReplica,
    PrefillFailed,
    ReplicaLost,
    TakenElsewhere,
)
from app.frontend.attempt import Attempt, DecodePool, Job, Pools, PrefillPool
from app.frontend.sequence_progress import SequenceProgress
from app.frontend.time_limits import Overdue, in_time
from app.frontend.waking import Waker
from app.messages import GenerateRequest
from app.routing.decision import Decision, RoutingHints, Wait
from app.routing.in_flight import InFlight
from app.routing.preemption import MAX_PREEMPTIONS, PREEMPTED, Running
from app.routing.quarantine import Quarantine
from app.routing.retry_budget import RetryBudget
from app.routing.router import NO_HINTS, Router
from app.routing.waiting_line import WaitingLine

logger = logging.getLogger("baton.orchestrator")

MAX_TTFT_OF_SLO = 10
"""The default of ``limits.max_ttft_ms``, in times of the model's ``slo.ttft_ms``."""
HANDOVER_S = 2.0
"""How long a request that no replica can serve waits for one to which a connection is being made.  In an update Serve
may tell of a new replica and of the end of the last old one at the same moment."""
MAX_FAILED_ON_ENGINES = 2
"""How often a request may fail on an engine; the first time it is tried again, and once more if it is on trial
(app/routing/quarantine.py)."""


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
        can_resume_counting: bool = True,
        waker: Waker | None = None,
    ) -> None:
        """`on_prefill` are the prefill replicas as they serve whole sequences; `waker` is for models that may sleep.

        `hands_over_early` says that prefill needs to know where it is decoded before it computes (SGLang), and
        `can_resume_counting` whether engines can go on with sequences that count their output (SGLang's cannot).
        """
        self._router = router
        self._pools = Pools(
            router, prefill, {"decode": decode, "aggregated": aggregated, "prefill": on_prefill}, hands_over_early
        )
        self._limits = limits
        self._can_resume_counting = can_resume_counting
        self.waker = waker
        if waker is not None:
            router.on_join(waker.on_join)
        self.quarantine = Quarantine(router.clock)
        """The prompts of this model that are refused."""
        self._trial = asyncio.Lock()
        """Held for one prompt at a time of those that are on trial."""
        router.on_end(self.quarantine.on_gone)
        self.retry_budget = RetryBudget(router.clock)
        """All orchestrators of a frontend share one (app/frontend/openai_server.py)."""
        max_ttft_ms = limits.max_ttft_ms or MAX_TTFT_OF_SLO * router.slo.ttft_ms
        self.line = WaitingLine(router, max_ttft_ms / 1e3, asyncio.get_running_loop().call_later)

    async def run(
        self,
        request: GenerateRequest,
        progress: SequenceProgress,
        *,
        hints: RoutingHints = NO_HINTS,
        on_decision: Callable[[Decision], object] = lambda decision: None,
        deadline: float = math.inf,
    ) -> None:
        """Serve the sequence.  `progress` gets its deltas, and `on_decision` the decision of each attempt.

        Raises NoReplica or Overloaded if no replica could serve the sequence, ReplicaLost or CannotResume if it could
        not be resumed after its first delta, Quarantined if engines died of it, TimeoutError if a token took longer
        than the limits allow, DeadlineExceeded at `deadline`, in seconds of the clock of `progress`, and whatever
        `DecodePool.generate` raises.
        """
        self.quarantine.check(request)
        self.retry_budget.count_request()
        job = Job(request, request, hints, progress)
        async with in_time(progress, self._limits, deadline) as overdue:
            try:
                while not await self._try(job, on_decision, overdue):
                    pass
            finally:
                if job.place is not None:  # the client left at the very moment when one was found
                    job.place[1].end()

    async def _try(self, job: Job, on_decision: Callable[[Decision], object], overdue: Overdue) -> bool:
        """Make one attempt.  Returns whether it has served the sequence; if not, another one may."""
        with ExitStack() as exposure:
            await self._await_trial(job, exposure)
            place, job.place = job.place, None
            decision, in_flight = place or await self._turn(job)
            try:
                on_decision(decision)
                attempt = Attempt(self._pools, job, decision, in_flight, self.line, self.quarantine, exposure)
                job.progress.on_leaving = partial(self._take_elsewhere, job, attempt)
                with self._preemptible(job, attempt, in_flight):
                    return await self._serve(job, attempt, overdue)
            finally:
                in_flight.end()
                self.line.on_news()

    async def _await_trial(self, job: Job, exposure: ExitStack) -> None:
        """Wait while another prompt is on trial, if this one is to be, and keep others waiting until `exposure` ends.

        Raises Quarantined if the other one was the same and ended an engine.
        """
        if self.quarantine.is_on_trial(job.original):
            await self._trial.acquire()
            exposure.callback(self._trial.release)
            self.quarantine.check(job.original)

    async def _serve(self, job: Job, attempt: Attempt, overdue: Overdue) -> bool:
        """Serve the sequence by `attempt`.  Returns whether that did; if not, another one may."""
        try:
            await attempt.serve()
        except TakenElsewhere:
            return False
        except (PrefillFailed, ReplicaLost, EngineDead) as error:
            attempt.fail(error)
            self._check_retry(job, attempt, error)
            return False
        except BaseException as error:
            attempt.give_up(error, token_is_overdue=overdue.what == "token")
            if isinstance(error, EngineFailed) and self._repeat(job, attempt, error):
                return False
            raise
        return True

    def _check_retry(self, job: Job, attempt: Attempt, error: BatonError) -> None:
        """Raise an error for the client unless the sequence, whose attempt failed by `error`, is to be tried again."""
        job.num_failed, job.why_again = job.num_failed + 1, "lost"
        was_on_engine = attempt.was_on_engine(error)
        if (died := attempt.death(error)) is not None:
            self.quarantine.on_death(job.original, died)
        elif (suspected := attempt.suspected_death(error)) is not None:
            self.quarantine.on_failure(job.original, suspected)
        self.quarantine.check(job.original)
        if job.progress.has_first_token:
            self._resume(job, attempt, error)
            return
        job.num_failed_on_engines += was_on_engine
        pool = "prefill" if isinstance(error, PrefillFailed) and attempt.prefill is not None else "decode"
        if not self._has_tries_left(job):
            raise NoReplica(pool) from error
        if not self.retry_budget.take():
            logger.warning("request_id=%s is not tried again: the retry budget is spent", job.request.request_id)
            raise NoReplica(pool, "failed this request, and too many were tried again lately") from error

    def _has_tries_left(self, job: Job) -> bool:
        """Whether a sequence may fail once more, if not by the loss of its replica after its first token."""
        if job.num_failed >= self._limits.max_attempts:
            return False
        return job.num_failed_on_engines < MAX_FAILED_ON_ENGINES or self.quarantine.is_on_trial(job.original)

    def _can_go_on(self, job: Job) -> bool:
        """Whether another engine could go on after the tokens that there are."""
        return self._can_resume_counting or not (job.progress.token_ids and job.original.counts_output)

    def _repeat(self, job: Job, attempt: Attempt, error: EngineFailed) -> bool:
        """Have the next attempt do what one engine failed, and goes on without; elsewhere, if possible.

        It goes on after the tokens that there are.  Returns whether there is to be one.
        """
        job.num_failed, job.num_failed_on_engines = job.num_failed + 1, job.num_failed_on_engines + 1
        if not (self._has_tries_left(job) and self._can_go_on(job) and self.retry_budget.take()):
            return False
        job.suspects.add(attempt.serving)
        job.why_again = "failed"
        if token_ids := job.progress.token_ids:
            job.request = job.original.resumed(token_ids)
        logger.warning(
            "request_id=%s is tried again after %d tokens: %s failed it: %s",
            *(job.request.request_id, len(token_ids), attempt.serving, error),
        )
        return True

    def _resume(self, job: Job, attempt: Attempt, error: BatonError) -> None:
        """Have the next attempt go on after the tokens that there are.  Raises ReplicaLost if this was the last one.

        It takes nothing from the retry budget: those who lose their replica have been admitted already, and they are
        no more than it served.
        """
        if job.num_failed == self._limits.max_attempts:
            raise ReplicaLost(attempt.serving, str(error)) from error
        job.request = job.original.resumed(job.progress.token_ids)
        logger.warning(
            "request_id=%s goes on elsewhere after %d tokens", job.request.request_id, len(job.progress.token_ids)
        )

    def _preemptible(self, job: Job, attempt: Attempt, in_flight: InFlight) -> AbstractContextManager[None]:
        """Let the sequence give way to others while the block runs, if it is of the class that does."""
        if job.hints.service_class != PREEMPTED:
            return nullcontext()
        running = Running(in_flight, partial(self._preemptible_tokens, job), partial(self._preempt, job, attempt))
        return self.line.preemption.of(running)

    def _preemptible_tokens(self, job: Job) -> int | None:
        """Return how many tokens the attempt has generated; None if the sequence must not give way now.

        Not before decode has the KV: pulled in vain, or never, it would be held on prefill for its lease.
        """
        progress = job.progress
        is_decoding = progress.has_first_token and not progress.waits_for_kv
        if not is_decoding or job.place is not None or job.num_preempted == MAX_PREEMPTIONS or not self._can_go_on(job):
            return None
        return len(progress.token_ids) - job.request.num_replayed

    def _preempt(self, job: Job, attempt: Attempt) -> None:
        """Have the sequence wait in line and go on later after the tokens that there are when the replica is let go."""
        job.num_preempted += 1
        job.request, job.why_again = job.original.resumed(job.progress.token_ids), "preempted"
        job.progress.pause()
        job.progress.let_go()
        logger.info(
            "request_id=%s replica=%s is preempted after %d tokens: a higher class needs its place",
            *(job.request.request_id, attempt.serving, len(job.progress.token_ids)),
        )

    def _take_elsewhere(self, job: Job, attempt: Attempt) -> None:
        """Have the sequence go on elsewhere if another replica has room for it now, as its own asks for.

        If none has, or if engines cannot go on with it, it stays where it is.  The tokens that the next attempt goes on
        after are all that have come when the replica is let go, as nothing is awaited in between.
        """
        if not self._can_go_on(job):
            return
        token_ids = job.progress.token_ids
        request = job.original.resumed(token_ids) if token_ids else job.request
        without = job.lost | job.suspects | {attempt.serving}
        try:
            decision = self._router.decide(request, job.hints, without)
        except (NoReplica, InvalidRequest):
            return
        if isinstance(decision, Wait) or self._router.ejections.is_ejected(decision.serving.replica):
            return
        job.lost.add(attempt.serving)
        job.request, job.why_again = request, "drained"
        job.place = decision, self._router.begin(request, decision)
        job.progress.let_go()
        logger.info(
            "request_id=%s replica=%s is drained: goes on at %s after %d tokens",
            *(request.request_id, attempt.serving, decision.serving.replica, len(token_ids)),
        )

    async def _turn(self, job: Job) -> tuple[Decision, InFlight]:
        """Wait until replicas have room for the request, and if there are none for those that are about to join.

        Raises NoReplica, Asleep, Overloaded or InvalidRequest.
        """
        try:
            return await self._turn_now(job)
        except NoReplica:
            if self.waker is not None and not all(pool.replicas for pool in self._router.pools.values()):
                return await self._turn_once_awake(job, self.waker)
            joining = [task for pool in self._router.pools.values() for task in pool.joining.values()]
            if not joining:
                raise
            await asyncio.wait(joining, timeout=HANDOVER_S, return_when=asyncio.FIRST_COMPLETED)
        return await self._turn_now(job)

    async def _turn_once_awake(self, job: Job, waker: Waker) -> tuple[Decision, InFlight]:
        """Wait until the model is awake, and then in line as if the request had come only now.

        Raises Asleep, Overloaded or InvalidRequest.
        """

        async def turn() -> tuple[Decision, InFlight]:
            job.woken_at = self._router.clock()
            return await self._turn_now(job)

        decision, in_flight = await waker.until_served(turn)
        waited_s = self._router.clock() - job.progress.waits_since
        return msgspec.structs.replace(decision, waited_s=waited_s), in_flight

    async def _turn_now(self, job: Job) -> tuple[Decision, InFlight]:
        """Wait until replicas have room for the request: if possible others than those that may have failed it.

        Raises NoReplica, Overloaded or InvalidRequest.
        """
        if job.suspects:
            try:
                return await self._turn_without(job, job.lost | job.suspects)
            except NoReplica:
                pass  # a suspect one is better than none
        return await self._turn_without(job, job.lost)

    async def _turn_without(self, job: Job, lost: Collection[str]) -> tuple[Decision, InFlight]:
        turn: asyncio.Future[tuple[Decision, InFlight]] = asyncio.get_running_loop().create_future()

        def on_turn(decision: Decision, in_flight: InFlight) -> None:
            turn.set_result((decision, in_flight))

        since = max(job.progress.waits_since, job.woken_at)
        was_preempted = job.why_again == "preempted"
        was_served = job.num_attempts > 0 and not was_preempted
        ticket = self.line.join(
            *(job.request, job.hints, lost, since, on_turn, turn.set_exception),
            was_served=was_served,
            was_preempted=was_preempted,
        )
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
