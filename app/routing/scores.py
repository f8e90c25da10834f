"""How good a replica would be for a prompt: scores in [0, 1], and their weighted sum.

``prefix`` and ``queue`` are both tokens divided by the *horizon*: the prompt's length plus the longest queue among the
candidates.  With equal weights their sum is highest where (queued + uncached) tokens are fewest, which is where the
prompt is computed first.  More weight on `prefix` keeps copies of a prefix few, and so more prefixes cached; the queue
still bounds how many requests a hot prefix piles onto one replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import mul
from random import random

import msgspec

from app.config import DecodeWeights, PrefillWeights
from app.routing.decision import Candidate
from app.routing.pool_state import ReplicaState

HALF_BATCH = 32
"""Sequences at which the `batch` score is a half.  A step of a batch of 32 takes 1.1 to 1.5 times as long as one of a
single sequence (profiles of the sim engine), so below it other reasons should decide, and above it this one more."""


class Prompt(msgspec.Struct, frozen=True):
    """What the scores need to know of a prompt and its request."""

    num_tokens: int
    own_replica: str | None
    """That of the session."""
    nearness: Mapping[str, float] = {}
    """In [0, 1], by node; 1 where nothing is known to be nearer."""


PREFILL_SCORES = ("prefix", "queue", "affinity")
DECODE_SCORES = (*PREFILL_SCORES, "batch", "kv", "topology")


class Scored(msgspec.Struct):
    """A replica with its scores."""

    replica: str
    view: ReplicaState
    cached_tokens: int
    queued_tokens: int
    scores: tuple[float, ...]
    """In the order of PREFILL_SCORES or DECODE_SCORES."""
    total: float

    def candidate(self) -> Candidate:
        scores = dict(zip(DECODE_SCORES, self.scores, strict=False))
        return Candidate(self.replica, self.cached_tokens, self.queued_tokens, scores, self.total)

    @property
    def has_kv_room(self) -> bool:
        """Whether a decode replica would have a block left."""
        return self.scores[DECODE_SCORES.index("kv")] > 0


def score(
    prompt: Prompt,
    replicas: Sequence[str],
    views: Mapping[str, ReplicaState],
    cached_tokens: Mapping[str, int],
    weights: Sequence[float],
) -> list[Scored]:
    """Each of `replicas` with its scores, in the order given; `weights` say which, PREFILL_SCORES or DECODE_SCORES."""
    queued = [views[replica].queued_tokens.value for replica in replicas]
    horizon = max(1, prompt.num_tokens + max(queued, default=0))
    is_decode = len(weights) == len(DECODE_SCORES)
    found = []
    for replica, waiting in zip(replicas, queued, strict=True):
        view, cached = views[replica], cached_tokens.get(replica, 0)
        scores: tuple[float, ...] = (cached / horizon, 1 - waiting / horizon, float(replica == prompt.own_replica))
        if is_decode:
            scores += _decode_scores(prompt, view, cached)
        total = sum(map(mul, weights, scores))
        found.append(Scored(replica, view, cached, waiting, scores, total))
    return found


def _decode_scores(prompt: Prompt, view: ReplicaState, cached_tokens: int) -> tuple[float, ...]:
    return (
        HALF_BATCH / (HALF_BATCH + view.sequences.value),
        _free_after(prompt.num_tokens - cached_tokens, view),
        prompt.nearness.get(view.info.node_ip, 1.0),
    )


def _free_after(num_tokens: int, view: ReplicaState) -> float:
    """The share of KV blocks that would be free with `num_tokens` more in it."""
    used = view.used_blocks.value + view.num_blocks(num_tokens)
    return max(0.0, 1 - used / view.info.num_blocks)


def pick(scored: Sequence[Scored]) -> Scored | None:
    """The highest total, ties broken at random; None if there is none."""
    return max(scored, key=lambda candidate: (candidate.total, random()), default=None)


def weights_of(config: PrefillWeights | DecodeWeights) -> tuple[float, ...]:
    """A section of weights as `score` takes them."""
    names = PREFILL_SCORES if isinstance(config, PrefillWeights) else DECODE_SCORES
    return tuple(getattr(config, name) for name in names)
