"""How many prompt tokens an engine has still to compute, and how many it has, as far as its adapter can tell."""

from __future__ import annotations

from typing import Protocol

from app.messages import GenerateRequest, TransferDescriptor


class Leave(Protocol):
    """Ends the wait of one prompt; only the first call counts."""

    def __call__(self, *, is_computed: bool = False) -> None: ...


class PromptQueue:
    """What `Engine.queued_tokens` and `Engine.computed_prompts` count."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.computed_prompts = 0
        self.computed_tokens = 0

    def enter(self, request: GenerateRequest, descriptor: TransferDescriptor | None = None) -> Leave:
        """Count a prompt, unless `descriptor` brings its KV, until what this returns is called."""
        is_waiting = descriptor is None
        num_tokens = max(0, len(request.prompt_token_ids) - request.expected_cached_tokens) if is_waiting else 0
        self.num_tokens += num_tokens

        def leave(*, is_computed: bool = False) -> None:
            nonlocal is_waiting
            if not is_waiting:
                return
            is_waiting = False
            self.num_tokens -= num_tokens
            if is_computed:
                self.computed_prompts += 1
                self.computed_tokens += num_tokens

        return leave
