"""What can be known to fail before any engine starts, beyond what app/config.py sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from app.config import BatonConfig, PoolConfig
from app.errors import ConfigError
from app.model_source import check_source

Device = Literal["cpu", "cuda"]


def choose_device(config: BatonConfig, gpus_per_node: Sequence[int]) -> Device:
    """The configured device, or CUDA if any node has a GPU."""
    if config.device != "auto":
        return config.device
    return "cuda" if any(gpus_per_node) else "cpu"


def check(config: BatonConfig, gpus_per_node: Sequence[int]) -> Device:
    """The device to use.  Raises ConfigError that names the field.

    `gpus_per_node` is what each node has now.  With ``device: cuda`` set and no GPU there yet, nodes are taken to
    come later (Kubernetes scales them up from zero), so their number and size are not checked.
    """
    device = choose_device(config, gpus_per_node)
    for index, model in enumerate(config.models):
        check_source(f"models.{index}.source", model.source)
        pools = {"prefill": model.prefill, "decode": model.decode}
        for role, pool in pools.items():
            if pool is not None:
                _check_size(f"models.{index}.{role}.tensor_parallel_size", pool, device, gpus_per_node)
    if device == "cuda" and config.device == "auto":
        _check_total(config, gpus_per_node)
    return device


def gpus_of_replica(pool: PoolConfig, device: str) -> float:
    """What Ray reserves for one replica of `pool`."""
    if pool.resources.num_gpus is not None:
        return pool.resources.num_gpus
    return pool.tensor_parallel_size if device == "cuda" else 0


def _check_size(field: str, pool: PoolConfig, device: Device, gpus_per_node: Sequence[int]) -> None:
    wanted, largest = pool.tensor_parallel_size, max(gpus_per_node, default=0)
    if device == "cpu" and wanted > 1:
        raise ConfigError(field, f"{wanted} GPUs are wanted, but the engines run on CPUs here; set it to 1")
    if device == "cuda" and largest and wanted > largest:
        raise ConfigError(field, f"{wanted} GPUs are wanted, but no node has more than {largest}")


def _check_total(config: BatonConfig, gpus_per_node: Sequence[int]) -> None:
    """With the device found rather than configured, the GPUs that are there are all there will be."""
    wanted = 0.0
    for model in config.models:
        for pool in filter(None, (model.prefill, model.decode)):
            wanted += gpus_of_replica(pool, "cuda") * (pool.replicas or 1)
    if wanted > sum(gpus_per_node):
        raise ConfigError(
            "models",
            f"the pools want {wanted:g} GPUs, but there are {sum(gpus_per_node)}: lower `replicas`, remove the prefill "
            "pool, let pools share a GPU (resources.num_gpus: 0.5 and engine_args.gpu_memory_utilization: 0.4), or "
            "set `device: cuda` if more nodes will come",
        )


def check_engine_args(config: BatonConfig) -> None:
    """Ask vLLM whether it knows the arguments for its engines and its server.  Raises ConfigError."""
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    from app.openai_server import server_namespace

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for index, model in enumerate(config.models):
        sections = {"engine_args": model.engine_args, "decode.engine_args": model.decode.engine_args}
        if model.prefill is not None:
            sections["prefill.engine_args"] = model.prefill.engine_args
        for section, arguments in sections.items():
            for name in arguments:
                if name not in known:
                    raise ConfigError(f"models.{index}.{section}.{name}", "vLLM knows no such engine argument")
        server_namespace(model)
