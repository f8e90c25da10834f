"""The engines, by the names that a configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from app.engines.base import Engine, EngineSpec
from app.messages import EngineName


def owned_args(engine: EngineName) -> dict[str, str]:
    """Return the engine's arguments that Baton sets, each with the setting by which the user controls it."""
    from app.engines import sglang, vllm
    from app.engines.sim import engine as sim

    return {"vllm": vllm.OWNED_ARGS, "sglang": sglang.OWNED_ARGS, "sim": sim.OWNED_ARGS}[engine]


def create_engine(engine: EngineName, spec: EngineSpec) -> Engine:
    """Return an engine that is not started yet."""
    from app.engines import sglang, vllm
    from app.engines.sim import engine as sim

    engines: dict[EngineName, Callable[[EngineSpec], Engine]] = {
        "vllm": vllm.VllmEngine,
        "sglang": sglang.SglangEngine,
        "sim": sim.SimEngine,
    }
    return engines[engine](spec)
