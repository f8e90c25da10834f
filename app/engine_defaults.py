"""The arguments with which an engine starts on a CPU unless ``engine_args`` says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from app.config import BatonConfig

CpuDtype = Literal["bfloat16", "float32"]

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""The CPU flags that stand for bfloat16, as /proc/cpuinfo spells them.  The last one is Arm's."""

CAPS_WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of ONEDNN_MAX_CPU_ISA with which torch does not use what the CPU has for bfloat16."""


def cpu_defaults(device: str) -> dict[str, Any]:
    """Return the engine arguments that differ on a CPU, where compiling kernels takes minutes and gains little."""
    return {"enforce_eager": True, "dtype": cpu_dtype()} if device == "cpu" else {}


def cpu_dtype(cpuinfo: str | None = None, environment: Mapping[str, str] = os.environ) -> CpuDtype:
    """Return bfloat16 if the CPU has instructions to multiply it, else float32.

    `cpuinfo` is the text of /proc/cpuinfo, by default this machine's.  Emulated bfloat16 takes 70 to 200 times as long
    as float32 with AVX2 only, and up to 4 times as long with AVX-512.
    """
    if environment.get("ONEDNN_MAX_CPU_ISA", "").upper() in CAPS_WITHOUT_BFLOAT16:
        return "float32"
    return "float32" if BFLOAT16_FLAGS.isdisjoint(_flags(cpuinfo)) else "bfloat16"


def _flags(cpuinfo: str | None) -> set[str]:
    """Return the flags of the first processor."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.is_file() else ""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def with_dtype(config: BatonConfig, device: str) -> BatonConfig:
    """Return `config` with a dtype for the models that do not set one, if they run on CPUs.

    It is chosen once, where the application is built.  The nodes may have different CPUs, but the KV that moves between
    them must have one dtype, and all pools of a model must give the same output.
    """
    if device != "cpu":
        return config
    default = {"dtype": cpu_dtype()}
    models = [
        model if model.engine == "sim" else model.model_copy(update={"engine_args": {**default, **model.engine_args}})
        for model in config.models
    ]
    return config.model_copy(update={"models": models})


def takes_default_dtype(config: BatonConfig) -> bool:
    """Whether any pool with a real engine does not set its dtype."""
    return any(
        pool.engine != "sim" and "dtype" not in model.merged_engine_args(pool)
        for model in config.models
        for pool in model.pools().values()
    )
