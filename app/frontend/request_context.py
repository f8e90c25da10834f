"""What the HTTP side and the engine side of one request tell each other, past vLLM's server in between.

http_middleware.py opens one for each request, engine_client.py finds it in a context variable.  That reaches all that
the request starts: vLLM's handlers, generators and tasks run in copies of its context, and all copies hold the same
object.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from app.frontend.sequence_record import SequenceRecord


class RequestContext:
    """One HTTP request and its answer."""

    def __init__(self, *, wants_explanation: bool = False) -> None:
        self.wants_explanation = wants_explanation
        self.sequences: list[SequenceRecord] = []
        """The request's sequences in the order in which they were begun, if an explanation is wanted."""
        self.has_output = False
        """Whether vLLM's server was given anything to answer with.  That a sequence's first token has come
        (sequence_progress.py) is not enough: a failure to process it, or of another sequence, may take its place."""
        self.failure: dict[str, Any] | None = None
        """The ``error`` object that ended the request: ``message``, ``type``, ``param`` and the status as ``code``."""
        self.retry_after_s: int | None = None
        """Whole seconds, at least one, if the request was refused for overload."""

    @property
    def early_failure(self) -> dict[str, Any] | None:
        """The failure of a request that has nothing to answer with."""
        return None if self.has_output else self.failure

    def refuse_for(self, seconds: float) -> None:
        """Ask the client to come back in so many seconds; of several sequences the one that waits longest counts."""
        self.retry_after_s = max(self.retry_after_s or 1, math.ceil(seconds))


_current: ContextVar[RequestContext | None] = ContextVar("baton_request", default=None)


def current_request() -> RequestContext:
    """That of the request which is being served; one that nobody looks at where there is none."""
    return _current.get() or RequestContext()


@contextmanager
def begin_request(*, wants_explanation: bool) -> Iterator[RequestContext]:
    """Have everything that the block starts see one context."""
    token = _current.set(context := RequestContext(wants_explanation=wants_explanation))
    try:
        yield context
    finally:
        _current.reset(token)
