"""The policies that are compared: the production router, and what others do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from typing import Protocol

import msgspec

from app.config import RoutingConfig
from app.messages import GenerateRequest, PrefillReport, Role
from app.routing.pool_state import PoolState
from app.routing.router import Router


class FleetAssignment(msgspec.Struct, frozen=True):
    """Where one request goes, and the functions to call as it progresses."""

    prefill: str | None
    """None if decode prefills."""
    decode: str
    first_token: Callable[[PrefillReport], None]
    end: Callable[[], None]
    reason: str = ""
    expected_cached_tokens: int = 0
    """The cached tokens that the router expects on the replica that computes the prompt."""
    predicted_ttft_s: float | None = None


class Policy(Protocol):
    """Chooses the replicas of requests."""

    pools: Mapping[Role, PoolState]
    """Replicas report their load and caches to these; empty if the policy knows only what it placed."""

    def place(self, request: GenerateRequest) -> FleetAssignment:
        """Choose the replicas of `request`.  Raises Overloaded."""


class RoundRobin:
    """Takes each pool's replicas in turn."""

    pools: Mapping[Role, PoolState] = {}

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        self._prefill = prefill
        self._decode = decode
        self._turns = count()

    def place(self, request: GenerateRequest) -> FleetAssignment:
        turn = next(self._turns)
        prefill, decode = (pool[turn % len(pool)] for pool in (self._prefill, self._decode))
        return FleetAssignment(prefill, decode, first_token=lambda report: None, end=lambda: None)


class PowerOfTwo:
    """Draws two replicas of each pool at random, and takes the one with the shorter queue of requests.

    A queue has exactly the requests that were placed and have not ended or, on prefill, have no first token yet.  A
    router in one of several frontends does not know this so well.
    """

    pools: Mapping[Role, PoolState] = {}

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], seed: int) -> None:
        self._prefill = prefill
        self._decode = decode
        self._random = Random(seed)
        self._queues: Counter[str] = Counter()

    def place(self, request: GenerateRequest) -> FleetAssignment:
        prefill, decode = self._choose(self._prefill), self._choose(self._decode)
        self._queues.update((prefill, decode))
        return FleetAssignment(
            prefill,
            decode,
            first_token=lambda report: self._queues.subtract((prefill,)),
            end=lambda: self._queues.subtract((decode,)),
        )

    def _choose(self, pool: Sequence[str]) -> str:
        return min(self._random.sample(pool, min(2, len(pool))), key=self._queues.__getitem__)


class Baton:
    """The production router."""

    def __init__(self, config: RoutingConfig, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._router = Router(config, has_prefill=True, can_decode_prefill=True, has_aggregated=False, clock=clock)
        self.pools: Mapping[Role, PoolState] = self._router.pools

    def place(self, request: GenerateRequest) -> FleetAssignment:
        decision = self._router.decide(request)
        begun_at, in_flight = self._clock(), self._router.begin(request, decision)
        prefill = decision.prefill if decision.kind == "remote" else None
        return FleetAssignment(
            prefill=prefill.replica if prefill else None,
            decode=decision.serving.replica,
            first_token=lambda report: in_flight.first_token(report, self._clock() - begun_at),
            end=in_flight.end,
            reason=f"{decision.kind} {decision.reason}",
            expected_cached_tokens=(prefill or decision.serving).cached_tokens,
            predicted_ttft_s=decision.predicted_ttft_s,
        )
