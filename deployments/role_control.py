"""Switches the replicas of models that have a budget of GPUs (`gpus`), in Serve's controller.

Serve calls the policy of each deployment by itself, and copies the policies' module by value.  Here, in a module that
exists once in the controller, the two policies of a model meet: each leaves what it knows of its deployment, and gets
what the plan for both says of it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from app.autoscaling.role_plan import SWITCHABLE, HomeReport, RolePlan, RolePlanner
from app.messages import Role
from deployments.roles import forget_told, read_roles, write_roles

logger = logging.getLogger("ray.serve")

GONE_S = 60.0
"""A replica that has not run for so long is gone for good.  Until then Serve's controller may have begun anew, and may
not have found all of its replicas again."""


class RoleControl:
    """The roles of one model's replicas."""

    def __init__(self, application: str, model: str, budget: int) -> None:
        self._application = application
        self._model = model
        self.budget = budget
        self._planner = RolePlanner(budget)
        self._homes: dict[Role, HomeReport] = {}
        self._assigned = read_roles(application, model)
        self.switched_at: dict[str, float] = {}
        """The time of the last report, by the replica's own clock, before it was told to change its role."""
        self._ran_at: dict[str, float] = {}
        """When each replica last ran; for those that were not seen yet, when that was first asked."""

    def plan(self, home: Role, report: HomeReport, reported_at: dict[str, float], now: float) -> RolePlan | None:
        """Plan with the newest report of one deployment; None as long as the other one has not reported at all.

        `reported_at` says when each of its replicas reported last; `now` is of a monotonic clock.
        """
        self._homes[home] = report
        if self._homes.keys() != set(SWITCHABLE):
            return None
        plan = self._planner.plan(self._homes, self._assigned, now)
        homes = {replica: home for home, known in self._homes.items() for replica in known.running}
        before = {replica: self._assigned.get(replica, home) for replica, home in homes.items()}
        gone = self._find_gone(homes, now)
        absent = {replica: role for replica, role in self._assigned.items() if replica not in homes.keys() | gone}
        assigned = absent | {replica: role for replica, role in plan.roles.items() if role != homes[replica]}
        if assigned != self._assigned:
            write_roles(self._application, self._model, assigned)
            self._assigned = assigned
        for replica, role in plan.roles.items():
            if role != before[replica]:
                logger.info(
                    f"autoscaling model={self._model} replica_id={replica} switches {before[replica]} -> {role} "
                    f"signals={dict(plan.signals)} reason={plan.reason!r}"
                )
                self._forget(replica, homes[replica], reported_at.get(replica, 0.0))
        return plan

    def _find_gone(self, running: Collection[str], now: float) -> set[str]:
        """Return the replicas that are gone for good, and forget all else of them; Serve gives no id a second time."""
        self._ran_at = dict.fromkeys(self._assigned, now) | self._ran_at | dict.fromkeys(running, now)
        gone = {replica for replica, ran_at in self._ran_at.items() if now - ran_at > GONE_S}
        for replica in gone:
            forget_told(self._application, replica)
            self.switched_at.pop(replica, None)
            del self._ran_at[replica]
        return gone

    def _forget(self, replica: str, home: Role, reported_at: float) -> None:
        """Leave out what a replica has reported in its former role."""
        self.switched_at[replica] = reported_at
        known = self._homes[home]
        loads = {other: load for other, load in known.loads.items() if other != replica}
        self._homes[home] = HomeReport(known.targets, known.running, loads, known.target)


_controls: dict[tuple[str, str], RoleControl] = {}


def control_of(application: str, model: str, budget: int) -> RoleControl:
    """Return the control of a model, a new one if its budget has changed."""
    control = _controls.get((application, model))
    if control is None or control.budget != budget:
        control = _controls[application, model] = RoleControl(application, model, budget)
    return control
