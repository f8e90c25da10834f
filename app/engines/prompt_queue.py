"""Counts the prompt tokens that an engine has still to compute and those that it has computed, as its adapter knows."""

from __future__ import annotations

from typing import Protocol

from app.messages import GenerateRequest, TransferDescriptor


class Leave(Protocol):
    """Ends the wait of one prompt; only the first call counts."""

    def __call__(self, *, is_computed: bool = False) -> None: ...


class PromptQueue:
    """The prompts of one engine.

    A prompt counts as its length less `GenerateRequest.expected_cached_tokens`; one whose KV comes through a descriptor
    does not count.
    """

    def __init__(self) -> None:
        self.queued_tokens = 0
        """Prompt tokens still to be computed for requests that have no first token."""
        self.computed_prompts = 0
        """Prompts that were queued and have been computed since the engine's start."""
        self.computed_tokens = 0
        """Their tokens."""

    def enter(self, request: GenerateRequest, descriptor: TransferDescriptor | None = None) -> Leave:
        """Count a prompt as queued until the returned function is called.  With `descriptor` it does not count."""
        is_waiting = descriptor is None
        num_tokens = max(0, len(request.prompt_token_ids) - request.expected_cached_tokens) if is_waiting else 0
        self.queued_tokens += num_tokens

        def leave(*, is_computed: bool = False) -> None:
            nonlocal is_waiting
            if not is_waiting:
                return
            is_waiting = False
            self.queued_tokens -= num_tokens
            if is_computed:
                self.computed_prompts += 1
                self.computed_tokens += num_tokens

        return leave
