"""``baton status`` and ``baton scale``: the application that runs in a Ray cluster, seen and changed from outside.

The cluster is the one that RAY_ADDRESS names, else the one that was started last on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray.exceptions import RaySystemError
from ray.experimental.internal_kv import _internal_kv_get
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema
from rich.console import Console
from rich.table import Table

from app.build import check_autoscaling
from app.config import BatonConfig, parse
from app.scale import Bounds, bounds_of, scale
from deployments.autoscaling import plan_key

IMPORT_PATH = "app.build:build"
STALE_PLAN_S = 30.0
GROUP_LABEL = "baton/group"
"""The label of a Ray node that says which worker group it belongs to (cluster/base)."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment as Serve sees it, and what its autoscaling made of its load."""

    name: str
    status: str
    replicas: dict[str, int]
    """How many are in which state, for example ``{"running": 2, "starting": 1}``."""
    target: int
    """How many Serve aims at now."""
    bounds: str
    message: str
    plan: dict[str, Any] | None
    """The last one of app/planning, ``reason`` and ``signals`` included; None of a fixed number of replicas."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """An application and the nodes that it may use."""

    application: str
    status: str
    message: str
    pools: list[PoolStatus]
    nodes: dict[str, int]
    """How many nodes each worker group has now; ``none`` for those without a group."""


def connect() -> Any:
    """Serve's client.  Raises RuntimeError if there is no cluster, or no Serve in it."""
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        return _get_global_client()
    except (ConnectionError, RaySystemError) as error:
        raise RuntimeError(
            f"no Ray cluster can be reached; is Baton running, or should RAY_ADDRESS name another?  ({error})"
        ) from None
    except RayServeException as error:
        raise RuntimeError("the Ray cluster runs no Serve application") from error


def scale_running(name: str, targets: Mapping[str, Bounds]) -> list[str]:
    """Change a running application's numbers of replicas, and say what changes.

    Raises ConfigError before anything is changed.
    """
    client = connect()
    configured = _configured(client)
    before = _of_baton(configured)
    after = scale(before, name, targets)
    others = [application for application in configured if application not in before]
    for application in after:
        check_autoscaling(parse(application["args"]))
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [*others, *after]}))
    changes = []
    for old, new in zip(before, after, strict=True):
        was, becomes = _bounds(old), _bounds(new)
        changes += [f"{name}: {was[name]} -> {becomes[name]}" for name in was if was[name] != becomes[name]]
    return [*changes, "asked for; `baton status` shows when it is so"] if changes else ["nothing to change"]


def _configured(client: Any) -> list[dict[str, Any]]:
    """The running applications as a Serve config has them."""
    configs = ray.get(client._controller.get_app_configs.remote())
    if not configs:
        raise RuntimeError("nothing was deployed from a Serve config, so there is no configuration to change")
    return [config.model_dump(exclude_unset=True) for config in configs.values()]


def _of_baton(applications: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are Baton's, of all that the cluster runs."""
    return [application for application in applications if application["import_path"] == IMPORT_PATH]


def read_status() -> list[Status]:
    """All of Baton's applications in the cluster.  Raises RuntimeError if there is none."""
    client = connect()
    configured = {application["name"]: _bounds(application) for application in _of_baton(_configured(client))}
    details = client.get_serve_details()["applications"]
    nodes = _count_nodes()
    return [_describe(details[name], bounds, nodes) for name, bounds in configured.items() if name in details]


def _describe(application: Mapping[str, Any], bounds: Mapping[str, Bounds], nodes: dict[str, int]) -> Status:
    pools = []
    for name, deployment in application["deployments"].items():
        states = [replica["state"].value.lower() for replica in deployment["replicas"]]
        pools.append(
            PoolStatus(
                name=name,
                status=deployment["status"].value,
                replicas={state: states.count(state) for state in sorted(set(states))},
                target=deployment["target_num_replicas"],
                bounds=str(bounds[name]) if name in bounds else "",
                message=deployment["message"],
                plan=_read_plan(application["name"], name),
            )
        )
    return Status(
        application=application["name"],
        status=application["status"].value,
        message=application["message"],
        pools=pools,
        nodes=nodes,
    )


def _bounds(application: Mapping[str, Any]) -> dict[str, Bounds]:
    """Those of each deployment."""
    args = application["args"]
    config: BatonConfig = parse(args)
    found = {"frontend": bounds_of(args.get("frontend") or {})}
    for model, section in zip(config.models, args["models"], strict=True):
        found |= {model.deployment_name(role): bounds_of(section[role]) for role in model.pools()}
    return found


def _read_plan(application: str, deployment: str) -> dict[str, Any] | None:
    value = _internal_kv_get(plan_key(application, deployment))
    plan = json.loads(value) if value else None
    # One that is not renewed is of a deployment whose number has been fixed since.
    return dict(plan) if plan and time.time() - plan["at"] < STALE_PLAN_S else None


def _count_nodes() -> dict[str, int]:
    groups = [node.get("Labels", {}).get(GROUP_LABEL, "none") for node in ray.nodes() if node["Alive"]]
    return {group: groups.count(group) for group in sorted(set(groups))}


def print_status(found: Sequence[Status], console: Console) -> None:
    for status in found:
        nodes = ", ".join(f"{count} {group}" for group, count in status.nodes.items())
        console.print(f"[bold]{status.application}[/bold]: {status.status}   nodes: {nodes}")
        if status.message:
            console.print(status.message, markup=False)
        table = Table("deployment", "replicas", "target", "bounds", "why", box=None, pad_edge=False)
        for pool in status.pools:
            replicas = ", ".join(f"{count} {state}" for state, count in pool.replicas.items()) or "none"
            why = pool.plan["reason"] if pool.plan else "a fixed number"
            table.add_row(pool.name, replicas, str(pool.target), pool.bounds, why)
        console.print(table)
        for pool in status.pools:
            if pool.status != "HEALTHY" and pool.message:
                console.print(f"{pool.name} {pool.status}: {pool.message}", markup=False)
