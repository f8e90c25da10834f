"""How slow each replica of a pool is beside the others: one that lives but is slow is no failure, and nobody ejects it.

Routing sends less there by itself, as it predicts times from each replica's pace and from what it reports of its steps
(app/routing/capacity.py, app/routing/times.py).  Here is what people are told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from app.routing.pool_state import ReplicaState

PROMPT_TOKENS = 1024
"""The prompt by which prefill replicas are compared."""


def slowness(replicas: Mapping[str, ReplicaState]) -> dict[str, float]:
    """Return how many times as long as the median of its pool's other replicas each one takes, by their ids.

    It is 1 for one without others.  A replica whose pace is not known is not in the answer.
    """
    times = {replica: _time_s(state) for replica, state in replicas.items() if state.info.pace is not None}
    if len(times) < 2:
        return dict.fromkeys(times, 1.0)
    ordered = sorted(times.values())
    return {replica: time_s / _median_without(ordered, time_s) for replica, time_s in times.items()}


def _median_without(ordered: Sequence[float], one: float) -> float:
    """Return the median of two or more numbers in order, without one of them."""
    place, last = bisect_left(ordered, one), len(ordered) - 2
    low, high = (ordered[index + (index >= place)] for index in (last // 2, (last + 1) // 2))
    return (low + high) / 2


def _time_s(state: ReplicaState) -> float:
    """Return the seconds that a replica takes for what is the same for all of its pool."""
    if state.info.role == "prefill":
        return state.pace.prompt_s(PROMPT_TOKENS) * state.prompt_slowness.value
    return state.pace.step_s(1, 0) * state.load.slowness
