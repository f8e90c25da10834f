"""Predicts how long a prompt's first token takes, fitted on line to what this frontend's own requests took.

The time is taken to be linear in the work that has to be done, with coefficients that are never negative:

    prefill  = a + b * uncached + c * (length^2 - cached^2) + d * queued         (on a prefill replica)
    handover = e + f * moved + g * decoding + h * left                           (from its end to the first token)
    local    = the same as prefill, + i * decoding                               (where it is decoded)

All amounts are tokens, except that `decoding` counts the sequences that decode where this one will.  `queued` are the
prompt tokens that wait there to be computed.  `left` are those that are left on the decode replica when prefill has
ended, if both compute equally fast: an engine that is busy with prompts makes a handover wait too.  The time of a
remote prefill is prefill + handover.  An engine that hands over before it has computed (SGLang) tells no time for
prefill alone; its whole remote time is then fitted by the first line.

Each fit minimizes the squares of relative errors over the last WINDOW requests, at most MAX_AGE_S old, of which the
newer count more.  So it follows what changes, and a single stall hardly moves it.  PRIOR_LENGTHS stand in for lengths
that have not been seen: for these the time is that of a start value, times how much slower or faster the measured
requests typically were than their own start values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from app.least_squares import fit_non_negative
from app.routing.decision import Prediction

WINDOW = 128
HALF_LIFE = 32
"""The number of later requests after which a request counts half."""
MAX_AGE_S = 600.0
"""A way that no request has taken for this long counts as not measured, and is tried again."""
RETRY_REQUESTS, RETRY_S = 256, 30.0
"""The same holds for a way that this many requests in at least this many seconds have avoided, and what was known of it
is then forgotten.  What made it slow, such as decode replicas without a free slot, may have passed, and nobody would
notice."""
REFIT_EVERY = 8
"""The number of requests between fits, once there are as many; a fit takes 0.3 ms."""

START_PREFILL = (0.01, 4e-5, 0.0, 4e-5)
"""In seconds: 10 ms, and 25,000 tokens/s, which an 8B model reaches on an H200 (docs/benchmarks/2026-11-21-h200.md).
Only the proportions matter, because the first measurement sets the scale."""
START_HANDOVER = (0.005, 1.3e-5, 0.0, 0.0)
"""In seconds: 5 ms, and 10 GB/s with 131,072 bytes per token."""
SHORTEST_S = 1e-5
"""No prompt takes less, although a clock may say so."""
PRIOR_LENGTHS = (32, 256, 2048, 16384)
PRIOR_WEIGHT = 0.2
"""The weight of each of PRIOR_LENGTHS, where the newest measured request has 1."""


PREFILL_FEATURES = ("base_s", "s_per_token", "s_per_token_squared", "s_per_queued_token")
LOCAL_FEATURES = (*PREFILL_FEATURES, "s_per_decoding_sequence")
HANDOVER_FEATURES = ("base_s", "s_per_moved_token", "s_per_decoding_sequence", "s_per_queued_token")


class TimeModel:
    """A time that is linear in features, none of whose coefficients is negative."""

    def __init__(
        self,
        prior_rows: Sequence[Sequence[float]],
        prior: Callable[[Sequence[float]], float],
        clock: Callable[[], float],
    ) -> None:
        """`prior` gives the start value, in seconds, for a row of features, such as those of `prior_rows`."""
        self._prior_rows = prior_rows
        self._prior = prior
        self._clock = clock
        self._samples: deque[tuple[float, Sequence[float], float]] = deque(maxlen=WINDOW)
        self._coefficients: list[float] | None = None
        self._num_since_fit = 0
        self._num_avoided = 0

    @property
    def num_features(self) -> int:
        return len(self._prior_rows[0])

    @property
    def is_measured(self) -> bool:
        """Whether there is a sample that is not too old."""
        if not self._samples:
            return False
        age_s = self._clock() - self._samples[-1][0]
        return age_s < MAX_AGE_S and not (age_s > RETRY_S and self._num_avoided >= RETRY_REQUESTS)

    def coefficients(self) -> list[float] | None:
        """Return the seconds for each unit of each feature; None if nothing is measured."""
        return self._coefficients if self.is_measured else None

    def learn(self, row: Sequence[float], seconds: float) -> None:
        """Take in one measurement.  It fits anew here if that is due, so that no decision has to wait for it."""
        while self._samples and (not self.is_measured or self._samples[0][0] <= self._clock() - MAX_AGE_S):
            self._samples.popleft()
        self._num_avoided = 0
        self._samples.append((self._clock(), row, max(seconds, SHORTEST_S)))
        self._num_since_fit += 1
        if self._num_since_fit >= min(REFIT_EVERY, len(self._samples)):
            self._coefficients = self._fit()
            self._num_since_fit = 0

    def avoid(self) -> None:
        """Take note that a request went the other way."""
        self._num_avoided += 1

    def predict(self, row: Sequence[float]) -> float:
        """Predict the seconds for these features."""
        coefficients = self.coefficients()
        return self._prior(row) if coefficients is None else max(SHORTEST_S, _dot(coefficients, row))

    def _fit(self) -> list[float]:
        rows = [row for _, row, _ in self._samples]
        times = [seconds for *_, seconds in self._samples]
        scale = _typical_ratio(times, [self._prior(row) for row in rows])
        prior_times = [scale * self._prior(row) for row in self._prior_rows]
        by_age = [0.5 ** (age / HALF_LIFE / 2) for age in range(len(rows))]  # the fit squares it
        weights = [*reversed(by_age), *[PRIOR_WEIGHT] * len(prior_times)]
        return fit_non_negative([*rows, *self._prior_rows], times + prior_times, weights)


class PromptWork:
    """What the time of a prompt's prefill depends on, at one replica."""

    __slots__ = ("cached", "decoding", "num_tokens", "queued")

    def __init__(self, num_tokens: int, cached: int, queued: int, decoding: int = 0) -> None:
        """`decoding` sequences run where the prompt will be decoded."""
        self.num_tokens = num_tokens
        self.cached = cached
        self.queued = queued
        self.decoding = decoding

    def prefill_row(self) -> tuple[float, ...]:
        uncached = self.num_tokens - self.cached
        return (1.0, uncached, self.num_tokens**2 - self.cached**2, self.queued)

    def local_row(self) -> tuple[float, ...]:
        return (*self.prefill_row(), self.decoding)


