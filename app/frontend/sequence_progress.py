"""The progress of one sequence: this is the one place that knows what was generated, and when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

from app.messages import Emit, PrefillKind, PrefillReport, TokenDelta
from app.observers import tell

ResumeReason = Literal["lost", "drained", "failed", "preempted"]
"""Why a sequence went on elsewhere: its replica was *lost*, or is being removed and was *drained*, or its engine
*failed* this sequence and serves others, or it was *preempted* as a request of a higher class needed its place."""


class SequenceProgress:
    """The progress of one sequence.  It is made once, when the sequence begins, and all code that serves it gets it.

    Every delta comes in through `take`.  All times are seconds of one clock.  They count from one of two moments:

    * the arrival of the request, for everything that the client notices: `ttft_s`, the timeouts, the metrics, the log;
    * the start of the present attempt, for what the router learns (`on_first`).  The time of earlier attempts says
      nothing about the replicas that serve this one.

    An attempt that begins after the first token resumes the sequence: it goes on after the tokens that there are.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        """`emit` gets each delta after it has been recorded here."""
        self.arrived_at = self.last_token_at = self.waits_since = clock()
        """`waits_since` is when the client began to wait for the next attempt's first token; a pause does not count."""
        self.token_ids: list[int] = []
        """All tokens that were generated, by all attempts."""
        self.first_token_at: float | None = None
        self.first_token_kind: PrefillKind | None = None
        """How the prompt was prefilled for the first token.  A later report may tell that decode had to prefill too."""
        self.waited_for_kv: bool | None = None
        """Whether the first token of a remote prefill came only after the KV (with SGLang it always does).  None until
        that token is there, and for a local prefill."""
        self.last_gap_s: float | None = None
        """The seconds between the last two deltas; None until there are two."""
        self.prompt_report: PrefillReport | None = None
        """How the prompt was prefilled for the answer's first tokens; resuming it does not change that."""
        self.report: PrefillReport | None = None
        """The latest report of the present attempt.  One comes with its first delta, and another one if the KV came
        later."""
        self.resume_gaps_s: list[float] = []
        """How long the client waited for the next token each time when the sequence was resumed."""
        self.resume_reasons: list[ResumeReason] = []
        """Why it was, each time."""
        self.resumed_cached_tokens: list[int] = []
        """How many tokens, of the prompt and of those that there were, no engine had to compute again, each time."""
        self.on_first: Callable[[float], object] = lambda attempt_ttft_s: None
        """Called before the first delta is passed on, with the seconds since the start of the attempt."""
        self.on_report: Callable[[PrefillReport], object] = lambda report: None
        """Called with each report, before `on_first`."""
        self.on_leaving: Callable[[], object] = lambda: None
        """Called when the replica asks to have the sequence taken elsewhere."""
        self.let_go: Callable[[], object] = lambda: None
        """Makes `DecodePool.generate`, which sets it, raise TakenElsewhere.  Nothing that the replica sends counts from
        then on."""
        self.is_paused = False
        """Whether the sequence waits in line for room to go on, for as long as that takes: no token is overdue."""
        self.paused_s = 0.0
        """How long it has waited so in all."""
        self._paused_until = self.arrived_at
        self._emit = emit
        self._clock = clock
        self._resume_reason: ResumeReason = "lost"
        self.attempt_began_at = self.arrived_at
        self.has_first_token = False
        """Whether a delta of the present attempt came."""

    @property
    def waits_for_kv(self) -> bool:
        """Whether only prefill's token is there: decode still needs a slot and the KV, as before a first token."""
        return self.report is not None and not self.report.is_complete

    @property
    def has_remote_kv(self) -> bool:
        """Whether decode received the KV that prefill computed."""
        return self.report is not None and self.report.kind == "remote" and self.report.is_complete

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    def now(self) -> float:
        return self._clock()

    def begin_attempt(self, why_again: ResumeReason = "lost") -> None:
        """Note the start of an attempt: replicas have been chosen, for the first time, or again for this reason."""
        self._resume_reason = why_again
        self.attempt_began_at = self._clock()
        if self.is_paused:
            self.is_paused, self._paused_until = False, self.attempt_began_at
            self.paused_s += self.attempt_began_at - self.waits_since
        self.waits_since = max(self.last_token_at, self._paused_until)
        self.has_first_token = False
        self.report = None

    def pause(self) -> None:
        """Note that the sequence waits in line from now on, until the next attempt begins."""
        self.is_paused, self.waits_since = True, self._clock()

    def take(self, delta: TokenDelta) -> None:
        """Record a delta and pass it on, whatever becomes of those who are told of it.  Raises what `emit` raises."""
        now = self._clock()
        if delta.report is not None:
            self.report = delta.report
            tell(self.on_report, delta.report)
        if not self.has_first_token:
            self._take_first(now)
        else:
            self.last_gap_s = now - self.last_token_at
        if not self.resume_gaps_s:
            self.prompt_report = self.report
        elif delta.report is not None:
            delta = msgspec.structs.replace(delta, report=None)
        self.token_ids += delta.token_ids
        self.last_token_at = now
        self._emit(delta)

    def _take_first(self, now: float) -> None:
        self.has_first_token = True
        if self.first_token_at is None:
            self.first_token_at = now
            self.first_token_kind = self.report.kind if self.report is not None else None
            if self.report is not None and self.report.kind == "remote":
                self.waited_for_kv = bool(self.report.transferred_tokens)
        else:
            self.last_gap_s = None
            self.resume_gaps_s.append(now - self.last_token_at)
            self.resume_reasons.append(self._resume_reason)
            self.resumed_cached_tokens.append(self.report.cached_tokens if self.report is not None else 0)
        tell(self.on_first, now - self.attempt_began_at)
