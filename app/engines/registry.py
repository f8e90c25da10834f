"""Which engines there are, by the name that a configuration gives.

A new engine needs:

1. an adapter here that keeps the promises of `Engine` (base.py), and a line in `create_engine`;
2. its name in `EngineName` (app/messages.py) and the arguments that Baton sets (owned_args.py);
3. whether one engine can decode and prefill (`ModelConfig.can_decode_prefill`), and what vLLM's server has to know
   of its arguments (`NAMES_AT_THE_SERVER` in app/frontend/openai_server.py);
4. what can be known to fail before it starts (app/preflight.py), and its title (deployments/application.py);
5. an environment, if it does not fit into vLLM's (scripts/setup.sh, app/cli/environments.py, cluster/Dockerfile);
6. to pass tests/engine_contract.py.
"""

from __future__ import annotations

from collections.abc import Callable

from app.engines.base import Engine, EngineSpec
from app.messages import EngineName


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
