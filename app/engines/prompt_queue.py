"""How many prompt tokens an engine has still to compute, as far as its adapter can tell."""

from __future__ import annotations

from collections.abc import Callable

from app.messages import GenerateRequest, TransferDescriptor


class PromptQueue:
    """What `Engine.queued_tokens` counts."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def enter(self, request: GenerateRequest, descriptor: TransferDescriptor | None = None) -> Callable[[], None]:
        """Count a prompt, unless `descriptor` brings its KV, until what this returns is called for the first time."""
        num_tokens = 0 if descriptor else max(0, len(request.prompt_token_ids) - request.expected_cached_tokens)
        self.num_tokens += num_tokens

        def leave() -> None:
            nonlocal num_tokens
            self.num_tokens -= num_tokens
            num_tokens = 0

        return leave
