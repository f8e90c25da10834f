"""What can be known to fail before any engine starts, beyond what app/config.py sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from app.config import BatonConfig
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
    come later (Kubernetes scales them up from zero), so their size is not checked.
    """
    device = choose_device(config, gpus_per_node)
    largest = max(gpus_per_node, default=0)
    for index, model in enumerate(config.models):
        check_source(f"models.{index}.source", model.source)
        for role in ("prefill", "decode"):
            pool = getattr(model, role)
            if pool is None:
                continue
            field = f"models.{index}.{role}.tensor_parallel_size"
            wanted = pool.tensor_parallel_size
            if device == "cpu" and wanted > 1:
                raise ConfigError(field, f"{wanted} GPUs are wanted, but the engines run on CPUs here; set it to 1")
            if device == "cuda" and largest and wanted > largest:
                raise ConfigError(field, f"{wanted} GPUs are wanted, but no node has more than {largest}")
    return device


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
