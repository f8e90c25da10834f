"""One model as a frontend serves it: its pools, the order in which they are called, and how they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app.config import LimitsConfig, ModelConfig
from app.engines.base import Role
from app.engines.registry import can_decode_prefill
from app.errors import BatonError
from app.health import model_state
from app.orchestrator import Orchestrator
from deployments.membership import Membership
from deployments.pools import RayDecodePool, RayPrefillPool


class ServedModel:
    """`handles` are the Serve handles of the model's pools."""

    def __init__(self, model: ModelConfig, handles: Mapping[Role, Any], limits: LimitsConfig) -> None:
        self._model = model
        self._handles = handles
        self.decode = RayDecodePool(handles["decode"])
        self.prefill = RayPrefillPool(handles["prefill"]) if model.is_disaggregated else None
        self.orchestrator = Orchestrator(
            self.prefill, self.decode, limits, can_decode_prefill=can_decode_prefill(model.engine)
        )

    def health(self) -> dict[str, Any]:
        """What /health says of the model; /v1/models takes it from here."""
        pools = self._memberships()
        reachable: dict[Role, int] = {role: len(pool.ids()) for role, pool in pools.items()}
        reachable["decode"] = len(self.decode.replicas())
        return {
            "name": self._model.name,
            "engine": self._model.engine,
            "mode": "disaggregated" if self._model.is_disaggregated else "aggregated",
            "state": model_state(self._model, reachable),
            "pools": {role: {"ready": len(pool.ids())} for role, pool in pools.items()},
        }

    def endpoints(self) -> list[dict[str, Any]]:
        """What each ready replica told of itself."""
        return [
            {"status": "ready", **metadata["info"]}
            for pool in self._memberships().values()
            for metadata in pool.metadata().values()
        ]

    async def stats(self) -> list[dict[str, Any]]:
        """Every ready replica's load, asked for now."""
        asked = [(role, replica) for role, pool in self._memberships().items() for replica in pool.ids()]
        return await asyncio.gather(*(self._ask(role, replica) for role, replica in asked))

    async def _ask(self, role: Role, replica: str) -> dict[str, Any]:
        about = {"model": self._model.name, "role": role, "replica_id": replica}
        try:
            stats = await self._handles[role].stats.remote(replica_id=replica)
        except (BatonError, RayError, RayServeException) as error:
            return {**about, "error": type(error).__name__}
        return {**about, **msgspec.to_builtins(stats)}

    def _memberships(self) -> dict[Role, Membership]:
        pools: dict[Role, Membership] = {"decode": self.decode.membership}
        if self.prefill is not None:
            pools["prefill"] = self.prefill.membership
        return pools
