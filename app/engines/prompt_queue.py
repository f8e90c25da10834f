"""Counts the prompt tokens that an engine has still to compute and those that it has computed, as its adapter knows."""

from __future__ import annotations

from typing import Protocol

from app.messages import GenerateRequest, TransferDescriptor
from app.pace import Pace


class Leave(Protocol):
    """Ends the wait of one prompt; only the first call counts."""

    def __call__(self, *, is_computed: bool = False) -> None: ...


class PromptQueue:
    """The prompts of one engine.

    A prompt counts as its length less `GenerateRequest.expected_cached_tokens`; one whose KV comes through a descriptor
    does not count.
    """

    def __init__(self) -> None:
        self.pace: Pace | None = None
        """The engine's, once it is known; without one, `queued_s` stays 0."""
        self.queued_tokens = 0
        """Prompt tokens still to be computed for requests that have no first token."""
        self.queued_s = 0.0
        """The sum of `Pace.compute_s` over these prompts."""
        self.computed_prompts = 0
        """Prompts that were queued and have been computed since the engine's start, Baton's own not counted."""
        self.computed_tokens = 0
        """Their tokens."""

    def enter(self, request: GenerateRequest, descriptor: TransferDescriptor | None = None) -> Leave:
        """Count a prompt as queued until the returned function is called.  With `descriptor` it does not count."""
        is_waiting = descriptor is None
        length, cached = len(request.prompt_token_ids), request.expected_cached_tokens
        num_tokens = max(0, length - cached) if is_waiting else 0
        compute_s = self.pace.compute_s(length, cached) if num_tokens and self.pace is not None else 0.0
        self.queued_tokens += num_tokens
        self.queued_s += compute_s

        def leave(*, is_computed: bool = False) -> None:
            nonlocal is_waiting
            if not is_waiting:
                return
            is_waiting = False
            self.queued_tokens -= num_tokens
            self.queued_s = self.queued_s - compute_s if self.queued_tokens else 0.0  # no rounding errors add up
            if is_computed and request.is_load:
                self.computed_prompts += 1
                self.computed_tokens += num_tokens

        return leave
