"""When each model that may sleep was last wanted, over all of its pools, so that these sleep and wake together.

All policies run in the process of Serve's controller.  Serve makes each from a pickle with globals of its own, but what
they import is this one module.
"""

from __future__ import annotations

WANTED_S = 5.0
"""For how long a model is wanted after it had work, or after a frontend's wish, which is repeated every second."""


class Activity:
    """When one model was last wanted, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._wanted_at: float | None = None
        self._wish: bytes | None = None
        self._has_heard = False

    def has_work(self, now: float) -> None:
        """Take note that one of the pools has work."""
        self._wanted_at = now

    def hear(self, wish: bytes | None, now: float) -> None:
        """Take the latest wish of any frontend; each is another one than the last.

        The first one that is heard may be from long ago.
        """
        if self._has_heard and wish != self._wish:
            self._wanted_at = now
        self._wish, self._has_heard = wish, True

    def is_wanted(self, now: float) -> bool:
        return self._wanted_at is not None and now - self._wanted_at < WANTED_S


_models: dict[tuple[str, str], Activity] = {}


def activity_of(application: str, model: str) -> Activity:
    """Return that of a model, which is the same for all of its pools."""
    return _models.setdefault((application, model), Activity())
