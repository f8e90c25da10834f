"""Decisions as a router could have made them."""

from __future__ import annotations

from typing import Any

from app.routing.decision import Candidate, Decision, Prediction

PREFILL = Candidate("prefill-1", 64, 10, {"prefix": 0.66666, "queue": 1.0}, 1.66666)
DECODE = Candidate("decode-1", 16, 0, {"prefix": 0.25, "queue": 1.0}, 1.25)


def decision(**fields: Any) -> Decision:
    """A remote prefill that was predicted to be the faster way, unless `fields` say otherwise."""
    usual: dict[str, Any] = {
        "kind": "remote",
        "reason": "faster",
        "serving": DECODE,
        "serving_role": "decode",
        "prefill": PREFILL,
        "predicted": Prediction(remote_s=0.010, local_s=0.025, interference_s=0.001),
        "decided_in_s": 0.00012,
    }
    return Decision(**{**usual, **fields})
