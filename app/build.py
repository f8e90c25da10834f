"""The Serve application: ``import_path: app.build:build``.

The whole topology is in `build`.  (No ``from __future__ import annotations`` here: with it Serve would hand over
the arguments unparsed.)
"""

import logging
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from app.config import BatonConfig, DeploymentConfig, ModelConfig, PoolConfig, parse
from app.errors import ConfigError
from app.preflight import check, gpus_of_replica

logger = logging.getLogger("baton.build")

POLICY = "deployments.autoscaling:by_sequences"
"""How a decode pool scales unless its `autoscaling` names another policy."""

UNBOUNDED = 1_000_000
"""max_ongoing_requests of the pools: an engine's own scheduler queues, and Serve must not queue before it."""


def build(args: dict[str, Any]) -> Application:
    """Frontend over decode and, unless the model is aggregated, prefill.  Raises ConfigError before any starts."""
    from deployments.decode import DecodeWorker
    from deployments.frontend import Frontend
    from deployments.prefill import PrefillWorker

    config = parse(args)
    check_autoscaling(config)
    device = check(config, _gpus_per_node())
    logger.info("device=%s model=%s", device, config.models[0].source)
    model = config.models[0]
    given = without_scale(config)
    pools = {"decode": build_pool(DecodeWorker, "decode", model.decode, device).bind(given, device)}
    if model.prefill is not None:
        pools["prefill"] = build_pool(PrefillWorker, "prefill", model.prefill, device).bind(given, device)
    frontend = serve.deployment(Frontend).options(
        name="frontend",
        max_ongoing_requests=config.frontend.max_ongoing_requests,
        **_options(config.frontend, config.frontend.resources.num_gpus or 0),
    )
    return frontend.bind(given, **pools)


def without_scale(config: BatonConfig) -> BatonConfig:
    """The configuration as replicas get it: a change of their arguments makes Serve restart all of them.

    So a new number of replicas changes nothing but that number.
    """
    unscaled = {"replicas": None, "autoscaling": None}

    def strip(model: ModelConfig) -> ModelConfig:
        prefill = model.prefill.model_copy(update=unscaled) if model.prefill is not None else None
        return model.model_copy(update={"decode": model.decode.model_copy(update=unscaled), "prefill": prefill})

    frontend = config.frontend.model_copy(update=unscaled)
    return config.model_copy(update={"models": [strip(model) for model in config.models], "frontend": frontend})


def _gpus_per_node() -> list[int]:
    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def build_pool(worker: type, name: str, pool: PoolConfig, device: str) -> Any:
    """The Serve deployment of one pool, not yet bound to its arguments."""
    by_sequences = {"policy": {"policy_function": POLICY}} if name == "decode" else {}
    return serve.deployment(worker).options(
        name=name,
        max_ongoing_requests=UNBOUNDED,
        request_router_config=RequestRouterConfig(request_router_class="deployments.request_router.PoolRequestRouter"),
        **_options(pool, gpus_of_replica(pool, device), by_sequences),
    )


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
        deployments |= {f"models.{index}.prefill": model.prefill, f"models.{index}.decode": model.decode}
    for field, deployment in deployments.items():
        if deployment is None or deployment.autoscaling is None:
            continue
        try:
            AutoscalingConfig.model_validate(deployment.autoscaling)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join((field, "autoscaling", *map(str, problem["loc"])))
            raise ConfigError(name, problem["msg"].removeprefix("Value error, ")) from None
