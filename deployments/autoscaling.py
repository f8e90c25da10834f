"""How many decode replicas there shall be, for a pool whose configuration has `autoscaling`.

Serve's own policy counts calls that it carries; sequences travel on channels, so each decode replica reports them
(`DecodeWorker.record_autoscaling_stats`) and this policy does with that number what Serve's does with its own.
Serve applies the factors, delays and bounds of the configuration to the result.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext


def by_sequences(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Replicas such that each has `target_ongoing_requests` sequences.

    A replica that has not reported yet counts as having none.
    """
    running = sum((context.aggregated_metrics or {}).get("sequences", {}).values())
    return running / context.config.get_target_ongoing_requests(), {}
