"""Whether a request's prompt is prefilled on the prefill pool or on the decode replica itself."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.errors import InvalidRequest
from app.messages import GenerateRequest


class Placement(msgspec.Struct, frozen=True):
    """Where the prompt is prefilled and, if locally, why."""

    kind: Literal["remote", "local"]
    reason: str = ""


def place_prefill(request: GenerateRequest, *, has_prefill_pool: bool, can_decode_prefill: bool) -> Placement:
    """Remote wherever it can be.  Raises InvalidRequest for a local prefill that the engine is not capable of.

    ``prompt_logprobs`` come out of the forward pass over the prompt, which under disaggregation runs on the
    other engine, so such a request is served without it rather than refused.
    """
    if not has_prefill_pool:
        return Placement("local", "aggregated")
    if not can_decode_prefill:
        if request.prefill_mode == "local":
            raise InvalidRequest("baton_prefill: this model's decode engine cannot prefill, so it cannot be local")
        return Placement("remote")
    if request.prefill_mode == "local":
        return Placement("local", "requested")
    if request.sampling.get("prompt_logprobs") is not None:
        return Placement("local", "prompt_logprobs")
    return Placement("remote")


def spoil(request: GenerateRequest) -> GenerateRequest:
    """The same request with another prompt of the same length: its KV is wrong for the original."""
    first, *rest = request.prompt_token_ids
    spoiled = [*rest, first]
    if spoiled == request.prompt_token_ids:  # one token, however often: take a neighbour that exists
        spoiled = [first - 1 if first else 1] * len(spoiled)
    return msgspec.structs.replace(request, prompt_token_ids=spoiled)