class HandoverWork:
    """What the time from the end of a remote prefill to the first token depends on, at the replica that decodes."""

    __slots__ = ("decoding", "left", "moved")

    def __init__(self, moved: int, decoding: int = 0, left: int = 0) -> None:
        self.moved = moved
        self.decoding = decoding
        self.left = left

    @classmethod
    def after(cls, prefill: PromptWork, moved: int, decoding: int, queued: int) -> HandoverWork:
        """`queued` prompt tokens wait on the decode replica while `prefill` is done elsewhere."""
        return cls(moved, decoding, max(0, queued - prefill.queued - (prefill.num_tokens - prefill.cached)))

    def row(self) -> tuple[float, ...]:
        return (1.0, self.moved, self.decoding, self.left)


class TtftPredictor:
    """Predicts the times of both ways, and learns from the times that requests took."""

    def __init__(self, clock: Callable[[], float]) -> None:
        prompts = [PromptWork(length, 0, 0).prefill_row() for length in PRIOR_LENGTHS]
        queued = [PromptWork(length, 0, length).prefill_row() for length in PRIOR_LENGTHS[-2:]]
        self.prefill = TimeModel(prompts + queued, _linear(START_PREFILL), clock)
        self.handover = TimeModel([HandoverWork(n).row() for n in PRIOR_LENGTHS], _linear(START_HANDOVER), clock)
        # It serves the same model on, most likely, the same hardware, so it starts from what prefill takes.
        local_rows = [(*row, 0.0) for row in prompts + queued]
        self.local = TimeModel(local_rows, lambda row: self.prefill.predict(row[:-1]), clock)

    def remote_s(self, work: PromptWork, handover: HandoverWork) -> float | None:
        """Predict the seconds of a remote prefill to the first token; None until one was measured."""
        if not self.prefill.is_measured:
            return None
        handover_s = self.handover.predict(handover.row()) if self.handover.is_measured else 0.0
        return self.prefill.predict(work.prefill_row()) + handover_s

    def local_s(self, work: PromptWork) -> float | None:
        """Predict the seconds of a local prefill to the first token; None until any prefill was measured."""
        if not self.prefill.is_measured and not self.local.is_measured:
            return None
        return self.local.predict(work.local_row())

    def interference_s(self, work: PromptWork, itl_budget_s: float) -> float:
        """Predict how long a local prefill makes the sequences there wait beyond the budget, added up over them.

        This counts as if the prefill took place at once.  In chunks it is spread over more tokens, but takes as long.
        """
        if not work.decoding:
            return 0.0
        alone = PromptWork(work.num_tokens, work.cached, 0).local_row()
        stall_s = self.local.predict(alone) - self.local.predict((1.0, *(0.0,) * 4))
        return work.decoding * max(0.0, stall_s - itl_budget_s)

    def speeds(self) -> dict[str, dict[str, float]]:
        """Return the fitted seconds per unit of work, by model and feature, without models that were not measured."""
        models = {
            "prefill": (self.prefill, PREFILL_FEATURES),
            "handover": (self.handover, HANDOVER_FEATURES),
            "local": (self.local, LOCAL_FEATURES),
        }
        return {
            name: dict(zip(features, coefficients, strict=True))
            for name, (model, features) in models.items()
            if (coefficients := model.coefficients()) is not None
        }

    def queue_s(self, num_tokens: int) -> float:
        """Predict how long a replica takes for `num_tokens` waiting tokens, in seconds."""
        model = self.prefill if self.prefill.is_measured else self.local
        return model.predict(PromptWork(0, 0, num_tokens).local_row()[: model.num_features])

    def predict(
        self, remote: tuple[PromptWork, HandoverWork] | None, local: PromptWork | None, itl_budget_s: float
    ) -> Prediction:
        """Predict the times of the ways that are open; the others are None."""
        return Prediction(
            self.remote_s(*remote) if remote else None,
            self.local_s(local) if local else None,
            self.interference_s(local, itl_budget_s) if local else 0.0,
        )

    def learn_remote(
        self, work: PromptWork, handover: HandoverWork, ttft_s: float, prefill_s: float | None
    ) -> float | None:
        """Learn from a remote prefill; `prefill_s` is prefill's part of `ttft_s`, or None if that is not known.

        Returns the time of the rest, the handover, divided by its predicted time; None if the rest is not known.
        """
        if prefill_s is None or not 0 < prefill_s < ttft_s:
            self.prefill.learn(work.prefill_row(), ttft_s)
            return None
        handover_s, row = ttft_s - prefill_s, handover.row()
        expected_s = self.handover.predict(row) if self.handover.is_measured else handover_s
        self.prefill.learn(work.prefill_row(), prefill_s)
        self.handover.learn(row, handover_s)
        return handover_s / expected_s

    def learn_local(self, work: PromptWork, ttft_s: float) -> None:
        self.local.learn(work.local_row(), ttft_s)
        self.prefill.avoid()
        self.handover.avoid()


def _typical_ratio(times: Sequence[float], expected: Sequence[float]) -> float:
    """Return the median of the ratios, weighted by the expected times: long prompts tell the speed best."""
    ratios = sorted((seconds / by, by) for seconds, by in zip(times, expected, strict=True))
    half = sum(expected) / 2
    passed = 0.0
    for ratio, weight in ratios:
        passed += weight
        if passed >= half:
            return ratio
    return 1.0


def _linear(coefficients: Sequence[float]) -> Callable[[Sequence[float]], float]:
    return lambda row: _dot(coefficients, row)


def _dot(coefficients: Sequence[float], row: Sequence[float]) -> float:
    return sum(c * x for c, x in zip(coefficients, row, strict=True))
