"""vLLM's server as a frontend runs it, over an orchestrator that a test makes up."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.types import ASGIApp

from app.config import parse
from app.frontend.orchestrator import Orchestrator


@asynccontextmanager
async def server_over(orchestrator: object, config: dict[str, Any]) -> AsyncIterator[ASGIApp]:
    """Yield the application of a configuration with one model, which `orchestrator` serves."""
    from app.frontend.openai_server import build_server

    async def no_stats() -> dict[str, Any]:
        return {}

    before = dict(os.environ)
    yield await build_server(parse(config), [cast(Orchestrator, orchestrator)], dict, no_stats)
    # vLLM sets variables as it is imported, which is nothing for other tests' processes.
    os.environ.clear()
    os.environ.update(before)
