"""What the HTTP side and the engine side of one request tell each other, past vLLM's server in between.

http_middleware.py opens a context for each request, and engine_client.py finds it in a context variable.  Everything
that the request starts can see it: vLLM's handlers, generators and tasks run in copies of the request's context, and
all copies hold the same object.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.types import Send

from app.frontend.sequence_record import SequenceRecord
from app.routing.decision import SERVICE_CLASSES, ServiceClass
from app.tenants import ANYONE, Tenant

SERVICE_CLASS_OF_TIER: dict[str, ServiceClass] = {name: name for name in SERVICE_CLASSES}


class RequestContext:
    """One HTTP request and its answer."""

    def __init__(self, tenant: Tenant = ANYONE, *, wants_explanation: bool = False) -> None:
        self.tenant = tenant
        """Who asks."""
        self.wants_explanation = wants_explanation
        self.deadline = math.inf
        """When the request must have ended, in seconds of `time.monotonic`, whatever it has started by then."""
        self.service_class = tenant.bound_class("default")
        """Whom it goes before if it has to wait (app/routing/waiting_line.py): what the client asked for, or the
        highest that its tenant gets."""
        self.send: Send | None = None
        """Sends parts of the answer's body past the middlewares that only pass them on, once they have passed one."""
        self.sequences: list[SequenceRecord] = []
        """The request's sequences in the order of their start; empty unless an explanation is wanted."""
        self.has_output = False
        """Whether vLLM's server was given any output.  It is not enough that a sequence's first token has come
        (sequence_progress.py): processing it may fail, or another sequence may, and then the server gets an error."""
        self.failure: dict[str, Any] | None = None
        """The ``error`` object that ended the request: ``message``, ``type``, ``param`` and the status as ``code``."""
        self.retry_after_s: int | None = None
        """Whole seconds, at least one; None unless the request was refused for overload or by a model that sleeps."""
        self.num_sequences = 0
        """The sequences that the request has at present, over all its prompts; `num_prompt_tokens` and
        `num_prompt_logprobs` are of these."""
        self.num_prompt_tokens = 0
        """A prompt counts once for each of its sequences."""
        self.num_prompt_logprobs = 0
        self.refusal = ""
        """Why the request is refused for what its prompts take together; empty if it is not."""
        self.schema_lock = asyncio.Lock()
        """Held while a schema of the request is translated, so that one request has only one thread."""
        self.schema_s = 0.0
        """The time that this has taken so far."""

    @property
    def early_failure(self) -> dict[str, Any] | None:
        """The failure of the request, if vLLM's server was given no output before it."""
        return None if self.has_output else self.failure

    def take_class(self, tier: object, priority: int) -> None:
        """Take the class that a client asks for.

        It asks by OpenAI's ``service_tier``, which vLLM checks only in some APIs, or by vLLM's ``priority``, of which
        less goes first.  All but two tiers are the default class.
        """
        asked: ServiceClass = "default"
        if isinstance(tier, str):
            asked = SERVICE_CLASS_OF_TIER.get(tier, "default")
        if asked == "default" and priority:
            asked = "priority" if priority < 0 else "flex"
        self.service_class = self.tenant.bound_class(asked)

    def add(self, num_sequences: int, num_prompt_tokens: int, num_prompt_logprobs: int) -> None:
        """Count the sequences of a prompt that begin; negative numbers if they end."""
        self.num_sequences += num_sequences
        self.num_prompt_tokens += num_prompt_tokens
        self.num_prompt_logprobs += num_prompt_logprobs

    def refuse_for(self, seconds: float) -> None:
        """Ask the client to try again in so many seconds.  Of several sequences, the longest time counts."""
        self.retry_after_s = max(self.retry_after_s or 1, math.ceil(seconds))


_current: ContextVar[RequestContext | None] = ContextVar("baton_request", default=None)


def current_request() -> RequestContext:
    """Return the context of the request that is being served.

    Outside of any request, this is a new one that nobody reads.
    """
    return _current.get() or RequestContext()


@contextmanager
def begin_request(tenant: Tenant, *, wants_explanation: bool) -> Iterator[RequestContext]:
    """Open a context, which everything that the block starts can see."""
    token = _current.set(context := RequestContext(tenant, wants_explanation=wants_explanation))
    try:
        yield context
    finally:
        _current.reset(token)
