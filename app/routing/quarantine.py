"""Prompts under which engines died.  After two deaths a prompt is refused, as it would end one engine after the other.

One death is no evidence: an engine that dies under fifty sequences makes fifty suspects, and all but one of them, if
any, are innocent.  The deaths of two different engines under the same prompt are, and its success clears it.  But if
other prompts waited for their first token at both engines, all of them are suspects twice, and engines may have been
ended for something else.  Then a prompt is on trial: it is tried once more, one such prompt at a time, and refused only
if a third engine dies.

A replica tells why its engine died.  If only its connection broke, that is a death once Serve has removed the replica
too.  Such replicas may have been lost for one reason that has nothing to do with the prompt, as a node or a switch
fails; those of one node, or that were lost at about the same time, are one death.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from app.errors import Quarantined
from app.messages import GenerateRequest

MAX_DEATHS = 2
MAX_DEATHS_IN_COMPANY = 3
"""The deaths after which a prompt is refused that was never the only one without a token."""
REMEMBER_S = 600.0
"""How long a death counts against a prompt, and how long a prompt is refused since the last one.  It may be served
again after a change of the engines' version or configuration, which takes some minutes too."""
GONE_WITHIN_S = 60.0
"""A replica that failed a prompt and ends so soon afterwards has died of it.  Serve removes a replica after three
health checks."""
TOGETHER_S = 5.0
"""Replicas that were lost within so short a time may have been lost for one reason."""
MAX_SUSPECTS = 4096
"""How many prompts are remembered; the one without a failure for the longest time is forgotten first."""

_ENCODER = msgspec.msgpack.Encoder()


class Suspect:
    """A prompt that may be poison."""

    __slots__ = ("at", "died", "failed", "gone", "was_alone")

    def __init__(self) -> None:
        self.died: set[str] = set()
        """The replicas whose engines died under it."""
        self.was_alone = False
        """Whether it was the only one without a token at one of the replicas that died."""
        self.failed: dict[str, tuple[float, bool]] = {}
        """When which others failed it, and whether it was alone there.  It is not known whether their engines live."""
        self.gone: list[tuple[str, float]] = []
        """The nodes of those of them that Serve has removed, and when they failed it; one for each cause."""
        self.at = 0.0
        """When that was last."""

    @property
    def num_deaths(self) -> int:
        return len(self.died) + len(self.gone)

    @property
    def is_quarantined(self) -> bool:
        return self.num_deaths >= (MAX_DEATHS if self.was_alone else MAX_DEATHS_IN_COMPANY)

    @property
    def is_on_trial(self) -> bool:
        return self.num_deaths >= MAX_DEATHS and not self.is_quarantined

    def take_gone(self, node: str, failed_at: float) -> None:
        if all(node != other and abs(failed_at - at) > TOGETHER_S for other, at in self.gone):
            self.gone.append((node, failed_at))


class Quarantine:
    """The suspects of one model in one frontend."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._suspects: OrderedDict[bytes, Suspect] = OrderedDict()
        self._num_exposed = Counter[str]()
        """How many sequences each replica has that no engine has computed a token of."""
        self.num_quarantines = 0
        """How many prompts have been quarantined so far."""

    def check(self, request: GenerateRequest) -> None:
        """Raise Quarantined if too many engines died of this request's prompt and sampling parameters."""
        self._forget_old()
        suspect = self._known(request)
        if suspect is not None and suspect.is_quarantined:
            raise Quarantined(suspect.num_deaths, math.ceil(suspect.at + REMEMBER_S - self._clock()))

    def is_on_trial(self, request: GenerateRequest) -> bool:
        """Whether this request may be tried once more, but not together with another of which that is true."""
        return (suspect := self._known(request)) is not None and suspect.is_on_trial

    def _known(self, request: GenerateRequest) -> Suspect | None:
        return self._suspects.get(_key(request)) if self._suspects else None  # mostly there are none: nothing is hashed

    @contextmanager
    def exposing(self, *replicas: str) -> Iterator[None]:
        """Count a sequence that may end the engines of `replicas`, while the block runs."""
        self._num_exposed.update(replicas)
        try:
            yield
        finally:
            for replica in replicas:
                self._num_exposed[replica] -= 1
                if not self._num_exposed[replica]:
                    del self._num_exposed[replica]

    @property
    def num_quarantined(self) -> int:
        """How many prompts are refused now."""
        self._forget_old()
        return sum(suspect.is_quarantined for suspect in self._suspects.values())

    def on_death(self, request: GenerateRequest, replica: str) -> None:
        """Take note of an engine that died while the request was on it and had no token."""
        suspect = self._suspect(request)
        with self._counting(suspect):
            suspect.was_alone |= self._was_alone_at(replica, suspect)
            suspect.died.add(replica)

    def on_failure(self, request: GenerateRequest, replica: str) -> None:
        """Take note of a replica that failed the request before its first token, for a reason that is not known."""
        suspect = self._suspect(request)
        suspect.failed[replica] = self._clock(), self._was_alone_at(replica, suspect)

    def _was_alone_at(self, replica: str, suspect: Suspect) -> bool:
        """Whether no other sequence was exposed to what ended `replica`: those that it failed before are suspects."""
        return self._num_exposed[replica] <= 1 and not any(
            replica in other.died or replica in other.failed
            for other in self._suspects.values()
            if other is not suspect
        )

    def on_gone(self, replica: str, node: str | None) -> None:
        """Take note that Serve has removed a replica of `node`, or that its engine died (None)."""
        earliest = self._clock() - GONE_WITHIN_S
        for suspect in self._suspects.values():
            failed_at, was_alone = suspect.failed.pop(replica, (-math.inf, False))
            if failed_at <= earliest:
                continue
            with self._counting(suspect):
                suspect.was_alone |= was_alone
                if node is None:
                    suspect.died.add(replica)
                else:
                    suspect.take_gone(node, failed_at)

    def on_success(self, request: GenerateRequest) -> None:
        """Clear a prompt, as it was served."""
        if self._suspects:
            self._suspects.pop(_key(request), None)

    @contextmanager
    def _counting(self, suspect: Suspect) -> Iterator[None]:
        """Count the quarantine that the block may bring about."""
        was_quarantined = suspect.is_quarantined
        yield
        self.num_quarantines += suspect.is_quarantined and not was_quarantined

    def _forget_old(self) -> None:
        while self._suspects and next(iter(self._suspects.values())).at + REMEMBER_S <= self._clock():
            self._suspects.popitem(last=False)

    def _suspect(self, request: GenerateRequest) -> Suspect:
        self._forget_old()
        key = _key(request)
        suspect = self._suspects.setdefault(key, Suspect())
        suspect.at = self._clock()
        self._suspects.move_to_end(key)
        if len(self._suspects) > MAX_SUSPECTS:
            self._suspects.popitem(last=False)
        return suspect


def _key(request: GenerateRequest) -> bytes:
    """Return what is the same for requests that an engine computes in the same way."""
    return hashlib.blake2b(_ENCODER.encode((request.prompt_token_ids, request.sampling)), digest_size=16).digest()
