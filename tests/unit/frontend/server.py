"""vLLM's server as a frontend runs it, over an orchestrator that a test makes up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.types import ASGIApp

from app.config import parse
from app.frontend.orchestrator import Orchestrator
from app.tenant_usage import Accounts
from app.tenants import KeyRing


@asynccontextmanager
async def server_over(
    orchestrator: object, config: dict[str, Any], accounts: Accounts | None = None
) -> AsyncIterator[ASGIApp]:
    """Yield the application of a configuration, all of whose models `orchestrator` serves."""
    from app.frontend.openai_server import build_server

    async def no_stats() -> dict[str, Any]:
        return {}

    def healthy() -> dict[str, Any]:
        cards = [
            {"engine": "sim", "mode": "aggregated", "local_prefill": True, "state": "ready"} for _ in parsed.models
        ]
        models = [{"name": model.name, **card} for model, card in zip(parsed.models, cards, strict=True)]
        return {"status": "healthy", "models": models, "endpoints": []}

    parsed = parse(config)
    keys = KeyRing(parsed.security.keys) if parsed.security.keys is not None else None
    before = dict(os.environ)
    orchestrators = [cast(Orchestrator, orchestrator)] * len(parsed.models)
    yield await build_server(parsed, orchestrators, healthy, no_stats, keys, accounts or Accounts())
    # vLLM sets variables as it is imported, which is nothing for other tests' processes.
    os.environ.clear()
    os.environ.update(before)
