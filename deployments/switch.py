"""Changes the roles of running replicas: what ``baton scale --switch`` does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from app.autoscaling.role_plan import SWITCHABLE, Member, reassign
from app.config import ModelConfig, parse
from app.errors import BatonError, ConfigError
from app.messages import Role
from app.replica_bounds import Bounds, find_model
from app.role_trade import check_trade
from deployments.ready_replicas import ready_replicas_of
from deployments.roles import Roles, forget_told, read_roles, told_role, write_roles
from deployments.serve_hooks import deployment_id_of, handle_from_outside

ANSWER_S = 5.0
"""How long a replica may take to say how much it has to do; one that does not is switched last."""
LOOK_S = 0.02


def switch(
    applications: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
    name: str,
    targets: Mapping[str, Bounds],
    patience_s: float,
) -> list[str]:
    """Have as many replicas of a model in each role as `targets` says, and return lines that tell what was done.

    `applications` are those of Baton, as documents, and `details` is what Serve tells of them.  Raises ConfigError
    before it changes anything, and RuntimeError if a replica has not told its new role after `patience_s` seconds.
    """
    found, index = find_model(applications, name)
    application, model = found["name"], parse(found["args"]).models[index]
    warnings = check_trade(f"models.{index}", model)
    handles = {home: handle_from_outside(model.deployment_name(home), application) for home in SWITCHABLE}
    members = _members(application, model, details, handles)
    num_prefill = check_targets(model, targets, len(members))
    before = {member.replica: member.role for member in members}
    after = reassign(members, num_prefill)
    changes = {replica: role for replica, role in after.items() if role != before[replica]}
    if not changes:
        return [*warnings, "nothing to switch"]
    began = time.monotonic()
    homes = {member.replica: member.home for member in members}
    assigned = {replica: role for replica, role in after.items() if role != homes[replica]}
    write_roles(application, model.name, _absent(application, model, details, homes) | assigned)
    for replica, home in homes.items():  # all, as each heeds the others' roles; one that is not reached looks later
        handles[home].look_at_roles.remote(replica_id=replica)
    lines = []
    for replica, role, seconds in _wait(application, homes, changes, began, patience_s):
        lines.append(f"{replica}: {before[replica]} -> {role} after {seconds:.3f} s")
    return [*warnings, *lines]


def check_targets(model: ModelConfig, targets: Mapping[str, Bounds], num_running: int) -> int:
    """Return how many replicas are to prefill.  Raises ConfigError."""
    if model.gpus is not None:
        raise ConfigError(
            "--switch", f"{model.name} has `gpus`, so autoscaling decides the roles; take it out of the configuration"
        )
    if targets.keys() != set(SWITCHABLE) or any(low != high for low, high in targets.values()):
        raise ConfigError("--switch", "say how many replicas prefill and decode: prefill=N decode=M --switch")
    for role, (number, _) in targets.items():
        if number < 1:
            raise ConfigError(f"{role}={number}", "a pool has at least 1 replica")
    wanted = sum(number for number, _ in targets.values())
    if wanted != num_running:
        raise ConfigError(
            "--switch",
            f"{wanted} replicas are wanted, but {num_running} run, and a switch starts and stops none: change their "
            "number without --switch first",
        )
    return targets["prefill"].low


def _members(
    application: str, model: ModelConfig, details: Mapping[str, Any], handles: Mapping[Role, Any]
) -> list[Member]:
    """Return the running replicas of the two pools with their present roles and how much they have to do."""
    deployments, roles = details["applications"][application]["deployments"], read_roles(application, model.name)
    members: list[Member] = []
    for home in SWITCHABLE:
        name = model.deployment_name(home)
        running = [r["replica_id"] for r in deployments[name]["replicas"] if r["state"].value == "RUNNING"]
        work = _work(handles[home], running)
        members += [Member(replica, home, roles.get(replica, home), work[replica]) for replica in running]
    return members


def _absent(application: str, model: ModelConfig, details: Mapping[str, Any], running: Mapping[str, Role]) -> Roles:
    """Return what is assigned to replicas that do not run now, but that Serve knows, and forget those it does not."""
    deployments, roles = details["applications"][application]["deployments"], read_roles(application, model.name)
    names = [model.deployment_name(home) for home in SWITCHABLE]
    known = {replica["replica_id"] for name in names for replica in deployments[name]["replicas"]}
    for replica in roles.keys() - known:
        forget_told(application, replica)
    return {replica: role for replica, role in roles.items() if replica in known and replica not in running}


def _work(handle: Any, replicas: Sequence[str]) -> dict[str, float]:
    """Return how many requests each replica has, infinitely many if it does not say."""
    ready = ready_replicas_of(deployment_id_of(handle))
    give_up_at = time.monotonic() + ANSWER_S
    while not set(replicas) <= set(ready.ids()) and time.monotonic() < give_up_at:
        time.sleep(LOOK_S)
    asked = {replica: handle.stats.remote(replica_id=replica) for replica in replicas if ready.find(replica)}
    work = dict.fromkeys(replicas, float("inf"))
    for replica, answer in asked.items():
        try:
            stats = answer.result(timeout_s=max(0.0, give_up_at - time.monotonic()))
        except (BatonError, TimeoutError):
            continue
        work[replica] = stats.num_running + stats.num_waiting
    return work


def _wait(
    application: str, homes: Mapping[str, Role], changes: Roles, began: float, patience_s: float
) -> list[tuple[str, Role, float]]:
    """Return when each replica had told its new role.  Raises RuntimeError."""
    told: dict[str, float] = {}
    while told.keys() != changes.keys():
        for replica in changes.keys() - told.keys():
            if (told_role(application, replica) or homes[replica]) == changes[replica]:
                told[replica] = time.monotonic() - began
        if time.monotonic() - began > patience_s:
            silent = ", ".join(sorted(changes.keys() - told.keys()))
            raise RuntimeError(f"{silent} did not take the new role within {patience_s:g} s: see the replica's log")
        time.sleep(LOOK_S)
    return [(replica, changes[replica], told[replica]) for replica in changes]
