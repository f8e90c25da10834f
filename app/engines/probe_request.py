"""Requests that Baton itself sends to engines, to measure them: real ones that count for nothing."""

from __future__ import annotations

import random
import uuid

from app.messages import GenerateRequest


def probe_request(name: str, num_tokens: int, max_tokens: int) -> GenerateRequest:
    """Return a request with a random prompt; its id begins with `name`."""
    return GenerateRequest(
        request_id=f"{name}-{uuid.uuid4().hex}",
        prompt_token_ids=random.choices(range(1, 256), k=num_tokens),
        sampling={"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True},
        expected_cached_tokens=num_tokens,  # it counts as no load, which would make the pool grow
        cache_salt=uuid.uuid4().hex,  # nobody else's prompt meets these blocks, and they are evicted as any others
    )
