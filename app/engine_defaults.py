"""Engine arguments that depend on the device, which the engines and the server in front of them must agree on."""

from __future__ import annotations

from typing import Any


def cpu_defaults(device: str) -> dict[str, Any]:
    """Engine arguments that differ on a CPU: compiling kernels costs minutes there and gains little."""
    return {"enforce_eager": True, "dtype": "bfloat16"} if device == "cpu" else {}
