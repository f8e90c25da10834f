"""The policies that are compared: the production router, and what others do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from random import Random
from typing import Protocol

import msgspec

from app.config import RoutingConfig, SloConfig
from app.errors import Overloaded
from app.frontend.orchestrator import MAX_TTFT_OF_SLO
from app.messages import GenerateRequest, PrefillMode, PrefillReport, Role
from app.routing.decision import Decision, RoutingHints
from app.routing.in_flight import InFlight
from app.routing.pool_state import PoolState
from app.routing.router import NO_HINTS, Router
from app.routing.waiting_line import WaitingLine
from benchmarks.routing.timeline import Timeline


class FleetAssignment(msgspec.Struct, frozen=True):
    """Where one request goes, and the functions to call as it progresses."""

    prefill: str | None
    """None if the prompt is computed where the request is decoded."""
    decode: str
    """The replica that decodes: one of the decode pool or, if `prefill` is None, of any pool."""
    first_token: Callable[[PrefillReport], None]
    end: Callable[[], None]
    pulled: Callable[[int, float], object] = lambda num_tokens, seconds: None
    """Called with the tokens whose KV was pulled, and the seconds that it took."""
    reason: str = ""
    expected_cached_tokens: int = 0
    """The cached tokens that the router expects on the replica that computes the prompt."""
    predicted_ttft_s: float | None = None
    level: int = 0
    """The priority of the prompt in a prefill engine's queue."""
    choose_decode: Callable[[], str] | None = None
    """If there is one, it is called when prefill has ended, and returns what replaces `decode`."""


Start = Callable[[FleetAssignment], None]
"""Sends a request to the replicas of an assignment."""
Refuse = Callable[[], None]
"""Answers a request with 429."""


class Policy(Protocol):
    """Chooses the replicas of requests: what one frontend does."""

    pools: Mapping[Role, PoolState]
    """Replicas report their load and caches to these; empty if the policy knows only what it placed."""

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        """Choose the replicas of `request` and call `start`, now or when there is room, or else `refuse`."""


class RoundRobin:
    """Takes each pool's replicas in turn."""

    pools: Mapping[Role, PoolState] = {}

    def __init__(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        self._prefill = prefill
        self._decode = decode
        self._turns = count()

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        turn = next(self._turns)
        prefill, decode = (pool[turn % len(pool)] for pool in (self._prefill, self._decode))
        start(FleetAssignment(prefill, decode, first_token=lambda report: None, end=lambda: None))


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

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        prefill, decode = self._choose(self._prefill), self._choose(self._decode)
        self._queues.update((prefill, decode))
        start(
            FleetAssignment(
                prefill,
                decode,
                first_token=lambda report: self._queues.subtract((prefill,)),
                end=lambda: self._queues.subtract((decode,)),
            )
        )

    def _choose(self, pool: Sequence[str]) -> str:
        return min(self._random.sample(pool, min(2, len(pool))), key=self._queues.__getitem__)


class Baton:
    """The production router, and the line of those for which it finds no room."""

    def __init__(
        self,
        config: RoutingConfig,
        slo: SloConfig,
        timeline: Timeline,
        *,
        has_prefill: bool = True,
        prefill_mode: PrefillMode = "auto",
        max_ttft_s: float | None = None,
        hints_of: Callable[[GenerateRequest], RoutingHints] = lambda request: NO_HINTS,
    ) -> None:
        """Without `has_prefill` the decode pool serves alone.  All requests ask for `prefill_mode`.

        `max_ttft_s` is ``limits.max_ttft_ms``.
        """
        self._timeline = timeline
        self._prefill_mode = prefill_mode
        self._hints_of = hints_of
        self._router = Router(config, slo, has_prefill=has_prefill, clock=lambda: timeline.now)
        self.pools: Mapping[Role, PoolState] = self._router.pools
        longest_s = MAX_TTFT_OF_SLO * slo.ttft_ms / 1e3 if max_ttft_s is None else max_ttft_s
        self._line = WaitingLine(self._router, longest_s, timeline.after)

    @property
    def line(self) -> WaitingLine:
        return self._line

    def on_role(self, replica: str, role: Role) -> None:
        """Take what a replica does from now on."""
        self._router.by_role.on_role(replica, role)

    def arrive(self, request: GenerateRequest, start: Start, refuse: Refuse) -> None:
        request = msgspec.structs.replace(request, prefill_mode=self._prefill_mode)
        hints = self._hints_of(request)

        def on_turn(decision: Decision, in_flight: InFlight) -> None:
            start(self._assign(request, hints, decision, in_flight))

        try:
            self._line.join(request, hints, (), self._timeline.now, on_turn, lambda error: refuse())
        except Overloaded:
            refuse()

    def _assign(
        self, request: GenerateRequest, hints: RoutingHints, decision: Decision, in_flight: InFlight
    ) -> FleetAssignment:
        begun_at, prefill = self._timeline.now, decision.prefill

        def first_token(report: PrefillReport) -> None:
            in_flight.first_token(report, self._timeline.now - begun_at)
            self._line.on_news()

        def end() -> None:
            in_flight.end()
            self._line.on_news()

        def choose_decode() -> str:
            in_flight.choose_again(lambda: self._router.receiver(request, hints, (), decision))
            return in_flight.serving.replica

        return FleetAssignment(
            prefill=prefill.replica if prefill else None,
            decode=decision.serving.replica,
            first_token=first_token,
            end=end,
            pulled=in_flight.pulled,
            reason=f"{decision.kind} {decision.reason}",
            expected_cached_tokens=(prefill or decision.serving).cached_tokens,
            predicted_ttft_s=decision.predicted_ttft_s + decision.waited_s,
            choose_decode=choose_decode if prefill else None,
            level=self._line.level(hints),
        )
