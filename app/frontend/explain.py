"""The response header ``x-baton-explain``: why a request was served where it was, as one line of JSON.

A list with an object for each sequence; its keys are those of `explain`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from app.frontend.sequence_record import SequenceRecord
from app.routing.decision import Candidate

MAX_HEADER_BYTES = 4096
"""Proxies refuse larger ones: nginx holds all of a response's headers in a page by default (proxy_buffer_size)."""
_LESS_AND_LESS = ((), ("others",), ("others", "scores"))
"""What is left out, as little as possible, of an explanation that is too long."""


def explain_header(records: Sequence[SequenceRecord]) -> str:
    """The header's value: ASCII, at most `MAX_HEADER_BYTES` of it.

    Where even the shortest form of all sequences is too long, the last element says how many are ``omitted``.
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
    """Why one sequence is served where it is, and what came of it so far; None if nothing was decided.

    ``expected`` is by the router, ``actual`` by the clock and the engines, null where it is not known yet.  Times to
    the first token are in ms; that of both ways is expected, null where a way is not open.
    """
    decision, report = record.decision, record.progress.report
    if decision is None:
        return None
    return {
        "kind": decision.kind,
        "reason": decision.reason,
        "prefill": _explain_candidate(decision.prefill),
        decision.serving_role: _explain_candidate(decision.serving),
        "expected": {
            "cached_tokens": decision.expected_cached_tokens,
            "remote_ttft_ms": _ms(decision.predicted.remote_s),
            "local_ttft_ms": _ms(decision.predicted.local_s),
            "interference_ms": _ms(decision.predicted.interference_s),
        },
        "actual": {
            "kind": report and report.kind,
            "reason": report and report.reason,
            "cached_tokens": report and report.cached_tokens,
            "ttft_ms": _ms(record.progress.ttft_s),
        },
        "decided_us": round(decision.decided_in_s * 1e6, 1),
        "attempts": record.num_attempts,
        "others": {
            role: [_explain_candidate(candidate) for candidate in candidates]
            for role, candidates in decision.others.items()
        },
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
    """`value` less those keys, at any depth of its objects."""
    if not isinstance(value, dict):
        return value
    return {key: _without(item, keys) for key, item in value.items() if key not in keys}


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
