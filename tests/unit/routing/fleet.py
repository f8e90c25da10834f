"""A router with its pools, in a time that only tests move."""

from __future__ import annotations

from collections.abc import Collection
from heapq import heappop, heappush
from itertools import count
from typing import Any

from app.config import RoutingConfig, SloConfig
from app.messages import KvUpdate, Link, PrefillReport, ReplicaLoad, Role
from app.pace import Pace
from app.routing.decision import Decision, RoutingHints, Wait
from app.routing.router import NO_HINTS, Router
from tests.unit.routing.samples import hashes, replica_info, request

REMOTE: dict[str, Any] = {"placement": {"policy": "remote"}}

PACE = Pace(
    prefill_base_s=0.01,
    prefill_s_per_token=1e-4,
    step_base_s=0.005,
    step_s_per_sequence=5e-4,
    step_s_per_kv_token=1e-7,
)
"""10,000 prompt tokens/s.  With the default `slo` of 50 ms between tokens it bounds a batch to some 80 sequences."""


class Timers:
    """A clock, and functions that are called at its times."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._calls: list[tuple[float, int, Any]] = []
        self._numbers = count()

    def __call__(self) -> float:
        return self.now

    def later(self, seconds: float, call: Any) -> None:
        heappush(self._calls, (self.now + seconds, next(self._numbers), call))

    @property
    def num_pending(self) -> int:
        return len(self._calls)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self._calls and self._calls[0][0] <= until:
            self.now, _, call = heappop(self._calls)
            call()
        self.now = until


class Fleet:
    """A router and its pools.  `info` are fields of all replicas' `ReplicaInfo`, and `slo` those of the SloConfig."""

    def __init__(
        self,
        num_prefill: int = 0,
        num_decode: int = 1,
        num_aggregated: int | None = None,
        *,
        has_prefill: bool = True,
        can_decode_prefill: bool = True,
        can_prefill_decode: bool | None = None,
        info: dict[str, Any] | None = None,
        slo: dict[str, float] | None = None,
        clock: Timers | None = None,
        **routing: Any,
    ) -> None:
        """`num_prefill` 0 is a pool without a replica, None no pool; the same for `num_aggregated`."""
        self.clock = clock or Timers()
        self.info = info or {}
        self.router = Router(
            RoutingConfig.model_validate(routing),
            SloConfig.model_validate(slo or {}),
            has_prefill=has_prefill,
            has_aggregated=num_aggregated is not None,
            can_decode_prefill=can_decode_prefill,
            can_prefill_decode=can_decode_prefill if can_prefill_decode is None else can_prefill_decode,
            clock=self.clock,
        )
        counts: dict[Role, int] = {"prefill": num_prefill, "decode": num_decode, "aggregated": num_aggregated or 0}
        for role, num_replicas in counts.items():
            for number in range(num_replicas):
                self.join(role, f"{role[0]}{number}")

    def join(self, role: Role, replica: str, **info: Any) -> None:
        self.router.pools[role].join(replica_info(replica, role, **{**self.info, **info}))

    def cache(self, role: Any, replica: str, num_tokens: int, start: int = 0, salt: str | None = None) -> None:
        self.router.pools[role].on_kv(replica, KvUpdate(hashes(num_tokens, start, salt), []))

    def load(
        self, role: Any, replica: str, sequences: int = 1, queued_tokens: int = 0, used_blocks: int = 0, **load: Any
    ) -> None:
        """Have a replica report its load; the times of what waits there follow from its pace."""
        pool = self.router.pools[role]
        times = {"queued_s": pool.replicas[replica].pace.compute_s(queued_tokens)}
        pool.on_load(replica, ReplicaLoad(sequences, queued_tokens, used_blocks, **{**times, **load}))

    def link(self, decode: str, **problems: str) -> None:
        """Have a decode replica tell of all its links, by prefill replica and with their problems."""
        links = [Link(prefill, problem=problem) for prefill, problem in problems.items()]
        self.router.pools["decode"].on_links(decode, links)

    def choose(
        self,
        num_tokens: int = 160,
        *,
        hints: RoutingHints = NO_HINTS,
        lost: Collection[str] = (),
        waited_s: float = 0.0,
        waiting_tokens: int = 0,
        **fields: Any,
    ) -> Decision | Wait:
        asked = request(num_tokens, **fields)
        return self.router.decide(asked, hints, lost, waited_s=waited_s, waiting_tokens=waiting_tokens)

    def decide(self, num_tokens: int = 160, **options: Any) -> Decision:
        """A decision for a request that need not wait."""
        decision = self.choose(num_tokens, **options)
        assert isinstance(decision, Decision)
        return decision

    def lacks(self, num_tokens: int = 160, **options: Any) -> str:
        """What a request that has to wait waits for."""
        wait = self.choose(num_tokens, **options)
        assert isinstance(wait, Wait)
        return wait.lacks

    def serve(self, decision: Decision, num_tokens: int, seconds: float, *, prefill_s: float | None = None) -> None:
        """Serve a request that was decided so, whose first token took `seconds`."""
        in_flight = self.router.begin(request(num_tokens), decision)
        self.clock.advance(seconds)
        moved = num_tokens if decision.kind == "remote" else 0
        cached = 0 if prefill_s is not None else None
        report = PrefillReport(decision.kind, "", None, "d0", 0, moved, "", prefill_s, prefill_cached_tokens=cached)
        in_flight.first_token(report, seconds)
        in_flight.end()


def where(decision: Decision) -> tuple[str, str]:
    return decision.kind, decision.reason
