"""Finds configurations that cannot work, before any engine starts.  These checks go beyond those of app/config.py."""

from __future__ import annotations

import functools
import importlib.util
import ipaddress
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from app.config import BatonConfig, ModelConfig, PoolConfig
from app.engines.base import EngineSpec
from app.engines.transfer_rules import check_heads, check_transfer, kv_shape
from app.errors import ConfigError
from app.messages import Role
from app.models.shapes import SHAPES
from app.models.source import check_source, local_path, read_config
from app.role_trade import check_trade
from app.tenants import parse_tenants, read_tenants

Device = Literal["cpu", "cuda"]

REPOSITORY = Path(__file__).parents[1]
SGLANG_PYTHON = ".venv-sglang/bin/python"


def choose_device(config: BatonConfig, gpus_per_node: Sequence[int]) -> Device:
    """Return the configured device, or CUDA if any node has a GPU."""
    if config.device != "auto":
        return config.device
    return "cuda" if any(gpus_per_node) else "cpu"


def check(config: BatonConfig, gpus_per_node: Sequence[int]) -> Device:
    """Check the configuration and return the device to use.  Raises ConfigError that names the field.

    `gpus_per_node` is the number of GPUs that each node has now.  If ``device: cuda`` is set and no GPU is there yet,
    nodes are expected to come later (Kubernetes adds them from zero), so their number and size are not checked.
    """
    device = choose_device(config, gpus_per_node)
    for index, model in enumerate(config.models):
        check_source(f"models.{index}.source", model.source)
        _check_load_format(f"models.{index}", model)
        shape = kv_shape(read_config(f"models.{index}.source", model.source) or {})
        for role, pool in model.pools().items():
            _check_size(f"models.{index}.{role}.tensor_parallel_size", pool, device, gpus_per_node)
            if pool.engine != "sim":
                check_heads(f"models.{index}.{role}.tensor_parallel_size", pool.tensor_parallel_size, shape)
            else:
                _check_sim(f"models.{index}", role, model, pool)
        if model.engine == "sglang":
            _check_sglang(config, f"models.{index}", model)
        check_transfer(f"models.{index}", model, shape)
        if model.gpus is not None:
            check_trade(f"models.{index}", model)
            _check_budget(f"models.{index}", model)
    if device == "cuda" and config.device == "auto":
        _check_total(config, gpus_per_node)
    return device


