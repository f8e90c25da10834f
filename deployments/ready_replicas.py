"""The ready replicas of a pool, as this process knows them.

Serve's long poll tells every handle of a deployment which replicas run; `PoolRequestRouter` writes that here, and
frontends and decode replicas read it.  This is a module of its own because Serve copies a router's module by value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.serve_hooks import DeploymentID, RunningReplica


class ReadyReplicas:
    """The ready replicas of one deployment, as this process knows them.

    Serve's router may run on another thread than the code that reads this, so each update replaces `_replicas`.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, RunningReplica] = {}
        self.on_change: Callable[[], object] | None = None

    def ids(self) -> list[str]:
        return list(self._replicas)

    def find(self, replica_id: str) -> RunningReplica | None:
        return self._replicas.get(replica_id)

    def metadata(self) -> dict[str, dict[str, Any]]:
        """Return by replica id what each replica recorded about itself when it became ready."""
        return {replica_id: replica.replica_metadata for replica_id, replica in self._replicas.items()}

    def update(self, replicas: list[RunningReplica]) -> None:
        self._replicas = {replica.replica_id.unique_id: replica for replica in replicas}
        if self.on_change is not None:
            self.on_change()


_ready: dict[DeploymentID, ReadyReplicas] = {}


def ready_replicas_of(deployment_id: DeploymentID) -> ReadyReplicas:
    """Return the ready replicas of a deployment; there are none until a handle to it is first used."""
    return _ready.setdefault(deployment_id, ReadyReplicas())
