"""What is known of one sequence when it ends: one log line and the metrics, both from the same facts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache

from app.messages import PrefillReport, TokenDelta
from app.observability import metrics

logger = logging.getLogger("baton.sequence")


class SequenceRecord:
    """Follows one sequence from its start to its end."""

    def __init__(self, model: str, request_id: str, prompt_tokens: int) -> None:
        self._model = model
        self._observe_gap = _gap_observer(model)
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._started_at = self._last_at = time.monotonic()
        self._ttft_s: float | None = None
        self._report: PrefillReport | None = None

    def on_delta(self, delta: TokenDelta) -> None:
        now = time.monotonic()
        if self._ttft_s is None:
            self._ttft_s = now - self._started_at
        else:
            self._observe_gap(now - self._last_at)
        self._last_at = now
        self._output_tokens += len(delta.token_ids)
        self._report = delta.report or self._report

    def on_end(self, end: str) -> None:
        """`end` is a finish reason, ``cancelled`` or the name of an error."""
        metrics.SEQUENCES.labels(self._model, end).inc()
        metrics.GENERATION_TOKENS.labels(self._model).inc(self._output_tokens)
        report = self._report
        if report is not None and self._ttft_s is not None:
            metrics.PREFILLS.labels(self._model, report.kind, report.reason).inc()
            metrics.PROMPT_TOKENS.labels(self._model).inc(self._prompt_tokens)
            metrics.CACHED_TOKENS.labels(self._model).inc(report.cached_tokens)
            metrics.TIME_TO_FIRST_TOKEN.labels(self._model, report.kind).observe(self._ttft_s)
            if report.transferred_tokens:
                metrics.TRANSFERRED_TOKENS.labels(self._model, report.transport).inc(report.transferred_tokens)
        logger.info(
            "request_id=%s model=%s end=%s prompt_tokens=%d output_tokens=%d ttft_ms=%s total_ms=%.1f %s",
            self._request_id,
            self._model,
            end,
            self._prompt_tokens,
            self._output_tokens,
            "none" if self._ttft_s is None else f"{self._ttft_s * 1e3:.1f}",
            (time.monotonic() - self._started_at) * 1e3,
            _describe(report),
        )


@cache
def _gap_observer(model: str) -> Callable[[float], None]:
    """Looked up once: finding a metric by its labels costs as much as handling a token."""
    observe: Callable[[float], None] = metrics.INTER_TOKEN_LATENCY.labels(model).observe
    return observe


def _describe(report: PrefillReport | None) -> str:
    if report is None:
        return "prefill=none"
    return (
        f"prefill={report.kind} reason={report.reason or 'none'} prefill_replica={report.prefill_replica or 'none'} "
        f"decode_replica={report.decode_replica} cached_tokens={report.cached_tokens} "
        f"kv_tokens_moved={report.transferred_tokens} transport={report.transport!r}"
    )
