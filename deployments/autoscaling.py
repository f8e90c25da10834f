"""Serve's autoscaling policies for Baton's deployments: they turn the replicas' reports into a number of replicas.

The plans are made in app/autoscaling/.  Serve calls a policy in each loop of its controller, and all of this code runs
in the controller's process.  Serve applies the user's delays, factors and bounds to what the policy returns.

Each plan and its reason can be seen in four places: in the controller's log, with a line when the wanted number
changes; in two metrics; in Ray's internal KV, where `baton status` reads it; and in what Serve itself says about the
deployment.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from ray.serve.config import AutoscalingContext
from ray.util.metrics import Gauge

from app.autoscaling.activity import activity_of
from app.autoscaling.load import FIELDS, Load, mean_load
from app.autoscaling.replica_plan import Plan, Replicas, SeenCapacity, Targets, measure, plan_frontend, plan_pool
from app.autoscaling.role_plan import HomeReport
from app.messages import Role
from deployments.role_control import control_of
from deployments.serve_hooks import get_internal_kv, put_internal_kv

logger = logging.getLogger("ray.serve")

WANTED = "the model has work, or a request waits for it to wake"
ASLEEP = "asleep: the next request wakes the model"
PUBLISH_S = 5.0
"""How often a plan that has not changed is published again."""


def plan_key(application: str, deployment: str) -> str:
    """Return the key in Ray's internal KV under which the last plan of a deployment is."""
    return f"baton:autoscaling:{application}:{deployment}"


def wish_key(application: str, model: str) -> str:
    """Return the key in Ray's internal KV under which frontends wish for a model that sleeps."""
    return f"baton:wish:{application}:{model}"


class Policy:
    """The policy of one deployment.  Serve makes it once and then calls it again and again."""

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
        """Return how many replicas the deployment should have, and an empty state for Serve to keep.

        Errors are logged, not raised: one would end this loop of the controller for every application.
        """
        plan = Plan(float(context.target_num_replicas), "no plan", {})
        try:
            plan = self.plan(context)
            self._publish(context, plan)
            self._problem = ""
        except Exception as error:  # noqa: BLE001  it is logged, and nobody else could handle it
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
        """Log an error, but only once while it stays the same, because this runs several times a second."""
        if repr(error) != self._problem:
            self._problem = repr(error)
            logger.exception(
                f"autoscaling deployment={context.deployment_name} failed; wanted={math.ceil(plan.replicas)} stays"
            )


class FrontendPolicy(Policy):
    """The policy of the frontends."""

    def __init__(self) -> None:
        super().__init__("frontend")

    def plan(self, context: AutoscalingContext) -> Plan:
        running = context.current_num_replicas
        replicas = Replicas(target=context.target_num_replicas, running=running, reporting=running)
        return plan_frontend(context.total_num_requests, context.config.get_target_ongoing_requests(), replicas)


class PoolPolicy(Policy):
    """The policy of one pool."""

    def __init__(
        self, model: str, role: Role, budget: int | None = None, *, may_sleep: bool = False, **targets: Any
    ) -> None:
        """`targets` are the fields of `Targets`.

        With a `budget`, the most replicas of both pools together, the pools are planned together (role_control.py).
        """
        super().__init__(role, model)
        self._home = role
        self._budget = budget
        self._may_sleep = may_sleep
        self._targets = Targets(**targets)
        self._capacity = SeenCapacity()
        self._capacity_at = time.monotonic()
        self._arrivals = Arrivals()

    def plan(self, context: AutoscalingContext) -> Plan:
        now = time.monotonic()
        if self._budget is not None:
            return self._plan_roles(context, self._budget, now)
        loads = list(reported_loads(context, self._arrivals, now, {}).values())
        self._capacity = measure(loads, self._capacity, self._targets, now - self._capacity_at)
        self._capacity_at = now
        running = len(context.running_replicas)
        replicas = Replicas(target=context.target_num_replicas, running=running, reporting=len(loads))
        plan = plan_pool(loads, self._capacity, self._targets, replicas)
        return self._awake_or_asleep(context, plan, loads, now) if self._may_sleep else plan

    def _awake_or_asleep(self, context: AutoscalingContext, plan: Plan, loads: Sequence[Load], now: float) -> Plan:
        """Keep at least one replica while any pool of the model has work or a request waits for it."""
        activity = activity_of(context.app_name or "", self._model)
        activity.hear(get_internal_kv(wish_key(context.app_name or "", self._model)), now)
        if any(load.sequences or load.prompts for load in loads):
            activity.has_work(now)
        if activity.is_wanted(now):
            return plan if plan.replicas >= 1 else msgspec.structs.replace(plan, replicas=1.0, reason=WANTED)
        return plan if plan.replicas or context.running_replicas else msgspec.structs.replace(plan, reason=ASLEEP)

    def _plan_roles(self, context: AutoscalingContext, budget: int, now: float) -> Plan:
        control = control_of(context.app_name or "", self._model, budget)
        loads = reported_loads(context, self._arrivals, now, control.switched_at)
        running = [replica.unique_id for replica in context.running_replicas]
        report = HomeReport(self._targets, running, loads, context.target_num_replicas)
        times = {replica.unique_id: at for replica, at in self._arrivals.latest()}
        plan = control.plan(self._home, report, times, now)
        if plan is None:
            return Plan(float(context.target_num_replicas), "the other pool has not reported yet", {})
        return Plan(plan.replicas[self._home], plan.reason, dict(plan.signals))


class Arrivals:
    """When each replica's latest report came, by the clock of this process: those of the replicas may be wrong."""

    def __init__(self) -> None:
        self._latest: dict[Any, tuple[float, float]] = {}

    def age_s(self, replica: Any, reported_at: float, now: float) -> float:
        """Return for how long there has been no newer report than the one that the replica made at `reported_at`."""
        latest = self._latest.get(replica)
        if latest is None or latest[0] != reported_at:
            latest = self._latest[replica] = (reported_at, now)
        return now - latest[1]

    def latest(self) -> list[tuple[Any, float]]:
        """Return when each replica made its latest report, by its own clock."""
        return [(replica, reported_at) for replica, (reported_at, _) in self._latest.items()]

    def keep(self, replicas: Sequence[Any]) -> None:
        """Forget all other replicas."""
        self._latest = {replica: latest for replica, latest in self._latest.items() if replica in replicas}


def reported_loads(
    context: AutoscalingContext, arrivals: Arrivals, now: float, since: Mapping[str, float]
) -> dict[str, Load]:
    """Return the mean loads of the running replicas over `look_back_period_s`, for which Serve keeps their reports.

    A replica is left out if it has not reported twice yet or no longer reports.  One that is being removed does not
    count as running.  `now` is of the monotonic clock.  Of the replicas in `since` only later reports count, by the
    replica's clock.
    """
    arrivals.keep(context.running_replicas)
    patience_s = context.config.look_back_period_s + 2 * context.config.metrics_interval_s
    metrics = context.raw_metrics or {}
    loads: dict[str, Load] = {}
    for replica in context.running_replicas:
        after = since.get(replica.unique_id, -math.inf)
        reports = [
            [point for point in metrics.get(field, {}).get(replica, ()) if point.timestamp > after] for field in FIELDS
        ]
        times = [point.timestamp for point in reports[0]]
        if len(times) < 2 or arrivals.age_s(replica, times[-1], now) > patience_s:
            continue
        first, last = (dict(zip(FIELDS, (points[at].value for points in reports), strict=True)) for at in (0, -1))
        loads[replica.unique_id] = mean_load(first, last, times[-1] - times[0])
    return loads
