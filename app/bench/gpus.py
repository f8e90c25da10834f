"""Counts and describes this machine's NVIDIA GPUs without CUDA: nothing is initialised, and only Python is needed.

``python -m app.bench.gpus 2`` exits with 1, and says why in one line, if there are fewer than two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEV = Path("/dev")
NVIDIA_SMI_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it."""

    name: str
    memory_mib: int
    driver: str


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many GPUs a CUDA process that starts with `environment` sees.

    If nvidia-smi does not run, the device files count.
    """
    listed = _nvidia_smi("--list-gpus")
    if listed is None:
        number = sum(path.name.removeprefix("nvidia").isdigit() for path in DEV.glob("nvidia[0-9]*"))
    else:
        number = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return number if visible is None else _num_visible(visible, number)


def _num_visible(visible: str, number: int) -> int:
    """Return how many of `number` GPUs CUDA_VISIBLE_DEVICES names.  As in CUDA, an invalid entry ends the list."""
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        is_uuid = entry.startswith(("GPU-", "MIG-"))
        if not is_uuid and not (entry.isdecimal() and int(entry) < number):
            break
        count += 1
    return min(count, number)


def describe_gpus() -> list[Gpu]:
    """Return all GPUs of the machine, visible or not; none if nvidia-smi does not run."""
    answer = _nvidia_smi("--query-gpu=memory.total,driver_version,name", "--format=csv,noheader,nounits") or ""
    gpus = []
    for line in answer.splitlines():
        memory, driver, name = (part.strip() for part in line.split(",", maxsplit=2))
        gpus.append(Gpu(name, int(memory) if memory.isdecimal() else 0, driver))
    return gpus


def too_few(wanted: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return one line that says that there are fewer than `wanted` GPUs; None if there are enough."""
    found = count_gpus(environment)
    if found >= wanted:
        return None
    limited = " (CUDA_VISIBLE_DEVICES is set)" if "CUDA_VISIBLE_DEVICES" in environment else ""
    return f"this needs {wanted} NVIDIA GPUs, and this machine shows {found}{limited}: nothing was run"


def _nvidia_smi(*options: str) -> str | None:
    """Return what nvidia-smi prints; None if it is missing or fails."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", *options], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None


if __name__ == "__main__":
    sys.exit(too_few(int(sys.argv[1])))
