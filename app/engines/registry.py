"""Which engines there are, by the name that a configuration gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from app.engines.base import Engine, EngineSpec

EngineName = Literal["vllm", "sim"]


def owned_args(engine: EngineName) -> dict[str, str]:
    """The engine's arguments that Baton sets, with where the user sets them instead."""
    from app.engines import sim, vllm

    return {"vllm": vllm.OWNED_ARGS, "sim": sim.OWNED_ARGS}[engine]


def create_engine(engine: EngineName, spec: EngineSpec) -> Engine:
    """An engine that is not started yet."""
    from app.engines import sim, vllm

    engines: dict[EngineName, Callable[[EngineSpec], Engine]] = {"vllm": vllm.VllmEngine, "sim": sim.SimEngine}
    return engines[engine](spec)
