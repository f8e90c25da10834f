"""What a model's ready replicas let it do, in the words of /health and /v1/models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from app.config import ModelConfig
from app.messages import Role

State = Literal["ready", "degraded", "unavailable"]
"""Of a model: whole; served, but without one of its pools; or not to be served now."""
Status = Literal["healthy", "degraded", "unhealthy"]
"""Of all: every model whole; at least one served; none served, for which /health answers 503."""


def model_state(model: ModelConfig, ready: Mapping[Role, int]) -> State:
    """`ready` is how many replicas of each of its pools can be reached."""
    if all(ready.values()):
        return "ready"
    decode_can_serve = ready["decode"] and (ready["prefill"] or model.can_decode_prefill)
    return "degraded" if decode_can_serve or ready.get("aggregated") else "unavailable"


def overall_status(states: Iterable[State]) -> Status:
    found = set(states)
    if found == {"ready"}:
        return "healthy"
    return "unhealthy" if found == {"unavailable"} else "degraded"
