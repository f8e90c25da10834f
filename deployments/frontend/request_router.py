"""Serve's hook for choosing a replica.  Here it only finds the replica that the caller has chosen."""

from __future__ import annotations

from typing import Any

from app.errors import ReplicaLost
from deployments.ready_replicas import ready_replicas_of
from deployments.serve_hooks import ChosenReplicaRouter, RunningReplica


class PoolRequestRouter(ChosenReplicaRouter):
    """Tells this process which replicas are ready, and sends each call to the replica that the call names."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._ready = ready_replicas_of(self.deployment_id)

    def find_replica(self, replica_id: str) -> RunningReplica:
        replica = self._ready.find(replica_id)
        if replica is None:
            raise ReplicaLost(replica_id)
        return replica

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._ready.update(replicas)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self._ready.update(list(self.curr_replicas.values()))
