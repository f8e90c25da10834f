"""What is known of one sequence when it ends: one log line and the metrics, both from the same facts."""

from __future__ import annotations

import logging
from functools import cache
from typing import TypeVar, get_args

from prometheus_client import Counter, Histogram

from app.config import SloConfig
from app.frontend import metrics
from app.frontend.sequence_progress import ResumeReason, SequenceProgress
from app.frontend.usage_records import UsageLine, record_usage, records_usage
from app.messages import PrefillReport, TokenDelta
from app.observers import observing
from app.routing.decision import Decision

logger = logging.getLogger("baton.sequence")

MetricT = TypeVar("MetricT", Counter, Histogram)

DEFAULT_SLO = SloConfig()
GOOD_ENDS = ("stop", "length", "repetition")
"""Finish reasons of sequences that got all of their tokens."""
CANCELLED, GAVE_UP = "cancelled", "gave_up"
"""How sequences ended whose clients went away.  One that had waited for its next token for longer than `slo.ttft_ms`
has given up on a service that is slow or hangs: that is a failure.  Any other just had enough, and does not count."""


class SequenceRecord:
    """Follows one sequence from its start to its end.  The times of its deltas are in its `SequenceProgress`."""

    def __init__(
        self,
        progress: SequenceProgress,
        model: str,
        request_id: str,
        prompt_tokens: int,
        *,
        most_tokens: int = 0,
        slo: SloConfig = DEFAULT_SLO,
        has_session: bool = False,
        tenant: str = "",
    ) -> None:
        """`most_tokens` are those that it may have at the end, the prompt's included."""
        self.progress = progress
        self.decision: Decision | None = None
        """The decision of the last attempt."""
        self.num_attempts = 0
        self.model = model
        self._gaps = metrics.INTER_TOKEN_LATENCY.of(model)
        # Made now, so that they are exported before a sequence is resumed.
        self._resume_gaps = {reason: _labelled(metrics.RESUME_GAP, model, reason) for reason in get_args(ResumeReason)}
        self._request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.most_tokens = most_tokens
        self.slo = slo
        self._has_session = has_session
        self._tenant = tenant
        self.output_tokens = 0

    @observing
    def on_decision(self, decision: Decision) -> None:
        """Take note of an attempt that is about to begin."""
        self.decision = decision
        self.num_attempts += 1
        _labelled(metrics.DECISIONS, self.model, decision.kind, decision.reason).inc()
        _labelled(metrics.DECISION_TIME, self.model).observe(decision.decided_in_s)

    @observing
    def on_delta(self, delta: TokenDelta) -> None:
        """Count a delta that `progress` has recorded."""
        self.output_tokens += len(delta.token_ids)
        if (gap_s := self.progress.last_gap_s) is not None:
            self._gaps.observe(gap_s)
        elif self.progress.resume_gaps_s:
            self._resume_gaps[self.progress.resume_reasons[-1]].observe(self.progress.resume_gaps_s[-1])

    @observing
    def on_end(self, end: str) -> None:
        """`end` is a finish reason, CANCELLED or the name of an error."""
        progress = self.progress
        waited_s = progress.now() - progress.last_token_at
        if end == CANCELLED and waited_s * 1e3 > self.slo.ttft_ms and not progress.is_paused:
            end = GAVE_UP
        _labelled(metrics.SEQUENCES, self.model, end).inc()
        _labelled(metrics.WITHIN_SLO, self.model).inc(end in GOOD_ENDS and self._is_within_slo())
        _labelled(metrics.GENERATION_TOKENS, self.model).inc(self.output_tokens)
        if progress.prompt_report is not None and progress.ttft_s is not None:
            self._count_prompt(progress.prompt_report, progress.ttft_s)
        if records_usage():
            self._record_usage(end)
        logger.info(
            "request_id=%s model=%s end=%s prompt_tokens=%d output_tokens=%d ttft_ms=%s total_ms=%.1f %s %s "
            "resumed_after_ms=%s resume_reasons=%s resumed_cached_tokens=%s session=%s tenant=%s",
            self._request_id,
            self.model,
            end,
            self.prompt_tokens,
            self.output_tokens,
            _ms(progress.ttft_s),
            (progress.now() - progress.arrived_at) * 1e3,
            _describe_prefill(progress.prompt_report),
            self._describe_decision(),
            ",".join(map(_ms, progress.resume_gaps_s)) or "none",
            ",".join(progress.resume_reasons) or "none",
            ",".join(map(str, progress.resumed_cached_tokens)) or "none",
            "yes" if self._has_session else "no",
            self._tenant or "none",
        )

    def _record_usage(self, end: str) -> None:
        report = self.progress.prompt_report
        record_usage(
            UsageLine(
                tenant=self._tenant,
                model=self.model,
                request_id=self._request_id,
                end=end,
                prompt_tokens=self.prompt_tokens if report is not None else 0,
                cached_tokens=report.cached_tokens if report is not None else 0,
                output_tokens=self.output_tokens,
            )
        )

    def _is_within_slo(self) -> bool:
        progress = self.progress
        if progress.ttft_s is None or progress.ttft_s * 1e3 > self.slo.ttft_ms:
            return False
        decoding_s = progress.last_token_at - progress.arrived_at - progress.ttft_s - progress.paused_s
        return decoding_s * 1e3 <= self.slo.itl_ms * (self.output_tokens - 1)

    def _count_prompt(self, report: PrefillReport, ttft_s: float) -> None:
        _labelled(metrics.PREFILLS, self.model, report.kind, report.reason).inc()
        _labelled(metrics.PROMPT_TOKENS, self.model).inc(self.prompt_tokens)
        _labelled(metrics.CACHED_TOKENS, self.model).inc(report.cached_tokens)
        kind = self.progress.first_token_kind or report.kind
        _labelled(metrics.TIME_TO_FIRST_TOKEN, self.model, kind).observe(ttft_s)
        if report.transferred_tokens:
            _labelled(metrics.TRANSFERRED_TOKENS, self.model, report.transport).inc(report.transferred_tokens)
        for phase, seconds in report.phases.items():
            # Two wall clocks may disagree, and Prometheus takes a sum that falls for one that began again.
            _labelled(metrics.HOP_PHASES, self.model, phase).observe(max(0.0, seconds))
        if (decision := self.decision) is None:
            return
        _labelled(metrics.EXPECTED_CACHED_TOKENS, self.model).inc(decision.expected_cached_tokens)
        # If a replica failed on the way, the time to first token says nothing about the prediction.
        went_as_decided = self.num_attempts == 1 and kind == decision.kind
        if went_as_decided and decision.predicted_ttft_s:
            ratio = (ttft_s - decision.waited_s) / decision.predicted_ttft_s
            _labelled(metrics.TIME_TO_FIRST_TOKEN_RATIO, self.model, decision.kind).observe(ratio)

    def _describe_decision(self) -> str:
        """Describe the decision without the candidates that were not chosen; app/frontend/explain.py has those."""
        decision = self.decision
        if decision is None:
            return "decision=none"
        prefill = decision.prefill.replica if decision.prefill else "none"
        return (
            f"decision={decision.kind} decision_reason={decision.reason} decided_prefill={prefill} "
            f"decided_{decision.serving_role}={decision.serving.replica} "
            f"expected_cached_tokens={decision.expected_cached_tokens} "
            f"predicted_ttft_ms={_ms(decision.predicted_ttft_s)} predicted_itl_ms={_ms(decision.way.itl_s)} "
            f"waited_ms={_ms(decision.waited_s)} "
            f"decided_us={decision.decided_in_s * 1e6:.0f} attempts={self.num_attempts}"
        )


@cache
def _labelled(metric: MetricT, *labels: str) -> MetricT:
    """Return the part of a metric with these labels.  It is cached: the look-up costs as much as handling a token."""
    return metric.labels(*labels)


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1e3:.1f}"


def _or_pending(num_tokens: int | None) -> str:
    """Describe a count that is None while the KV is on its way."""
    return "pending" if num_tokens is None else str(num_tokens)


def _describe_prefill(report: PrefillReport | None) -> str:
    if report is None:
        return "prefill=none"
    return (
        f"prefill={report.kind} reason={report.reason or 'none'} prefill_replica={report.prefill_replica or 'none'} "
        f"decode_replica={report.decode_replica} cached_tokens={report.cached_tokens} "
        f"kv_tokens_moved={_or_pending(report.transferred_tokens)} transport={report.transport!r} "
        f"phases_ms={','.join(f'{phase}:{seconds * 1e3:.1f}' for phase, seconds in report.phases.items()) or 'none'}"
    )
