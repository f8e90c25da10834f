"""What an engine is started with on a CPU unless ``engine_args`` says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from app.config import BatonConfig

CpuDtype = Literal["bfloat16", "float32"]

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""As /proc/cpuinfo spells them; the last one is Arm's."""

CAPS_WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of ONEDNN_MAX_CPU_ISA with which torch does not use what the CPU has for bfloat16."""


def cpu_defaults(device: str) -> dict[str, Any]:
    """Engine arguments that differ on a CPU: compiling kernels costs minutes there and gains little."""
    return {"enforce_eager": True, "dtype": cpu_dtype()} if device == "cpu" else {}


def cpu_dtype(cpuinfo: str | None = None, environment: Mapping[str, str] = os.environ) -> CpuDtype:
    """bfloat16 where the CPU multiplies it, else float32.

    `cpuinfo` is the text of /proc/cpuinfo, by default this machine's.  Emulated bfloat16 costs 70 to 200 times
    float32's time with AVX2 only, and up to 4 times with AVX-512.
    """
    if environment.get("ONEDNN_MAX_CPU_ISA", "").upper() in CAPS_WITHOUT_BFLOAT16:
        return "float32"
    return "float32" if BFLOAT16_FLAGS.isdisjoint(_flags(cpuinfo)) else "bfloat16"


def _flags(cpuinfo: str | None) -> set[str]:
    """Those of the first processor."""
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.is_file() else ""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def with_dtype(config: BatonConfig, device: str) -> BatonConfig:
    """`config` with the dtype of the models that leave it open, if they run on CPUs.

    It is chosen once, where the application is built: the nodes' CPUs may differ, but KV that moves between them, and
    the output of one model's pools, must not.
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
    """Whether a pool of a real engine leaves its dtype open."""
    return any(
        pool.engine != "sim" and "dtype" not in model.merged_engine_args(pool)
        for model in config.models
        for pool in model.pools().values()
    )
