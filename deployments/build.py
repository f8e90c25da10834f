"""The Serve application: ``import_path: deployments.build:build``.

The whole topology is in `build`.  (This module has no ``from __future__ import annotations``: with it Serve would pass
the arguments unparsed.)
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping
from typing import Any, get_args

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from app.chunk_size import with_chunk_sizes
from app.config import (
    BatonConfig,
    DeploymentConfig,
    LimitsConfig,
    ModelConfig,
    PoolConfig,
    Resources,
    RoutingConfig,
    SloConfig,
    parse,
)
from app.engine_defaults import with_dtype
from app.errors import ConfigError
from app.messages import Role
from app.preflight import check, check_address, gpus_of_replica, python_of_replica, replica_budget
from deployments.ledger import LedgerDeployment
from deployments.serve_hooks import fix_version, http_host

logger = logging.getLogger("baton.build")

POOL_POLICY = "deployments.autoscaling:PoolPolicy"
FRONTEND_POLICY = "deployments.autoscaling:FrontendPolicy"
"""The policies of deployments whose `autoscaling` names no other."""

REPORT_S = 2.0
"""How often replicas report their load.  Serve's default of 10 s would add to every delay.  Serve 2.60 calls this
setting deprecated in favour of an environment variable, but does not read that variable."""

SWITCH_REPORT_S, SWITCH_LOOK_BACK_S = 0.5, 1.5
"""How often replicas that may change their role report, and over how long the plan looks back.  Serve's 30 s are right
for starts, which cost minutes; a switch costs nothing, and what is seen 2 s later costs more than all else
(docs/benchmarks/2026-11-28-role-switch.md)."""

FRONTEND_REQUESTS = 200
"""Requests in flight for each frontend.  One core carries 128 streams of an H200 at 1.13 times the ITL of vLLM's own
server (docs/benchmarks/2026-11-21-h200.md), and some of the requests in flight still wait for their first token."""

UNBOUNDED = 1_000_000
"""max_ongoing_requests of the pools.  An engine's own scheduler has a queue, and Serve must not add one before it."""


def build(args: dict[str, Any]) -> Application:
    """Make the application: the frontends and each model's pools.  Raises ConfigError before any of them starts."""
    from deployments.frontend.deployment import Frontend
    from deployments.replica.worker import AggregatedWorker, DecodeWorker, PrefillWorker

    config = parse(args)
    check_address(config, http_host())
    check_autoscaling(config)
    device = check(config, _gpus_per_node())
    # Decided once for all replicas, by the CPU of the node on which Serve builds: nodes may differ, pools must not.
    config = with_chunk_sizes(with_dtype(config, device), device)
    logger.info("device=%s models=%s", device, ",".join(model.source for model in config.models))
    workers: dict[Role, type] = {"decode": DecodeWorker, "prefill": PrefillWorker, "aggregated": AggregatedWorker}
    pools = [build_pools(workers, config, model, device) for model in config.models]
    given = for_frontends(config)
    frontend = _deployment(Frontend, given).options(
        name="frontend",
        max_ongoing_requests=config.frontend.max_ongoing_requests,
        **_options(config.frontend, config.frontend.resources.num_gpus or 0, frontend_autoscaling(config)),
    )
    return frontend.bind(given, pools, build_ledger(config) if config.security.keys is not None else None)


def build_ledger(config: BatonConfig) -> Application:
    """Make the deployment with the tenants' limits, on a node for frontends.  It computes next to nothing."""
    frontend = config.frontend
    resources = Resources(num_cpus=0, node_labels=frontend.resources.node_labels)
    ledger = DeploymentConfig(replicas=1, resources=resources, environment=frontend.environment)
    return _deployment(LedgerDeployment).options(name="ledger", **_options(ledger, 0, None)).bind()


def for_frontends(config: BatonConfig) -> BatonConfig:
    """Return the configuration for the frontends, without what concerns the replicas of one deployment only.

    So a change of their number, or of the environment in which a pool's replicas run, does not change the frontends'
    version, and they are not restarted.
    """
    of_replicas = [*DeploymentConfig.model_fields, "python", "drain_s"]
    plain = {name: PoolConfig.model_fields[name].default for name in of_replicas}

    def strip(model: ModelConfig) -> ModelConfig:
        kept = {**plain, "autoscaling": {"min_replicas": 0} if model.may_sleep else None}
        pools: dict[str, Any] = {role: pool.model_copy(update=kept) for role, pool in model.pools().items()}
        return model.model_copy(update={"gpus": None, **pools})

    frontend = config.frontend.model_copy(update={"replicas": None, "autoscaling": None})
    return config.model_copy(update={"models": [strip(model) for model in config.models], "frontend": frontend})


def _gpus_per_node() -> list[int]:
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def build_pools(
    workers: Mapping[Role, type], config: BatonConfig, model: ModelConfig, device: str
) -> dict[Role, Application]:
    """Make the deployments of all pools of `model`."""
    return {role: build_pool(workers[role], role, config, model, device) for role in model.pools()}


def build_pool(worker: type, role: Role, config: BatonConfig, model: ModelConfig, device: str) -> Application:
    """Make the deployment of one pool of `model`."""
    pool = model.pool(role)
    assert pool is not None
    options = _options(pool, gpus_of_replica(pool, device), pool_autoscaling(model, role))
    if (python := python_of_replica(pool)) is not None:
        options["ray_actor_options"]["runtime_env"]["py_executable"] = shlex.quote(python)  # Ray hands it to bash
    given = for_pool(config, model, role)
    deployment = _deployment(worker, given, device).options(
        name=model.deployment_name(role),
        max_ongoing_requests=UNBOUNDED,
        request_router_config=RequestRouterConfig(
            request_router_class="deployments.frontend.request_router.PoolRequestRouter"
        ),
        **options,
    )
    return deployment.bind(given, device)


