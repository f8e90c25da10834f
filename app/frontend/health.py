"""The states that /health and /v1/models report: how far a model can be served by its ready replicas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from app.config import ModelConfig
from app.messages import Role

State = Literal["ready", "degraded", "asleep", "unavailable"]
"""The state of one model: it has all of its pools; it is served without one of them; a request has to wake it, or is
doing that; or it cannot be served now."""
Status = Literal["healthy", "degraded", "unhealthy"]
"""The state of all models: every one is ready or asleep; at least one is served, or would be; or none, and /health
answers 503."""


def model_state(model: ModelConfig, ready: Mapping[Role, int]) -> State:
    """Return the state of `model`; `ready` says for each of its pools how many replicas can be reached."""
    if all(ready.values()):
        return "ready"
    decode_can_serve = ready["decode"] and (ready["prefill"] or model.can_decode_prefill)
    prefill_can_serve = ready.get("prefill") and model.can_prefill_decode
    if decode_can_serve or prefill_can_serve or ready.get("aggregated"):
        return "degraded"
    return "asleep" if model.may_sleep else "unavailable"


def overall_status(states: Iterable[State]) -> Status:
    found = set(states)
    if found <= {"ready", "asleep"}:
        return "healthy"
    return "unhealthy" if found == {"unavailable"} else "degraded"
