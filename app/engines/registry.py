"""Which engines there are, by the name that a configuration gives."""

from __future__ import annotations

from collections.abc import Callable

from app.engines.base import Engine, EngineSpec
from app.messages import EngineName


def owned_args(engine: EngineName) -> dict[str, str]:
    """The engine's arguments that Baton sets, with where the user sets them instead."""
    from app.engines import sglang, vllm
    from app.engines.sim import engine as sim

    return {"vllm": vllm.OWNED_ARGS, "sglang": sglang.OWNED_ARGS, "sim": sim.OWNED_ARGS}[engine]


def create_engine(engine: EngineName, spec: EngineSpec) -> Engine:
    """An engine that is not started yet."""
    from app.engines import sglang, vllm
    from app.engines.sim import engine as sim

    engines: dict[EngineName, Callable[[EngineSpec], Engine]] = {
        "vllm": vllm.VllmEngine,
        "sglang": sglang.SglangEngine,
        "sim": sim.SimEngine,
    }
    return engines[engine](spec)
