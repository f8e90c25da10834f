"""Serve's hook for choosing a replica, reduced to calling the one that the caller has chosen."""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter

from app.errors import ReplicaLost
from deployments.frontend.ready_replicas import ready_replicas_of


class PoolRequestRouter(RequestRouter):
    """Sends a call to the replica named by its ``replica_id`` argument: the caller has chosen already."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._ready = ready_replicas_of(self._deployment_id)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        # Replaces Serve's queue of requests that wait for any replica with room: here there is one or none.
        replica_id = pending_request.kwargs["replica_id"]
        replica = self._ready.find(replica_id)
        if replica is None:
            raise ReplicaLost(replica_id)
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        raise RuntimeError("Serve no longer asks _choose_replica_for_request first; see PoolRequestRouter")

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._ready.update(replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._ready.update(list(self.curr_replicas.values()))
