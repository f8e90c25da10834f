"""The Serve application: ``import_path: app.build:build``.

The whole topology is in `build`.  (No ``from __future__ import annotations`` here: with it Serve would hand over
the arguments unparsed.)
"""

import hashlib
import json
import logging
import shlex
from typing import Any, get_args

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve._private.config import DeploymentConfig as ServeDeploymentConfig
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from app.config import (
    BatonConfig,
    DeploymentConfig,
    LimitsConfig,
    ModelConfig,
    PoolConfig,
    RoutingConfig,
    SloConfig,
    parse,
)
from app.engines.base import Role
from app.errors import ConfigError
from app.preflight import check, gpus_of_replica, python_of_replica

logger = logging.getLogger("baton.build")

POLICY = "deployments.autoscaling:by_sequences"
"""How a pool that decodes scales unless its `autoscaling` names another policy."""

UNBOUNDED = 1_000_000
"""max_ongoing_requests of the pools: an engine's own scheduler queues, and Serve must not queue before it."""


def build(args: dict[str, Any]) -> Application:
    """Frontend over each model's pools.  Raises ConfigError before any starts."""
    from deployments.decode import AggregatedWorker, DecodeWorker
    from deployments.frontend import Frontend
    from deployments.prefill import PrefillWorker

    config = parse(args)
    check_autoscaling(config)
    device = check(config, _gpus_per_node())
    logger.info("device=%s models=%s", device, ",".join(model.source for model in config.models))
    workers: dict[Role, type] = {"decode": DecodeWorker, "prefill": PrefillWorker, "aggregated": AggregatedWorker}
    pools = [
        {role: build_pool(worker, role, config, model, device) for role, worker in workers.items() if model.pool(role)}
        for model in config.models
    ]
    given = without_scale(config)
    frontend = _deployment(Frontend, given).options(
        name="frontend",
        max_ongoing_requests=config.frontend.max_ongoing_requests,
        **_options(config.frontend, config.frontend.resources.num_gpus or 0),
    )
    return frontend.bind(given, pools)


def without_scale(config: BatonConfig) -> BatonConfig:
    """The configuration as frontends get it: a new number of replicas changes nothing but that number."""
    unscaled = {"replicas": None, "autoscaling": None}

    def strip(model: ModelConfig) -> ModelConfig:
        pools = {role: model.pool(role) for role in get_args(Role)}
        return model.model_copy(
            update={role: pool.model_copy(update=unscaled) if pool else None for role, pool in pools.items()}
        )

    frontend = config.frontend.model_copy(update=unscaled)
    return config.model_copy(update={"models": [strip(model) for model in config.models], "frontend": frontend})


def _gpus_per_node() -> list[int]:
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def build_pool(worker: type, role: Role, config: BatonConfig, model: ModelConfig, device: str) -> Application:
    """One pool of `model`."""
    pool = model.pool(role)
    assert pool is not None
    by_sequences = {"policy": {"policy_function": POLICY}} if role != "prefill" else {}
    options = _options(pool, gpus_of_replica(pool, device), by_sequences)
    if (python := python_of_replica(pool)) is not None:
        options["ray_actor_options"]["runtime_env"]["py_executable"] = shlex.quote(python)  # Ray hands it to bash
    given = for_pool(config, model, role)
    deployment = _deployment(worker, given, device).options(
        name=model.deployment_name(role),
        max_ongoing_requests=UNBOUNDED,
        request_router_config=RequestRouterConfig(request_router_class="deployments.request_router.PoolRequestRouter"),
        **options,
    )
    return deployment.bind(given, device)


def for_pool(config: BatonConfig, model: ModelConfig, role: Role) -> BatonConfig:
    """What the replicas of one pool use of the configuration: nothing else may restart them.

    Those of an aggregated pool know of no prefill: nothing is transferred from or to them.
    """
    pool = model.pool(role)
    assert pool is not None
    other = PoolConfig(engine=model.engine)
    transfers = model.transfers_kv(role)
    pools = {"decode": other, "prefill": other if transfers else None, "aggregated": None}
    pools[role] = PoolConfig(
        engine=pool.engine, tensor_parallel_size=pool.tensor_parallel_size, engine_args=pool.engine_args
    )
    return BatonConfig.model_construct(  # unchecked: a user's model could not have an aggregated pool without prefill
        models=[model.model_copy(update={"server_args": {}, "routing": RoutingConfig(), "slo": SloConfig(), **pools})],
        device=config.device,
        transfer=config.transfer if transfers else None,
        limits=LimitsConfig(prefill_timeout_s=config.limits.prefill_timeout_s),
    )


class FixedVersion(ServeDeploymentConfig):
    """Serve's settings of a deployment, whose version stays what it is made with.

    Serve restarts a deployment's replicas when its version changes, and would give all of an application's deployments
    a new one whenever anything in `args` changed, and in ``serve.run`` always.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "version":
            super().__setattr__(name, value)


def _deployment(target: type, *given: BatonConfig | str) -> Any:
    """A deployment whose version is what its replicas are `given`: as long as that is the same, they stay."""
    plain = [part.model_dump(mode="json") if isinstance(part, BatonConfig) else part for part in given]
    deployment = serve.deployment(target)
    version = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    deployment._deployment_config = FixedVersion(version=version)
    return deployment


def _options(
    deployment: DeploymentConfig, num_gpus: float, default_autoscaling: dict[str, Any] | None = None
) -> dict[str, Any]:
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
    if deployment.autoscaling is not None:
        scale = {"autoscaling_config": {**(default_autoscaling or {}), **deployment.autoscaling}}
    return {
        "ray_actor_options": actor,
        "logging_config": {"enable_access_log": False},  # Baton logs each sequence when it ends
        "health_check_period_s": deployment.health_check_period_s,
        "health_check_timeout_s": deployment.health_check_timeout_s,
        "graceful_shutdown_timeout_s": deployment.graceful_shutdown_timeout_s,
        **scale,
    }


def check_autoscaling(config: BatonConfig) -> None:
    """Ask Serve whether it accepts the autoscaling settings.  Raises ConfigError."""
    deployments: dict[str, DeploymentConfig | None] = {"frontend": config.frontend}
    for index, model in enumerate(config.models):
        deployments |= {f"models.{index}.{role}": model.pool(role) for role in get_args(Role)}
    for field, deployment in deployments.items():
        if deployment is None or deployment.autoscaling is None:
            continue
        try:
            AutoscalingConfig.model_validate(deployment.autoscaling)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join((field, "autoscaling", *map(str, problem["loc"])))
            raise ConfigError(name, problem["msg"].removeprefix("Value error, ")) from None
