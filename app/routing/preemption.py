"""Which flex sequences give way to a request of a higher class that waits for room to decode.

1. The replica is the one that the router would choose if none of them ran.  If the request had to wait even then, as
   for its prompt to be computed, none gives way.
2. There as few as make room give way, and of those such that hold few tokens: that is what resuming them costs.  Of
   equals the newest gives way.
3. The request takes their place in the same turn of the event loop, before anybody else can.  They wait in the line of
   their class (app/routing/waiting_line.py) and go on later with the tokens that they have.

Only sequences of this frontend are known.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import msgspec

from app.routing.decision import SERVICE_CLASSES, Decision, Wait
from app.routing.in_flight import InFlight
from app.routing.router import Router

PREEMPTED = SERVICE_CLASSES[-1]
"""The class whose sequences give way to all others."""
MAX_PREEMPTIONS = 3
"""How often one sequence gives way.  Each time costs it the computation of all its tokens, so that it is computed four
times at most; and one that would always have to give way, as the load goes up and down, comes to its end."""
SETTLE_S = 0.02
"""How long no other sequence gives way at a replica.  Its news are at most 10 ms old, and it hears of the last one's
end after some 3 ms more: until then it may count that one still, and one too many would give way."""

AnyItem = TypeVar("AnyItem")


class Running(msgspec.Struct, eq=False):
    """A sequence that runs and may give way."""

    in_flight: InFlight
    output_tokens: Callable[[], int | None]
    """Returns how many tokens this attempt has generated, or None if the sequence must not give way now."""
    give_way: Callable[[], object]
    """Lets its replica go, and has it wait in the line.  Nothing is awaited until it no longer gets tokens."""


class Held(msgspec.Struct, frozen=True):
    """What one that may give way holds."""

    running: Running
    num_tokens: int
    """Those that no other request is known to share."""

    @property
    def replica(self) -> str:
        return self.running.in_flight.serving.replica


class Preemption:
    """The sequences of one model in one frontend that may give way."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._running: set[Running] = set()
        self._settles_at: dict[str, float] = {}
        """When others may give way again, by replicas at which some have lately."""

    @contextmanager
    def of(self, running: Running) -> Iterator[None]:
        """Let a sequence give way while the block runs."""
        self._running.add(running)
        try:
            yield
        finally:
            self._running.discard(running)

    def candidates(self) -> list[Held]:
        """Return those that may give way now, by what they hold, the least first."""
        now, found = self._router.clock(), []
        for running in self._running:
            in_flight = running.in_flight
            if self._settles_at.get(in_flight.serving.replica, now) > now:
                continue
            if (num_output := running.output_tokens()) is not None:
                found.append(Held(running, in_flight.num_tokens - in_flight.serving.cached_tokens + num_output))
        return sorted(found, key=lambda one: (one.num_tokens, -one.running.in_flight.began_at))

    def plan(
        self, candidates: Sequence[Held], num_tokens: int, decide: Callable[[], Decision | Wait]
    ) -> tuple[Decision, list[Running]] | None:
        """Return the decision for a request that has to wait if others give way, and who; None if that is no use.

        The request's prompt has `num_tokens` tokens, and `decide` asks the router for its decision.
        """
        with self._without(candidates):
            wished = decide()
        if isinstance(wished, Wait):
            return None
        replica, cached = wished.serving.replica, wished.serving.cached_tokens
        state = self._router.by_role.find(replica)
        assert state is not None

        def make_room(few: Sequence[Held]) -> bool:
            with self._without(few):
                return self._router.capacity.has_decode_room(state, num_tokens, cached)

        victims = fewest([one for one in candidates if one.replica == replica], make_room)
        with self._without(victims):
            decision = decide()
        if isinstance(decision, Wait) or decision.serving.replica != replica:
            return None
        return decision, [one.running for one in victims]

    def preempt(self, victims: Sequence[Running]) -> None:
        """Have sequences give way.  From now on they count on no replica."""
        now = self._router.clock()
        self._settles_at = {replica: at for replica, at in self._settles_at.items() if at > now}
        for running in victims:
            self._settles_at[running.in_flight.serving.replica] = now + SETTLE_S
            self._running.discard(running)
            running.in_flight.end()
            running.give_way()

    @contextmanager
    def _without(self, held: Sequence[Held]) -> Iterator[None]:
        """See the replicas as if these sequences had ended, while the block runs."""
        there: dict[str, list[int]] = {}
        for one in held:
            there.setdefault(one.replica, []).append(one.num_tokens)
        with ExitStack() as stack:
            for replica, tokens in there.items():
                if (state := self._router.by_role.find(replica)) is None:
                    continue
                stack.enter_context(state.sequences.counting(-len(tokens)))
                stack.enter_context(state.decoding.counting(-len(tokens)))
                stack.enter_context(state.used_blocks.counting(-sum(map(state.num_blocks, tokens))))
                stack.enter_context(state.kv_tokens.counting(-sum(tokens)))
            yield


def fewest(by_size: Sequence[AnyItem], make_room: Callable[[Sequence[AnyItem]], bool]) -> Sequence[AnyItem]:
    """Return as few items as make room, and of those the first in the order of their sizes; none if all do not.

    The larger an item is, the more room it makes.
    """
    number = 1 + bisect_left(range(1, len(by_size) + 1), True, key=lambda n: make_room(by_size[-n:]))
    if number > len(by_size):
        return []
    # Of the sets of so many neighbours the last one makes room, and so do all after the first that does.
    first = bisect_left(range(len(by_size) - number), True, key=lambda n: make_room(by_size[n : n + number]))
    return by_size[first : first + number]
