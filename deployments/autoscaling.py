"""Serve's autoscaling of Baton's deployments: what the replicas report in, how many there shall be out, and why.

The plans are made in app/autoscaling/.  Serve calls a policy in each loop of its controller, in whose process all of
this runs, and applies the user's delays, factors and bounds to what it returns.

Each plan is told in four places: a log line in the controller's log when the wish changes, two metrics, Ray's internal
KV (`baton status` reads it there), and by what Serve itself says of the deployment.
"""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.util.metrics import Gauge

from app.autoscaling.load import FIELDS, Load, mean_load
from app.autoscaling.replica_plan import Plan, Replicas, SeenCapacity, Targets, measure, plan_frontend, plan_pool
from deployments.serve_hooks import put_internal_kv

logger = logging.getLogger("ray.serve")

PUBLISH_S = 5.0
"""How often a plan is told that has not changed."""


def plan_key(application: str, deployment: str) -> str:
    """Where in Ray's internal KV the last plan of a deployment is."""
    return f"baton:autoscaling:{application}:{deployment}"


class Policy:
    """A deployment's policy; Serve makes one and calls it from then on."""

    def __init__(self, role: str, model: str = "-") -> None:
        self._role = role
        self._model = model
        self._problem = ""
        self._published: tuple[int, int] | None = None
        self._published_at = 0.0
        tags = ("application", "deployment")
        self._wanted = Gauge("baton_autoscaling_wanted_replicas", "Replicas by the load alone.", tags)
        self._signal = Gauge("baton_autoscaling_signal", "What the wish is made of.", (*tags, "signal"))

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """How many replicas there shall be, and no state for Serve to keep.

        An error would end this loop of the controller, for every application.
        """
        plan = Plan(float(context.target_num_replicas), "no plan", {})
        try:
            plan = self.plan(context)
            self._publish(context, plan)
            self._problem = ""
        except Exception as error:  # noqa: BLE001  logged, and there is nobody else to tell
            self._complain(context, plan, error)
        return plan.replicas, {}

    def plan(self, context: AutoscalingContext) -> Plan:
        raise NotImplementedError

    def _publish(self, context: AutoscalingContext, plan: Plan) -> None:
        now = time.monotonic()
        state = (context.current_num_replicas, math.ceil(plan.replicas))
        if state == self._published and now < self._published_at + PUBLISH_S:
            return
        if self._published is None or state[1] != self._published[1]:
            logger.info(
                f"autoscaling deployment={context.deployment_name} model={self._model} role={self._role} "
                f"replicas={state[0]} wanted={state[1]} reason={plan.reason!r}"
            )
        self._published, self._published_at = state, now
        tags = {"application": context.app_name, "deployment": context.deployment_name}
        self._wanted.set(plan.replicas, tags)
        for name, value in plan.signals.items():
            self._signal.set(value, {**tags, "signal": name})
        told = {
            "at": time.time(),
            "replicas": context.current_num_replicas,
            "wanted": plan.replicas,
            "reason": plan.reason,
            "signals": plan.signals,
        }
        put_internal_kv(plan_key(context.app_name or "", context.deployment_name), json.dumps(told))

    def _complain(self, context: AutoscalingContext, plan: Plan, error: Exception) -> None:
        """Log an error, once as long as it stays the same: this runs several times a second."""
        if repr(error) != self._problem:
            self._problem = repr(error)
            logger.exception(
                f"autoscaling deployment={context.deployment_name} failed; wanted={math.ceil(plan.replicas)} stays"
            )


class FrontendPolicy(Policy):
    """The frontends."""

    def __init__(self) -> None:
        super().__init__("frontend")

    def plan(self, context: AutoscalingContext) -> Plan:
        running = context.current_num_replicas
        replicas = Replicas(target=context.target_num_replicas, running=running, reporting=running)
        return plan_frontend(context.total_num_requests, context.config.get_target_ongoing_requests(), replicas)


class PoolPolicy(Policy):
    """One pool of engines."""

    def __init__(self, model: str, role: str, **targets: Any) -> None:
        """`targets` are the fields of `Targets`."""
        super().__init__(role, model)
        self._targets = Targets(**targets)
        self._capacity = SeenCapacity()
        self._capacity_at = time.monotonic()

    def plan(self, context: AutoscalingContext) -> Plan:
        loads = reported_loads(context)
        now = time.monotonic()
        self._capacity = measure(loads, self._capacity, self._targets, now - self._capacity_at)
        self._capacity_at = now
        running = len(context.running_replicas)
        replicas = Replicas(target=context.target_num_replicas, running=running, reporting=len(loads))
        return plan_pool(loads, self._capacity, self._targets, replicas)


def reported_loads(context: AutoscalingContext) -> list[Load]:
    """The mean loads of the running replicas over the reports that Serve keeps, those of `look_back_period_s`.

    One that has not reported twice yet, or no longer does, is left out.  One that is on its way out is none of them.
    """
    patience_s = context.config.look_back_period_s + 2 * context.config.metrics_interval_s
    metrics = context.raw_metrics or {}
    loads = []
    for replica in context.running_replicas:
        reports = [metrics.get(field, {}).get(replica, ()) for field in FIELDS]
        times = [point.timestamp for point in reports[0]]
        if len(times) < 2 or times[-1] < context.current_time - patience_s:
            continue
        first, last = (dict(zip(FIELDS, (points[at].value for points in reports), strict=True)) for at in (0, -1))
        loads.append(mean_load(first, last, times[-1] - times[0]))
    return loads
