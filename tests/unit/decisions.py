"""Decisions as a router could have made them."""

from __future__ import annotations

from typing import Any

from app.routing.decision import Candidate, Decision, Way

PREFILL = Candidate("prefill-1", 64, 10, {"prefix": 0.66666, "queue": 1.0}, 1.66666)
DECODE = Candidate("decode-1", 16, 0, {"prefix": 0.25, "queue": 1.0}, 1.25)


def remote_way(**fields: Any) -> Way:
    """A remote way that is predicted to take 10 ms, unless `fields` say otherwise."""
    usual: dict[str, Any] = {
        "kind": "remote",
        "serving": DECODE,
        "serving_role": "decode",
        "prefill": PREFILL,
        "queue_s": 0.004,
        "alone_s": 0.006,
        "itl_s": 0.02,
    }
    return Way(**{**usual, **fields})


def local_way(**fields: Any) -> Way:
    """A local way that is predicted to take 25 ms, unless `fields` say otherwise."""
    usual: dict[str, Any] = {"kind": "local", "prefill": None, "queue_s": 0.0, "alone_s": 0.025, "itl_s": 0.03}
    return remote_way(**{**usual, **fields})


def decision(**fields: Any) -> Decision:
    """A remote prefill that was predicted to be the faster way, unless `fields` say otherwise."""
    usual: dict[str, Any] = {"way": remote_way(), "reason": "faster", "decided_in_s": 0.00012}
    return Decision(**{**usual, **fields})
