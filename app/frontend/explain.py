"""The response header ``x-baton-explain``: why a request was served where it was, as one line of JSON.

The value is a list with one object for each sequence.  `explain` makes these objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from app.frontend.sequence_record import SequenceRecord
from app.routing.decision import Candidate, Way

MAX_HEADER_BYTES = 4096
"""Proxies refuse larger headers: by default nginx has one page for all headers of a response (proxy_buffer_size)."""
_LESS_AND_LESS = ((), ("others",), ("others", "scores"))
"""Keys to leave out of explanations that are too long; the first entry that makes them fit is used."""


def explain_header(records: Sequence[SequenceRecord]) -> str:
    """Return the header's value: ASCII, at most `MAX_HEADER_BYTES` long.

    If the explanations are too long even in their shortest form, the last ones are left out, and the last element of
    the list says how many were ``omitted``.
    """
    explanations = [explanation for record in records if (explanation := explain(record))]
    lines: list[str] = []
    for left_out in _LESS_AND_LESS:
        lines = [_to_json(_without(explanation, left_out)) for explanation in explanations]
        if len(header := f"[{','.join(lines)}]") <= MAX_HEADER_BYTES:
            return header
    room = MAX_HEADER_BYTES - len(_to_json([{"omitted": len(lines)}]))
    num_kept = sum(end <= room for end in accumulate(len(line) + 1 for line in lines))
    omitted = _to_json({"omitted": len(lines) - num_kept})
    return f"[{','.join([*lines[:num_kept], omitted])}]"


def explain(record: SequenceRecord) -> dict[str, Any] | None:
    """Say why one sequence is served where it is, and how that went so far; None if nothing was decided.

    ``expected`` is what the router predicted.  ``actual`` is what the clock and the engines say; its values are null
    until they are known.  All times are in ms.  ``expected`` has one entry for each way that there was: the times that
    it was predicted to bring, which are to keep ``slo``, and what it lacked, ``prefill`` or ``decode``, if there was no
    room for it.
    """
    decision, report = record.decision, record.progress.prompt_report
    if decision is None:
        return None
    return {
        "kind": decision.kind,
        "reason": decision.reason,
        "prefill": _explain_candidate(decision.prefill),
        decision.serving_role: _explain_candidate(decision.serving),
        "expected": {
            "cached_tokens": decision.expected_cached_tokens,
            "ways": [_explain_way(way) for way in decision.ways],
        },
        "actual": {
            "kind": report and report.kind,
            "reason": report and report.reason,
            "cached_tokens": report and report.cached_tokens,
            "ttft_ms": _ms(record.progress.ttft_s),
            "waited_for_kv": record.progress.waited_for_kv,
            "phases": {phase: _ms(seconds) for phase, seconds in report.phases.items()} if report else {},
        },
        "waited_ms": _ms(decision.waited_s),
        "slo": {"ttft_ms": record.slo.ttft_ms, "itl_ms": record.slo.itl_ms},
        "decided_us": round(decision.decided_in_s * 1e6, 1),
        "attempts": record.num_attempts,
        "resumed_after_ms": [_ms(gap_s) for gap_s in record.progress.resume_gaps_s],
        "resume_reasons": record.progress.resume_reasons,
        "resumed_cached_tokens": record.progress.resumed_cached_tokens,
        "others": {
            role: [_explain_candidate(candidate) for candidate in candidates]
            for role, candidates in decision.others.items()
        },
    }


def _explain_way(way: Way) -> dict[str, Any]:
    return {
        "kind": way.kind,
        "serves": way.serving_role,
        "ttft_ms": _ms(way.ttft_s),
        "pull_ms": _ms(way.pull_s),
        "queue_ms": _ms(way.queue_s),
        "itl_ms": _ms(way.itl_s),
        "interference_ms": _ms(way.interference_s),
        "lacks": way.lacks or None,
    }


def _explain_candidate(candidate: Candidate | None) -> dict[str, Any] | None:
    if candidate is None:
        return None
    return {
        "replica": candidate.replica,
        "cached_tokens": candidate.cached_tokens,
        "queued_tokens": candidate.queued_tokens,
        "scores": {name: round(score, 3) for name, score in candidate.scores.items()},
        "total": round(candidate.total, 3),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _without(value: Any, keys: Sequence[str]) -> Any:
    """Return `value` without these keys, at any depth of its objects."""
    if not isinstance(value, dict):
        return value
    return {key: _without(item, keys) for key, item in value.items() if key not in keys}


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
