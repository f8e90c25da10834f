"""Chooses whether a prompt is prefilled on the prefill pool or on the replica that decodes it."""

from __future__ import annotations

import msgspec

from app.config import PredictedPlacement, RemotePlacement, ThresholdPlacement
from app.messages import GenerateRequest, PrefillKind
from app.routing.decision import Prediction
from app.routing.scores import Scored

PlacementChoice = tuple[PrefillKind, str]
"""Where the prompt is prefilled, and why, in the words of `Decision.reason`."""


def demanded(request: GenerateRequest) -> PlacementChoice | None:
    """Return where a request wants its prompt prefilled, or has to have it prefilled; None if that is free.

    ``prompt_logprobs`` come out of the forward pass over the prompt, which under disaggregation runs on the other
    engine, so such a request is served without it rather than refused.
    """
    if request.prefill_mode == "local":
        return "local", "requested"
    if request.prefill_mode in ("remote", "corrupted"):
        return "remote", "requested"
    if request.sampling.get("prompt_logprobs") is not None:
        return "local", "prompt_logprobs"
    return None


def place(
    policy: PredictedPlacement | ThresholdPlacement | RemotePlacement,
    num_tokens: int,
    prefill: Scored,
    local: Scored,
    predicted: Prediction,
) -> PlacementChoice:
    """Choose between the two ways when both are open; `num_tokens` is the prompt's length."""
    match policy:
        case PredictedPlacement():
            if predicted.remote_s is None or predicted.local_s is None:
                return "remote", "unmeasured"
            is_local = predicted.local_s + predicted.interference_s <= predicted.remote_s
            return ("local" if is_local else "remote"), "faster"
        case ThresholdPlacement():
            if num_tokens - local.cached_tokens <= policy.max_local_tokens:
                return "local", "short"
            if prefill.queued_tokens > policy.max_prefill_queue_tokens:
                return "local", "prefill_queue"
            return "remote", "long"
        case RemotePlacement():
            return "remote", "configured"


def corrupt_prompt(request: GenerateRequest) -> GenerateRequest:
    """Return the same request with another prompt of the same length, whose KV is wrong for the original."""
    first, *rest = request.prompt_token_ids
    corrupted = [*rest, first]
    if corrupted == request.prompt_token_ids:  # it repeats one token: take a neighbouring id that exists
        corrupted = [first - 1 if first else 1] * len(corrupted)
    return msgspec.structs.replace(request, prompt_token_ids=corrupted)
