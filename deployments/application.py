"""Deploys, reads and changes the application in a Ray cluster, from outside of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from app.config import BatonConfig, parse
from app.replica_bounds import Bounds, bounds_of, scale
from app.serve_document import configs
from deployments.autoscaling import plan_key
from deployments.build import check_autoscaling
from deployments.cluster import connect
from deployments.replica.link_record import read_links
from deployments.roles import told_role
from deployments.serve_hooks import deploy_applications, get_internal_kv, serve_details
from deployments.switch import switch

IMPORT_PATH = "deployments.build:build"
STALE_PLAN_S = 30.0
SWITCH_PATIENCE_S = 60.0
"""How long a replica may take to change its role.  It takes a quarter of a second; a GCS that restarts takes longer."""
QUIET_S = 10.0
"""The longest time without a line of progress while the application starts."""
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "sim": "its profile"}
"""What a replica loads when it starts, by its engine."""
GROUP_LABEL = "baton/group"
"""The label of a Ray node that says which worker group it belongs to (cluster/base)."""


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment as Serve sees it, and the plan that its autoscaling made."""

    name: str
    status: str
    replicas: dict[str, int]
    """The number of replicas in each state, for example ``{"running": 2, "starting": 1}``."""
    switched: dict[str, int]
    """How many of the running ones have another role than the deployment's, by that role."""
    target: int
    """The number of replicas that Serve aims at now."""
    bounds: str
    message: str
    plan: dict[str, Any] | None
    """The newest plan (app/autoscaling), with ``reason`` and ``signals``; None for a fixed number of replicas."""


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How KV gets from a prefill replica to a decode replica; the fields are those of `Link`."""

    decode_replica: str
    prefill_replica: str
    transport: str
    bytes_per_s: float | None
    latency_s: float | None
    probe_s: float | None
    problem: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """An application and the nodes that it may use."""

    application: str
    status: str
    message: str
    pools: list[PoolStatus]
    links: list[LinkStatus]
    """Those of all pairs of a decode and a prefill replica, of every model."""
    nodes: dict[str, int]
    """The number of nodes in each worker group; ``none`` counts those without a group."""


def deploy(document: dict[str, Any], say: Callable[[str], object], stop: threading.Event) -> None:
    """Deploy the applications, and return when they serve or `stop` is set.  Raises RuntimeError.

    They are deployed so that Serve keeps their configuration in the cluster, where ``baton scale`` finds it.  ``serve
    run`` and KubeRay do the same.
    """
    deploy_applications(document["applications"])
    progress = Progress(_what_loads(document))
    while not stop.wait(0.5):
        applications = serve.status().applications
        for line in progress.lines(applications, time.monotonic()):
            say(line)
        for application in applications.values():
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"the application did not come up: {_why(application)}")
        if all(application.status == "RUNNING" for application in applications.values()):
            return


def _why(application: ApplicationStatusOverview) -> str:
    """Return what Serve says about an application that failed, and about those of its deployments that failed."""
    failed = [
        f"{name}: {deployment.message}"
        for name, deployment in application.deployments.items()
        if deployment.status in ("DEPLOY_FAILED", "UNHEALTHY") and deployment.message
    ]
    return "\n".join([application.message, *failed])


def _what_loads(document: dict[str, Any]) -> dict[str, str]:
    """Return for each deployment what its replicas load when they start."""
    models = [model for config in configs(document) for model in config.models]
    pools = {
        model.deployment_name(role): TITLES[pool.engine] for model in models for role, pool in model.pools().items()
    }
    return {"frontend": "vLLM's server", **pools}


class Progress:
    """Makes the lines that tell how far the start of the applications has come."""

    def __init__(self, loads: Mapping[str, str]) -> None:
        self._loads = loads
        self._said: dict[str, str] = {}
        self._said_at = time.monotonic()

    def lines(self, applications: Mapping[str, ApplicationStatusOverview], now: float) -> list[str]:
        """Return the lines to print at `now` (of the monotonic clock): what changed since the last call.

        If nothing has changed for QUIET_S, one line says what is still awaited.
        """
        states = [item for each in applications.values() for item in each.deployments.items()]
        lines = []
        for name, deployment in states:
            state = self._describe(name, deployment.replica_states)
            if state and self._said.get(name) != state:
                self._said[name] = state
                lines.append(f"{name}: {state}")
        if not lines and now - self._said_at >= QUIET_S:
            awaited = [name for name, deployment in states if deployment.status != "HEALTHY"]
            lines = [f"waiting for {', '.join(awaited) or 'Serve to build the application'}"]
        if lines:
            self._said_at = now
        return lines

    def _describe(self, name: str, replicas: Mapping[str, int]) -> str:
        loading = f" (loading {self._loads[name]})" if name in self._loads else ""
        return " ".join(
            f"{count} {state.lower()}{loading if state == 'STARTING' else ''}" for state, count in replicas.items()
        )


def scale_running(name: str, targets: Mapping[str, Bounds]) -> list[str]:
    """Change the numbers of replicas of a running application.  Returns lines that say what changes.

    Raises ConfigError before it changes anything.
    """
    connect()
    configured = _configured(serve_details())
    before = _of_baton(configured)
    after = scale(before, name, targets)
    others = [application for application in configured if application not in before]
    for application in after:
        check_autoscaling(parse(application["args"]))
    deploy_applications([*others, *after])
    changes = []
    for old, new in zip(before, after, strict=True):
        was, becomes = _bounds(old), _bounds(new)
        changes += [f"{name}: {was[name]} -> {becomes[name]}" for name in was if was[name] != becomes[name]]
    return [*changes, "asked for; `baton status` shows when it is so"] if changes else ["nothing to change"]


def switch_running(name: str, targets: Mapping[str, Bounds]) -> list[str]:
    """Have running replicas of a model change their role.  Returns lines that say what changed, and how fast.

    Raises ConfigError before it changes anything, and RuntimeError if a replica does not take its role.
    """
    connect()
    details = serve_details()
    return switch(_of_baton(_configured(details)), details, name, targets, SWITCH_PATIENCE_S)


def _configured(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the running applications in the form of a Serve config."""
    configs = [application.get("deployed_app_config") for application in details["applications"].values()]
    if not any(configs):
        raise RuntimeError("nothing was deployed from a Serve config, so there is no configuration to change")
    return [config for config in configs if config]


