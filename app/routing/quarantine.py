"""Prompts under which engines died.  After two deaths a prompt is refused, as it would end one engine after the other.

One death is no evidence: an engine that dies under fifty sequences makes fifty suspects, and all but one of them, if
any, are innocent.  The deaths of two different engines under the same prompt are, and its success clears it.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from app.errors import Quarantined
from app.messages import GenerateRequest

MAX_DEATHS = 2
REMEMBER_S = 600.0
"""How long a death counts against a prompt, and how long a prompt is refused since the last one.  It may be served
again after a change of the engines' version or configuration, which takes some minutes too."""
GONE_WITHIN_S = 60.0
"""A replica that failed a prompt and is gone so soon afterwards has died of it.  The frontend learns that a prefill
engine died when Serve replaces its replica, which takes three health checks."""
MAX_SUSPECTS = 4096
"""How many prompts are remembered; the one without a failure for the longest time is forgotten first."""

_ENCODER = msgspec.msgpack.Encoder()


class Suspect:
    """A prompt that may be poison."""

    __slots__ = ("at", "died", "failed")

    def __init__(self) -> None:
        self.died: set[str] = set()
        """The replicas whose engines died under it."""
        self.failed: set[str] = set()
        """Those that failed it, and of which it is not known whether their engines live."""
        self.at = 0.0
        """When that was last."""

    @property
    def is_quarantined(self) -> bool:
        return len(self.died) >= MAX_DEATHS


class Quarantine:
    """The suspects of one model in one frontend."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._suspects: OrderedDict[bytes, Suspect] = OrderedDict()
        self.num_quarantines = 0
        """How many prompts have been quarantined so far."""

    def check(self, request: GenerateRequest) -> None:
        """Raise Quarantined if too many engines died of this request's prompt and sampling parameters."""
        self._forget_old()
        if not self._suspects:  # nearly always, so that nothing is hashed
            return
        suspect = self._suspects.get(_key(request))
        if suspect is not None and suspect.is_quarantined:
            raise Quarantined(len(suspect.died), math.ceil(suspect.at + REMEMBER_S - self._clock()))

    @property
    def num_quarantined(self) -> int:
        """How many prompts are refused now."""
        self._forget_old()
        return sum(suspect.is_quarantined for suspect in self._suspects.values())

    def on_death(self, request: GenerateRequest, replica: str) -> None:
        """Take note of an engine that died while the request was on it and had no token."""
        self._died(self._suspect(request), replica)

    def on_failure(self, request: GenerateRequest, replica: str) -> None:
        """Take note of a replica that failed the request before its first token, for a reason that is not known."""
        self._suspect(request).failed.add(replica)

    def on_gone(self, replica: str) -> None:
        """Take note that a replica is gone."""
        now = self._clock()
        for suspect in self._suspects.values():
            if replica in suspect.failed and suspect.at + GONE_WITHIN_S > now:
                self._died(suspect, replica)

    def on_success(self, request: GenerateRequest) -> None:
        """Clear a prompt, as it was served."""
        if self._suspects:
            self._suspects.pop(_key(request), None)

    def _died(self, suspect: Suspect, replica: str) -> None:
        was_quarantined = suspect.is_quarantined
        suspect.died.add(replica)
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
