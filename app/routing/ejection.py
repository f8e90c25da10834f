"""Which replicas and pairs are left out of routing because what was sent there failed, and when they are tried again.

1. Outcomes of attempts are evidence.  What fails is ejected for a while, each time for longer (exponential back-off).
2. After that time it is half-open: one request at a time tries it.  A success restores it; a failure ejects it again.
3. When KV does not come from a prefill to a decode replica, nobody knows which of the two is at fault.  At first the
   pair is ejected.  An end of it is to blame once KV failed to move between it and NUM_PARTNERS others, without one
   success in between: that is what the failures have in common.  A healthy replica whose partners are healthy but for
   one is therefore never blamed.

The router takes an ejected replica if there is no other, but one of prefill only where decode cannot do its part.  A
frontend knows only of its own attempts.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Generic, Literal, TypeVar

from app.messages import Role

logger = logging.getLogger("baton.ejection")

FIRST_EJECTION_S = 5.0
LONGEST_EJECTION_S = 60.0
"""The first ejection takes FIRST_EJECTION_S seconds and each further one twice as long, up to LONGEST_EJECTION_S.  Who
then behaves for LONGEST_EJECTION_S seconds begins with the first again."""
STRONG, WEAK = 3, 1
"""What counts as evidence.  Strong is a replica that was lost, an engine that died, KV that did not come, a timeout.
Weak is what a healthy replica might bring about too: an engine's internal error for one request, or a client that gave
up after a long time without a token.  A healthy replica has successes in between."""
EJECTED_AT = 3
"""The evidence since the last success that ejects."""
NUM_PARTNERS = 2
REMEMBER_S = 300.0
"""How long failures count.  A pair is tried again at least every LONGEST_EJECTION_S seconds if there is traffic."""
MAX_REMEMBERED = 4096
"""How many replicas, pairs and failures are remembered; what changed least recently is forgotten first.  So many
replicas are remembered beside those that can be reached."""

Key = TypeVar("Key", bound=Hashable)
Pair = tuple[str, str]
"""A prefill and a decode replica."""
End = Role | Literal["pair"]
"""What is ejected: a replica of a pool, or a pair."""


class Circuit:
    """What lets requests to one replica or over one pair, or does not."""

    __slots__ = (
        "_name",
        "_num_ejections",
        "_on_ejection",
        "changed_at",
        "ejected_at",
        "evidence",
        "is_ejected",
        "is_tried",
        "until",
    )

    def __init__(self, name: str, on_ejection: Callable[[], object]) -> None:
        """`name` is for the log."""
        self._name = name
        self._on_ejection = on_ejection
        self.evidence = 0
        self.is_ejected = False
        self.is_tried = False
        """Whether a request tries it, half-open as it is."""
        self.ejected_at = self.until = self.changed_at = -math.inf
        self._num_ejections = 0

    def is_half_open(self, now: float) -> bool:
        return self.is_ejected and now >= self.until

    def is_closed_to_others(self, now: float) -> bool:
        """Whether a request that comes now is to go elsewhere."""
        return self.is_ejected and (now < self.until or self.is_tried)

    def fail(self, evidence: int, began_at: float, now: float) -> bool:
        """Take note of a failure of an attempt that began at `began_at`.  Returns whether it ejects.

        What began before the ejection, or under it for want of another replica, tells nothing new: fifty streams that
        fail at once are one failure.
        """
        if began_at < self.ejected_at or (self.is_ejected and now < self.until):
            return False
        self.evidence += evidence
        self.changed_at = now
        if self.evidence >= EJECTED_AT:
            self.eject(now)
        return self.is_ejected and now < self.until

    def eject(self, now: float) -> None:
        if now - self.until > LONGEST_EJECTION_S:
            self._num_ejections = 0
        seconds = min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2.0**self._num_ejections)
        self._num_ejections += 1
        self.is_ejected, self.ejected_at, self.until, self.changed_at = True, now, now + seconds, now
        logger.warning("%s is left out for %.0f s", self._name, seconds)
        self._on_ejection()

    def succeed(self, began_at: float) -> None:
        if began_at < self.ejected_at:
            return
        if self.is_ejected:
            logger.warning("%s is used again", self._name)
        self.is_ejected, self.evidence = False, 0


class Circuits(Generic[Key]):
    """Those of which something bad is known."""

    def __init__(self, clock: Callable[[], float], on_ejection: Callable[[Key], object]) -> None:
        self._clock = clock
        self._on_ejection = on_ejection
        self._circuits: OrderedDict[Key, Circuit] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._circuits)

    def is_closed_to_others(self, key: Key) -> bool:
        circuit = self._circuits.get(key)
        return circuit is not None and circuit.is_closed_to_others(self._clock())

    def is_ejected(self, key: Key) -> bool:
        circuit = self._circuits.get(key)
        return circuit is not None and circuit.is_ejected

    def ejected(self) -> dict[Key, float]:
        """Return what is left out, and for how many seconds more; 0 if requests may try it again, one at a time."""
        now = self._clock()
        return {key: max(0.0, each.until - now) for key, each in self._circuits.items() if each.is_ejected}

    def fail(self, key: Key, evidence: int, began_at: float) -> bool:
        return self._at_fault(key).fail(evidence, began_at, self._clock())

    def eject(self, key: Key, began_at: float) -> None:
        """Eject at once, unless the attempt began before the last ejection."""
        circuit, now = self._at_fault(key), self._clock()
        if began_at >= circuit.ejected_at and not (circuit.is_ejected and now < circuit.until):
            circuit.eject(now)

    def succeed(self, key: Key, began_at: float) -> None:
        if (circuit := self._circuits.get(key)) is not None:
            circuit.succeed(began_at)

    def forget(self, key: Key) -> None:
        self._circuits.pop(key, None)

    def _at_fault(self, key: Key) -> Circuit:
        while self._circuits and (
            len(self._circuits) >= MAX_REMEMBERED
            or next(iter(self._circuits.values())).changed_at < self._clock() - REMEMBER_S
        ):
            self._circuits.popitem(last=False)
        circuit = self._circuits.setdefault(key, Circuit(_name(key), partial(self._on_ejection, key)))
        self._circuits.move_to_end(key)
        return circuit

    @contextmanager
    def trying(self, key: Key) -> Iterator[None]:
        """Keep other requests away while the block runs, if `key` is half-open."""
        circuit = self._circuits.get(key)
        if circuit is None or circuit.is_tried or not circuit.is_half_open(self._clock()):
            yield
            return
        circuit.is_tried = True
        try:
            yield
        finally:
            circuit.is_tried = False


def _name(key: Hashable) -> str:
    return f"the pair prefill={key[0]} decode={key[1]}" if isinstance(key, tuple) else f"replica {key}"


class Ejections:
    """The replicas and pairs of one model that one frontend leaves out.

    Attempts are named by when they began, in seconds of `clock`: an attempt from before an ejection neither restores
    the replica nor ejects it for longer.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._replicas = Circuits[str](clock, lambda replica: self._count(self._roles[replica]))
        self._pairs = Circuits[Pair](clock, lambda _: self._count("pair"))
        self._roles: dict[str, Role] = {}
        """The roles of replicas in pools and of `_left`: most are ejected when they are gone."""
        self._left: OrderedDict[str, None] = OrderedDict()
        """Those in no pool any more, the latest last.  Some only cannot be reached for a moment."""
        self.counts: Counter[End] = Counter()
        """The ejections so far."""
        self._failed_with: OrderedDict[str, dict[str, float]] = OrderedDict()
        """For each replica the partners to or from which KV did not move since it last did, and when."""

    def joined(self, replica: str, role: Role) -> None:
        """Take note that a replica is in a pool, perhaps another one than before."""
        self._roles[replica] = role
        self._left.pop(replica, None)

    def left(self, replica: str) -> None:
        """Take note that a replica is in no pool any more."""
        self._left[replica] = None
        if len(self._left) > MAX_REMEMBERED:
            forgotten, _ = self._left.popitem(last=False)
            self._replicas.forget(forgotten)
            del self._roles[forgotten]

    def _count(self, end: End) -> None:
        self.counts[end] += 1

    def describe(self) -> list[dict[str, str | float]]:
        """Return what is left out now, and for how many seconds more (0: one request at a time tries it)."""
        replicas: list[dict[str, str | float]] = [
            {"replica": replica, "role": self._roles[replica], "left_out_s": round(seconds, 1)}
            for replica, seconds in self._replicas.ejected().items()
        ]
        pairs: list[dict[str, str | float]] = [
            {"prefill": prefill, "decode": decode, "left_out_s": round(seconds, 1)}
            for (prefill, decode), seconds in self._pairs.ejected().items()
        ]
        return replicas + pairs

    def is_ejected(self, replica: str) -> bool:
        """Whether a request that comes now is to go to another replica."""
        return self._replicas.is_closed_to_others(replica)

    def is_pair_ejected(self, prefill: str, decode: str) -> bool:
        """Whether KV is to move over another pair."""
        return bool(self._pairs) and self._pairs.is_closed_to_others((prefill, decode))

    def trying(self, prefill: str | None, serving: str) -> AbstractContextManager[object]:
        """Mark what is half-open as tried while a request runs there."""
        stack = ExitStack()
        if self._replicas or self._pairs:
            stack.enter_context(self._replicas.trying(serving))
            if prefill is not None:
                stack.enter_context(self._replicas.trying(prefill))
                stack.enter_context(self._pairs.trying((prefill, serving)))
        return stack

    def succeeded(self, replica: str, began_at: float) -> None:
        """Take note that a replica has computed.  This says nothing about whether it gets KV."""
        self._replicas.succeed(replica, began_at)

    def failed(self, replica: str, evidence: int, began_at: float) -> None:
        """Take note of a failure of which `replica` alone is the cause; nothing happens if it was forgotten."""
        if replica in self._roles:
            self._replicas.fail(replica, evidence, began_at)

    def pair_succeeded(self, prefill: str, decode: str, began_at: float) -> None:
        """Take note that KV has moved."""
        self._pairs.succeed((prefill, decode), began_at)
        for replica in (prefill, decode):
            self._replicas.succeed(replica, began_at)
            self._failed_with.pop(replica, None)

    def pair_failed(self, prefill: str, decode: str, evidence: int, began_at: float) -> None:
        """Take note of a failure of which either end may be the cause.  One that is known to be bad explains it."""
        if not self._pairs.fail((prefill, decode), evidence, began_at):
            return
        is_known = {replica: self._replicas.is_ejected(replica) for replica in (prefill, decode)}
        for replica, partner in ((prefill, decode), (decode, prefill)):
            if replica not in self._roles or (is_known[partner] and not is_known[replica]):
                continue
            if is_known[replica] or self._count_partner(replica, partner) >= NUM_PARTNERS:
                self._replicas.eject(replica, began_at)
                self._acquit_partners(replica)

    def _count_partner(self, replica: str, partner: str) -> int:
        """Return with how many others `replica` has failed, `partner` included."""
        now = self._clock()
        others = self._failed_with.setdefault(replica, {})
        self._failed_with.move_to_end(replica)
        others[partner] = now
        for other in [other for other, at in others.items() if at < now - REMEMBER_S]:
            del others[other]
        if len(self._failed_with) > MAX_REMEMBERED:
            self._failed_with.popitem(last=False)
        return len(others)

    def _acquit_partners(self, replica: str) -> None:
        """The failures with `replica` speak against none of its partners any more."""
        for partner in self._failed_with.get(replica, ()):
            self._failed_with.get(partner, {}).pop(replica, None)