def for_pool(config: BatonConfig, model: ModelConfig, role: Role) -> BatonConfig:
    """Return the part of the configuration that the replicas of one pool use, as no other change may restart them.

    For an aggregated pool it has no prefill pool, because nothing is transferred from or to its replicas.
    """
    pool = model.pool(role)
    assert pool is not None
    other = PoolConfig(engine=model.engine)
    transfers = model.transfers_kv(role)
    pools = {"decode": other, "prefill": other if transfers else None, "aggregated": None}
    pools[role] = PoolConfig(
        engine=pool.engine,
        tensor_parallel_size=pool.tensor_parallel_size,
        engine_args=pool.engine_args,
        drain_s=pool.drain_s,
    )
    return BatonConfig.model_construct(  # unchecked: a user's model could not have an aggregated pool without prefill
        models=[
            model.model_copy(
                update={"server_args": {}, "routing": RoutingConfig(), "slo": SloConfig(), "gpus": None, **pools}
            )
        ],
        device=config.device,
        transfer=config.transfer if transfers else None,
        limits=LimitsConfig(prefill_timeout_s=config.limits.prefill_timeout_s),
    )


def _deployment(target: type, *given: BatonConfig | str) -> Any:
    """Make a deployment whose version is a hash of what its replicas are `given`.

    As long as that stays the same, the replicas are not restarted.
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BatonConfig) else part for part in given]
    deployment = serve.deployment(target)
    version = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    fix_version(deployment, version)
    return deployment


def frontend_autoscaling(config: BatonConfig) -> dict[str, Any] | None:
    """Serve's AutoscalingConfig of the frontends; None if their number is fixed."""
    if config.frontend.autoscaling is None:
        return None
    default = {"target_ongoing_requests": FRONTEND_REQUESTS, "policy": {"policy_function": FRONTEND_POLICY}}
    return {"metrics_interval_s": REPORT_S, **default, **config.frontend.autoscaling}


def pool_autoscaling(model: ModelConfig, role: Role) -> dict[str, Any] | None:
    """Serve's AutoscalingConfig of a pool; None if the number of its replicas is fixed."""
    pool = model.pool(role)
    if pool is None or pool.autoscaling is None:
        return None
    targets = {
        "ttft_s": model.slo.ttft_ms / 1000,
        "itl_s": model.slo.itl_ms / 1000,
        "sequences": pool.autoscaling.get("target_ongoing_requests"),
        "is_for_prompts": role != "decode" or not model.is_disaggregated,
        "is_for_decoding": role != "prefill",
    }
    budget = {"budget": replica_budget(model.gpus, pool)} if model.gpus is not None and role != "aggregated" else {}
    arguments = {"model": model.name, "role": role, "may_sleep": model.may_sleep, **budget, **targets}
    policy = {"policy_function": POOL_POLICY, "policy_kwargs": arguments}
    quick = {"metrics_interval_s": SWITCH_REPORT_S, "look_back_period_s": SWITCH_LOOK_BACK_S} if budget else {}
    # It does not begin asleep, so that an engine that cannot start is seen at once.
    begin = {"initial_replicas": 1} if model.may_sleep else {}
    return {"metrics_interval_s": REPORT_S, "policy": policy, **quick, **begin, **pool.autoscaling}


def _options(deployment: DeploymentConfig, num_gpus: float, autoscaling: dict[str, Any] | None) -> dict[str, Any]:
    resources = deployment.resources
    actor: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "num_gpus": num_gpus,
        "resources": resources.custom,
        "runtime_env": {"env_vars": deployment.environment},
    }
    if resources.node_labels:
        actor["label_selector"] = resources.node_labels
    if resources.memory_bytes is not None:
        actor["memory"] = resources.memory_bytes
    scale: dict[str, Any] = {"num_replicas": deployment.replicas or 1}
    if autoscaling is not None:
        scale = {"autoscaling_config": autoscaling}
    return {
        "ray_actor_options": actor,
        "logging_config": {"enable_access_log": False},  # Baton logs each sequence when it ends
        "health_check_period_s": deployment.health_check_period_s,
        "health_check_timeout_s": deployment.health_check_timeout_s,
        "graceful_shutdown_timeout_s": deployment.graceful_shutdown_timeout_s,
        "max_surge_percent": deployment.max_surge_percent,
        **scale,
    }


def check_autoscaling(config: BatonConfig) -> None:
    """Ask Serve whether it accepts the autoscaling settings.  Raises ConfigError."""
    settings = {"frontend": frontend_autoscaling(config)}
    for index, model in enumerate(config.models):
        settings |= {f"models.{index}.{role}": pool_autoscaling(model, role) for role in get_args(Role)}
    for field, autoscaling in settings.items():
        if autoscaling is None:
            continue
        try:
            accepted = AutoscalingConfig.model_validate(autoscaling)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join((field, "autoscaling", *map(str, problem["loc"])))
            raise ConfigError(name, problem["msg"].removeprefix("Value error, ")) from None
        if accepted.min_replicas == 0 and field == "frontend":
            raise ConfigError(f"{field}.autoscaling.min_replicas", "at least 1: frontends wake the models that sleep")
        if accepted.min_replicas == 0 and accepted.policy.policy_function != POOL_POLICY:
            raise ConfigError(
                f"{field}.autoscaling.policy",
                "only Baton's own policy wakes pools: leave it out, or set min_replicas to 1",
            )
