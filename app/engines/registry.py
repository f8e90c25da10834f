"""Which engines there are, by the name that a configuration gives."""

from __future__ import annotations

from typing import Literal

from app.engines.base import Engine, EngineSpec

EngineName = Literal["vllm"]


def owned_args(engine: EngineName) -> dict[str, str]:
    """The engine's arguments that Baton sets, with where the user sets them instead."""
    from app.engines import vllm

    return {"vllm": vllm.OWNED_ARGS}[engine]


def create_engine(engine: EngineName, spec: EngineSpec) -> Engine:
    """An engine that is not started yet."""
    from app.engines import vllm

    return {"vllm": vllm.VllmEngine}[engine](spec)
