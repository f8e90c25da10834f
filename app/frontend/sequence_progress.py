"""How far one sequence has come: the one place that knows whether its first token is there, and when it came."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.messages import Emit, PrefillReport, TokenDelta


class SequenceProgress:
    """Made once, when a sequence begins, and handed down to all that serve it; every delta comes in by `take`.

    All times are seconds of one clock, counted from one of two zeros:

    * the arrival of the request, for what its client sees: `ttft_s`, the timeouts, the metrics, the log;
    * the begin of the present attempt, for what the router learns (`on_first`).  What attempts before it took says
      nothing of the replicas that serve this one.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        """`emit` gets each delta when it has been noted here."""
        self.arrived_at = self.last_token_at = clock()
        self.first_token_at: float | None = None
        self.last_gap_s: float | None = None
        """Between the last two deltas; None until there are two."""
        self.report: PrefillReport | None = None
        """The first delta's."""
        self.on_first: Callable[[float], object] = lambda attempt_ttft_s: None
        """Called before the first delta is passed on, with the seconds since the attempt's begin."""
        self._emit = emit
        self._clock = clock
        self._attempt_began_at = self.arrived_at

    @property
    def has_first_token(self) -> bool:
        """Whether anything came: from then on the sequence cannot be begun anew elsewhere."""
        return self.first_token_at is not None

    @property
    def has_remote_kv(self) -> bool:
        """Whether decode has got the KV that prefill computed."""
        return self.report is not None and self.report.kind == "remote"

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    def now(self) -> float:
        return self._clock()

    def begin_attempt(self) -> None:
        """Replicas have been chosen, perhaps not for the first time."""
        self._attempt_began_at = self._clock()

    def take(self, delta: TokenDelta) -> None:
        """Note a delta and pass it on."""
        now = self._clock()
        if self.first_token_at is None:
            self.first_token_at = now
            self.report = delta.report
            self.on_first(now - self._attempt_began_at)
        else:
            self.last_gap_s = now - self.last_token_at
        self.last_token_at = now
        self._emit(delta)
