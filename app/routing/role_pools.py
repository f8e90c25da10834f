"""The pools of one model by role.  A replica is in the pool of its role, and when it changes that, it changes the pool.

Nothing of it is lost on the way: what it has reported, what of this frontend's own counts there, and what it has cached
go along.  The sequences that it has go on there.  Those on a replica that prefills now count as sequences do that a
prefill replica serves whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from app.messages import GenerateRequest, KvUpdate, Link, ReplicaInfo, ReplicaLoad, Role
from app.routing.pool_state import PoolState, ReplicaState


class RolePools:
    """Takes what replicas tell of themselves, and gives it to the pool in which each is."""

    def __init__(self, pools: Mapping[Role, PoolState]) -> None:
        self._pools = pools
        self.num_switched = dict.fromkeys(pools, 0)
        """How many replicas have come to each role from another one so far."""

    def __getitem__(self, role: Role) -> PoolState:
        return self._pools[role]

    def pool_of(self, replica: str) -> PoolState | None:
        return next((pool for pool in self._pools.values() if replica in pool.replicas), None)

    def find(self, replica: str) -> ReplicaState | None:
        """Return a replica, whatever its role; None if it cannot be reached."""
        pool = self.pool_of(replica)
        return pool.replicas[replica] if pool is not None else None

    def role_of(self, replica: str, home: Role) -> Role:
        """Return the role of a replica; `home`, its deployment's, if it cannot be reached."""
        state = self.find(replica)
        return state.info.role if state is not None else home

    def join(self, info: ReplicaInfo) -> None:
        self._pools[info.role].join(info)

    def leave(self, replica: str) -> None:
        if (pool := self.pool_of(replica)) is not None:
            pool.leave(replica)

    def on_role(self, replica: str, role: Role) -> None:
        before, after = self.pool_of(replica), self._pools.get(role)
        if before is not None and after is not None and before is not after:
            after.take(before.give(replica), role)
            self.num_switched[role] += 1

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        if (pool := self.pool_of(replica)) is not None:
            pool.on_load(replica, load)

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        if (pool := self.pool_of(replica)) is not None:
            pool.on_kv(replica, update)

    def on_links(self, replica: str, links: list[Link]) -> None:
        if (pool := self.pool_of(replica)) is not None:
            pool.on_links(replica, links)

    def assume(self, replica: str, request: GenerateRequest) -> None:
        if (pool := self.pool_of(replica)) is not None:
            pool.assume(replica, request)
