"""What the router of one model knows, and its settings."""

from __future__ import annotations

import time
from collections.abc import Callable

from app.config import RoutingConfig, SloConfig
from app.messages import Role
from app.routing.capacity import Capacity
from app.routing.ejection import Ejections
from app.routing.pool_state import PoolState
from app.routing.prefix_index import PrefixIndex
from app.routing.role_pools import RolePools
from app.routing.scores import weights_of
from app.routing.times import TimePredictor
from app.routing.topology import Topology


class RouterState:
    """The pools as this frontend sees them, and what it has learnt of their speed."""

    def __init__(
        self,
        config: RoutingConfig,
        slo: SloConfig,
        *,
        has_prefill: bool,
        has_aggregated: bool = False,
        can_decode_prefill: bool = True,
        can_prefill_decode: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`can_decode_prefill` says whether an engine that decodes for a prefill pool can prefill as well, and
        `can_prefill_decode` whether one of a prefill pool can decode.
        """
        self.config = config
        self.slo = slo
        self.clock = clock
        self.has_prefill = has_prefill
        self.can_prefill_decode = has_prefill and can_prefill_decode
        can_serve_whole: dict[Role, bool] = {
            "aggregated": has_aggregated,
            "decode": can_decode_prefill or not has_prefill,
            "prefill": self.can_prefill_decode,
        }
        self.whole_roles = [role for role, can in can_serve_whole.items() if can]
        """The pools whose replicas can serve a sequence whole, the preferred one first."""
        self.predictor = TimePredictor()
        self.capacity = Capacity(slo.itl_ms / 1e3)
        self.topology = Topology()
        self.index = PrefixIndex()
        self.ejections = Ejections(clock)
        roles: dict[Role, bool] = {"prefill": has_prefill, "decode": True, "aggregated": has_aggregated}
        self.pools = {role: PoolState(self.index, self.ejections) for role, is_there in roles.items() if is_there}
        self.by_role = RolePools(self.pools)
        decode_weights = weights_of(config.decode_weights)
        self.weights: dict[Role, tuple[float, ...]] = {
            "prefill": weights_of(config.prefill_weights),
            "decode": decode_weights,
            "aggregated": decode_weights,
        }

    def on_change(self, call: Callable[[], object]) -> None:
        """Have `call` called when a replica has come or has told something of itself."""
        for pool in self.pools.values():
            pool.on_change = call

    def on_join(self, call: Callable[[], object]) -> None:
        """Have `call` called when a replica has come."""
        for pool in self.pools.values():
            pool.on_join = call

    def on_end(self, call: Callable[[str, str | None], object]) -> None:
        """Have `call` called with each replica that ends, as `PoolState.on_end` says."""
        for pool in self.pools.values():
            pool.on_end = call

    def has_usable_link(self) -> bool:
        """Return whether any decode replica can get KV from any prefill replica."""
        decode, prefill = self.pools["decode"].replicas.values(), self.pools["prefill"].replicas
        return any(state.can_get_kv_from(replica) for state in decode for replica in prefill)

    def local_role(self) -> Role | None:
        """Return the pool that prefills locally: the first that has a replica of those that can; None if none can."""
        with_replicas = (role for role in self.whole_roles if self.pools[role].replicas)
        return next(with_replicas, "decode" if "decode" in self.whole_roles else None)