def check_address(config: BatonConfig, host: str | None) -> None:
    """Raise ConfigError if Baton would serve whoever comes at an address that other machines can reach.

    `host` is where Serve listens: an address or the name ``localhost``; None if it serves no HTTP.
    """
    if host is None or is_loopback(host) or config.security.keys is not None or config.security.open:
        return
    raise ConfigError(
        "security.keys",
        f"missing, but Baton would listen at {host} (http_options.host), where other machines reach it: name a file of "
        "keys (docs/operations.md), listen at 127.0.0.1, or set security.open: true to serve whoever comes",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_keys(config: BatonConfig) -> None:
    """Raise ConfigError if what `security.keys` names cannot be read on this machine."""
    if config.security.keys is not None:
        parse_tenants(read_tenants(config.security.keys))


def gpus_of_replica(pool: PoolConfig, device: str) -> float:
    """Return the GPUs that Ray reserves for one replica of `pool`."""
    if pool.resources.num_gpus is not None:
        return pool.resources.num_gpus
    if pool.engine == "sim":
        return 0
    return pool.tensor_parallel_size if device == "cuda" else 0


def replica_budget(gpus: int, pool: PoolConfig) -> int:
    """Return how many replicas as those of `pool` `gpus` GPUs are enough for; on CPUs each counts as one GPU."""
    return int(gpus / (pool.resources.num_gpus or pool.tensor_parallel_size))


def python_of_replica(pool: PoolConfig) -> str | None:
    """Return the interpreter that replicas of `pool` run in; None for the one that Ray's workers have."""
    if pool.python is not None:
        return str(REPOSITORY / pool.python)
    default = REPOSITORY / SGLANG_PYTHON
    return str(default) if pool.engine == "sglang" and default.is_file() else None


def check_interpreters(config: BatonConfig) -> None:
    """Check that this machine has the pools' interpreters.  Raises ConfigError.

    Call it only if the engines run on this machine: a cluster elsewhere may have what its driver lacks, and vice versa.
    """
    for index, model in enumerate(config.models):
        for role, pool in model.pools().items():
            _check_interpreter(f"models.{index}.{role}.python", pool)


def _check_interpreter(field: str, pool: PoolConfig) -> None:
    python = python_of_replica(pool)
    if python is None:
        if pool.engine != "sglang" or importlib.util.find_spec("sglang") is not None:
            return
        problem = f"{SGLANG_PYTHON} does not exist, and this environment has no SGLang"
    elif Path(python).is_file() and os.access(python, os.X_OK):
        return
    else:
        problem = f"{pool.python or SGLANG_PYTHON} does not exist or cannot be run"
    raise ConfigError(field, problem + ("; `bash scripts/setup.sh sglang` makes it" if pool.engine == "sglang" else ""))


def _check_sglang(config: BatonConfig, field: str, model: ModelConfig) -> None:
    if model.is_disaggregated and config.transfer is not None and len(config.transfer.backends) > 1:
        raise ConfigError("transfer.backends", f"SGLang takes one, and {field} runs it")
    if not model.server_args.get("reasoning_parser"):
        return
    # A grammar has to wait until reasoning ends.  SGLang's engine finds that end itself; vLLM's engine is told by the
    # frontend.
    pools = model.pools()
    pools.pop("prefill", None)
    if not all(model.merged_engine_args(pool).get("reasoning_parser") for pool in pools.values()):
        raise ConfigError(
            f"{field}.engine_args.reasoning_parser",
            f"missing, but {field}.server_args.reasoning_parser is set: structured output would not wait for the end "
            "of reasoning",
        )


def _check_budget(field: str, model: ModelConfig) -> None:
    """Check that `gpus` is enough for the least that the pools may have."""
    assert model.gpus is not None
    least = sum((pool.autoscaling or {}).get("min_replicas", 1) for pool in (model.prefill, model.decode) if pool)
    if least > (budget := replica_budget(model.gpus, model.decode)):
        raise ConfigError(
            f"{field}.gpus",
            f"{model.gpus} is enough for {budget} replicas, but min_replicas of both pools are {least}",
        )


def _check_size(field: str, pool: PoolConfig, device: Device, gpus_per_node: Sequence[int]) -> None:
    if pool.engine == "sim":
        return
    wanted, largest = pool.tensor_parallel_size, max(gpus_per_node, default=0)
    if device == "cpu" and wanted > 1:
        raise ConfigError(field, f"{wanted} GPUs are wanted, but the engines run on CPUs here; set it to 1")
    if device == "cuda" and largest and wanted > largest:
        raise ConfigError(field, f"{wanted} GPUs are wanted, but no node has more than {largest}")


def _check_total(config: BatonConfig, gpus_per_node: Sequence[int]) -> None:
    """Check the sum of GPUs.  This is for a device that was found, not configured: no more GPUs are expected."""
    wanted = 0.0
    for model in config.models:
        for pool in model.pools().values():
            wanted += gpus_of_replica(pool, "cuda") * (pool.replicas or 1)
    if wanted > sum(gpus_per_node):
        raise ConfigError(
            "models",
            f"the pools want {wanted:g} GPUs, but there are {sum(gpus_per_node)}: lower `replicas`, remove the prefill "
            "pool, let pools share a GPU (resources.num_gpus: 0.5 and engine_args.gpu_memory_utilization: 0.4), or "
            "set `device: cuda` if more nodes will come",
        )


def _check_load_format(field: str, model: ModelConfig) -> None:
    if model.source not in SHAPES:
        return
    sections = {"engine_args": model.engine_args}
    sections |= {
        f"{role}.engine_args": pool.engine_args for role, pool in model.pools().items() if pool.engine != "sim"
    }
    for section, arguments in sections.items():
        if (given := arguments.get("load_format", "dummy")) != "dummy":
            raise ConfigError(
                f"{field}.{section}.load_format",
                f"{given!r} reads weights, and {model.source} has none: remove it, as Baton sets `dummy`",
            )


def _check_sim(field: str, role: str, model: ModelConfig, pool: PoolConfig) -> None:
    from app.engines.sim.engine import parse_args

    try:
        parse_args(model.merged_engine_args(pool))
    except ConfigError as error:
        name = error.field.split(".")[1] if "." in error.field else ""
        section = f"{role}." if name in pool.engine_args else ""
        raise ConfigError(f"{field}.{section}{error.field}", error.problem) from None


def check_with_vllm(config: BatonConfig, device: Device) -> None:
    """Let vLLM make the configuration of each engine and of its server, without starting them.  Raises ConfigError.

    This takes seconds and changes the environment of the process, so call it in a separate process.  Engines are
    checked only on a machine where they would run, because vLLM looks for the device.
    """
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for index, model in enumerate(config.models):
        if model.engine == "vllm":
            _check_names(index, model, known, "vLLM")
        _check_server(index, model)
        for role, pool in model.pools().items():
            _check_engine(f"models.{index}.{role}", model, role, pool, device)


def check_with_sglang(config: BatonConfig) -> None:
    """Ask SGLang, in its own environment on this machine, which engine arguments it knows.

    This takes as long as SGLang's import, which is seconds.  Raises ConfigError that names an unknown argument.
    """
    for index, model in enumerate(config.models):
        if model.engine == "sglang":
            python = python_of_replica(model.decode) or sys.executable
            _check_names(index, model, _sglang_args(python), "SGLang")


@functools.cache
def _sglang_args(python: str) -> frozenset[str]:
    code = "from app.engines.sglang_surface import argument_names; print('', *argument_names())"
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}  # otherwise it looks for a GPU
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if answer.returncode:
        raise ConfigError("engine_args", f"SGLang cannot be asked: {answer.stderr.strip().splitlines()[-1]}")
    return frozenset(answer.stdout.splitlines()[-1].split())


def _check_names(index: int, model: ModelConfig, known: Collection[str], engine: str) -> None:
    arguments = {"engine_args": model.engine_args}
    arguments |= {f"{role}.engine_args": pool.engine_args for role, pool in model.pools().items()}
    for section, names in arguments.items():
        for name in names:
            if name not in known:
                raise ConfigError(f"models.{index}.{section}.{name}", f"{engine} knows no such engine argument")


def _check_server(index: int, model: ModelConfig) -> None:
    from app.frontend.openai_server import frontend_config, server_namespace

    arguments = server_namespace(model, index)
    try:
        frontend_config(arguments)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"models.{index}", f"vLLM refuses it: {_in_one_line(error)}") from error


def _check_engine(field: str, model: ModelConfig, role: Role, pool: PoolConfig, device: Device) -> None:
    from vllm.platforms import current_platform

    from app.engines.vllm import build_engine_args

    if pool.engine != "vllm" or current_platform.device_type != device:
        return
    spec = EngineSpec(
        role=role,
        is_disaggregated=model.transfers_kv(role),
        replica_id="",
        model_path=local_path(model.source),
        device=device,
        tensor_parallel_size=pool.tensor_parallel_size,
        engine_args=model.merged_engine_args(pool),
    )
    try:
        build_engine_args(spec).create_engine_config()
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{field}.engine_args", f"vLLM refuses them: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
