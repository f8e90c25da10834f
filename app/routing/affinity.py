"""Tells which replica is a session's own: the same one in every frontend, though none of them remembers sessions.

It uses a hash ring (Karger et al., "Consistent Hashing and Random Trees", 1997): each replica has POINTS points on it,
and a session belongs to the replica of the first point after its own.  A replica that comes or goes moves only the
sessions around its points.
"""

from __future__ import annotations

import bisect
from hashlib import blake2b

POINTS = 32
"""Points of each replica.  With so many the most burdened of 8 has some 1.4 times its share of the sessions."""


class SessionRing:
    """The replicas of one pool, as points on the ring."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []

    def add(self, replica: str) -> None:
        for index in range(POINTS):
            bisect.insort(self._points, (_position(f"{replica}/{index}"), replica))

    def remove(self, replica: str) -> None:
        self._points = [point for point in self._points if point[1] != replica]

    def own(self, session: str) -> str | None:
        """Return the session's own replica; None if there are no replicas."""
        if not self._points:
            return None
        index = bisect.bisect(self._points, (_position(session), ""))
        return self._points[index % len(self._points)][1]


def _position(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())
