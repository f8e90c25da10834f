"""The frontend deployment: HTTP in, calls on the pools out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from app.config import BatonConfig
from app.errors import BatonError
from app.openai_server import build_server
from app.orchestrator import Orchestrator
from deployments.membership import Membership
from deployments.pools import RayDecodePool, RayPrefillPool
from deployments.process import adopt_serve_logging, freeze_heap


@serve.ingress()
class Frontend:
    """One model's API server; any number of replicas serve the same pools without talking to each other."""

    async def __init__(self, config: BatonConfig, decode: Any, prefill: Any = None) -> None:  # type: ignore[misc]  # Serve awaits it
        adopt_serve_logging()
        self._config = config
        self._handles = {"decode": decode, **({"prefill": prefill} if prefill is not None else {})}
        self._decode = RayDecodePool(decode)
        self._prefill = RayPrefillPool(prefill) if prefill is not None else None
        orchestrator = Orchestrator(self._prefill, self._decode, config.limits)
        self._app = await build_server(config, orchestrator, self._health, self._stats)
        freeze_heap()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    def _memberships(self) -> dict[str, Membership]:
        pools = {"decode": self._decode.membership}
        if self._prefill is not None:
            pools["prefill"] = self._prefill.membership
        return pools

    def _health(self) -> dict[str, Any]:
        """Healthy, degraded (no prefill replica: decode prefills, slower) or unhealthy (nothing can decode)."""
        pools = self._memberships()
        status = "healthy" if all(pool.ids() for pool in pools.values()) else "degraded"
        endpoints = [
            {"status": "ready", **metadata["info"]} for pool in pools.values() for metadata in pool.metadata().values()
        ]
        return {
            "status": status if self._decode.replicas() else "unhealthy",
            "model": self._config.models[0].name,
            "pools": {role: {"ready": len(pool.ids())} for role, pool in pools.items()},
            "endpoints": endpoints,
        }

    async def _stats(self) -> dict[str, Any]:
        """Every ready replica's load, asked for now."""
        pools = self._memberships()
        asked = [(role, replica) for role, pool in pools.items() for replica in pool.ids()]
        answers = await asyncio.gather(*(self._ask(role, replica) for role, replica in asked))
        return {"replicas": answers}

    async def _ask(self, role: str, replica: str) -> dict[str, Any]:
        try:
            stats = await self._handles[role].stats.remote(replica_id=replica)
        except (BatonError, RayError, RayServeException) as error:
            return {"role": role, "replica_id": replica, "error": type(error).__name__}
        return {"role": role, "replica_id": replica, **msgspec.to_builtins(stats)}