def _of_baton(applications: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of the cluster's applications that are Baton's."""
    return [application for application in applications if application["import_path"] == IMPORT_PATH]


def read_status() -> list[Status]:
    """Return the status of each of Baton's applications in the cluster.  Raises RuntimeError if there is none."""
    connect()
    details = serve_details()
    configured = {application["name"]: _bounds(application) for application in _of_baton(_configured(details))}
    nodes = _count_nodes()
    return [_describe(details["applications"][name], bounds, nodes) for name, bounds in configured.items()]


def _describe(application: Mapping[str, Any], bounds: Mapping[str, Bounds], nodes: dict[str, int]) -> Status:
    pools = []
    for name, deployment in application["deployments"].items():
        states = [replica["state"].value.lower() for replica in deployment["replicas"]]
        pools.append(
            PoolStatus(
                name=name,
                status=deployment["status"].value,
                replicas={state: states.count(state) for state in sorted(set(states))},
                switched=_switched(application["name"], deployment["replicas"]),
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
        links=_links(application),
        nodes=nodes,
    )


def _switched(application: str, replicas: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    running = [replica["replica_id"] for replica in replicas if replica["state"].value == "RUNNING"]
    roles = [role for replica in running if (role := told_role(application, replica)) is not None]
    return {role: roles.count(role) for role in sorted(set(roles))}


def _links(application: Mapping[str, Any]) -> list[LinkStatus]:
    replicas = [
        replica["replica_id"]
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica["state"].value == "RUNNING"
    ]
    return [
        LinkStatus(decode_replica=replica, **msgspec.structs.asdict(link))
        for replica in replicas
        for link in read_links(application["name"], replica)
    ]


def _bounds(application: Mapping[str, Any]) -> dict[str, Bounds]:
    """Return the bounds of each deployment."""
    args = application["args"]
    config: BatonConfig = parse(args)
    found = {"frontend": bounds_of(args.get("frontend") or {})}
    for model, section in zip(config.models, args["models"], strict=True):
        found |= {model.deployment_name(role): bounds_of(section[role]) for role in model.pools()}
    return found


def _read_plan(application: str, deployment: str) -> dict[str, Any] | None:
    value = get_internal_kv(plan_key(application, deployment))
    plan = json.loads(value) if value else None
    # A plan that is no longer renewed is from before the deployment's number of replicas was fixed.
    return dict(plan) if plan and time.time() - plan["at"] < STALE_PLAN_S else None


def _count_nodes() -> dict[str, int]:
    groups = [node.get("Labels", {}).get(GROUP_LABEL, "none") for node in ray.nodes() if node["Alive"]]
    return {group: groups.count(group) for group in sorted(set(groups))}
