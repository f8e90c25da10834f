"""Which engines there are, by the name that a configuration gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from app.engines.base import Engine, EngineSpec

EngineName = Literal["vllm", "sglang", "sim"]


def owned_args(engine: EngineName) -> dict[str, str]:
    """The engine's arguments that Baton sets, with where the user sets them instead."""
    from app.engines import sglang, vllm
    from app.engines.sim import engine as sim

    return {"vllm": vllm.OWNED_ARGS, "sglang": sglang.OWNED_ARGS, "sim": sim.OWNED_ARGS}[engine]


def can_decode_prefill(engine: EngineName) -> bool:
    """Whether an engine that decodes for a prefill pool can prefill a prompt itself, when that is better or needed.

    SGLang's cannot: its scheduler in ``disaggregation_mode="decode"`` has no forward pass over a prompt.
    """
    return engine != "sglang"


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
