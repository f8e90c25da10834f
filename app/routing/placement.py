"""Chooses the way in which a sequence is served: prefilled remotely, where it is decoded, or whole on prefill.

The model's `slo` is the objective.  A sequence that comes too late is lost, and so are those whose tokens come too
slowly because of it.  So a way is open only while the replicas that it takes have room (app/routing/capacity.py), and
the choice is between a way that is open now and waiting for a better one.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from app.config import PredictedPlacement, RemotePlacement, SloConfig, ThresholdPlacement
from app.messages import GenerateRequest, PrefillKind
from app.routing.decision import Way

PlacementPolicy = PredictedPlacement | ThresholdPlacement | RemotePlacement

EASY = 0.5
"""A way by which tokens flow within this share of the TTFT that was promised counts as easy.  Among easy ways the
one that disturbs least is taken.  Later than that a sequence takes any way that is in time: what has been predicted
exactly for the promised moment is late half of the time."""
NEAR, NEAR_S = 0.9, 0.002
"""Where a local prefill costs more than this share of a remote one, less NEAR_S seconds, the prompt is prefilled
remotely: the ways are equally good for it, and decode stays free for others."""


def demanded(request: GenerateRequest) -> tuple[PrefillKind, str] | None:
    """Return where a request wants its prompt prefilled, or has to have it prefilled, and why; None if that is free.

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


class Prospect(msgspec.Struct, frozen=True):
    """A request that is to be placed: how long it is and what it has been through."""

    num_tokens: int
    waited_s: float = 0.0
    """Since its arrival."""
    waiting_tokens: int = 0
    """Prompt tokens of other requests that wait in this frontend."""


def place(policy: PlacementPolicy, slo: SloConfig, prospect: Prospect, ways: Sequence[Way]) -> tuple[Way, str] | None:
    """Choose one of `ways`, and say why in the words of `Decision.reason`; None if the request has to wait.

    `ways` are a remote and a local one at least.
    """
    match policy:
        case PredictedPlacement():
            way = choose_in_time(slo.ttft_ms / 1e3, prospect.waited_s, ways)
            reason = "faster"
            if way is not None and way.serving_role == "prefill":
                reason = "slow_kv" if any(other.pull_s for other in ways) else "decode_full"
        case ThresholdPlacement():
            kind, reason = _by_thresholds(policy, prospect, ways)
            way = next(way for way in ways if way.kind == kind)
        case RemotePlacement():
            way, reason = next(way for way in ways if way.kind == "remote"), "configured"
    return None if way is None or way.lacks else (way, reason)


def choose_in_time(ttft_s: float, waited_s: float, ways: Sequence[Way]) -> Way | None:
    """Choose the way with which the tokens of a request that has waited for `waited_s` flow within `ttft_s` seconds.

    1. If ways are easy, the cheapest of them.  A remote one may lack room on prefill: then it is worth waiting for, as
       its time includes that.  How long decode will lack room is not known.
    2. Otherwise the quickest that is open.  If that is too late anyway, it hurts nobody else.  But one that is too late
       only because KV moves slowly is no way while a replica that serves whole sequences may soon have room, and the
       request still be in time.

    None if there is none, or if it is better to wait.
    """
    known = [way for way in ways if not way.lacks or (way.lacks == "prefill" and way.kind == "remote")]
    easy = [way for way in known if waited_s + way.flows_s <= EASY * ttft_s]
    if easy:
        return min(easy, key=_cost_s)
    is_open = [way for way in ways if not way.lacks]
    if waited_s <= ttft_s and any(way.kind == "local" and way.lacks != "decode" for way in ways):
        is_open = [way for way in is_open if not way.pull_s or waited_s + way.flows_s <= ttft_s]
    return min(is_open, key=lambda way: way.flows_s, default=None)


def _cost_s(way: Way) -> float:
    return way.cost_s if way.kind == "remote" else way.cost_s / NEAR + NEAR_S


def _by_thresholds(policy: ThresholdPlacement, prospect: Prospect, ways: Sequence[Way]) -> tuple[PrefillKind, str]:
    remote = next(way for way in ways if way.kind == "remote")
    local = next(way for way in ways if way.kind == "local")
    assert remote.prefill is not None
    if prospect.num_tokens - local.serving.cached_tokens <= policy.max_local_tokens:
        return "local", "short"
    if remote.prefill.queued_tokens + prospect.waiting_tokens > policy.max_prefill_queue_tokens:
        return "local", "prefill_queue"
    return "remote", "long"


def corrupt_prompt(request: GenerateRequest) -> GenerateRequest:
    """Return the same request with another prompt of the same length, whose KV is wrong for the original."""
    first, *rest = request.prompt_token_ids
    corrupted = [*rest, first]
    if corrupted == request.prompt_token_ids:  # it repeats one token: take a neighbouring id that exists
        corrupted = [first - 1 if first else 1] * len(corrupted)
    return msgspec.structs.replace(request, prompt_token_ids=corrupted)
