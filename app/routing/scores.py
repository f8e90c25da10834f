"""Scores how good a replica would be for a prompt: several scores in [0, 1], and their weighted sum.

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
"""The number of sequences at which the `batch` score is one half.  A step with 32 sequences takes 1.1 to 1.5 times as
long as one with a single sequence (profiles of the sim engine).  So other scores should decide below this number, and
this score should count more above it."""


class Prompt(msgspec.Struct, frozen=True):
    """What the scores need to know about a prompt and its request."""

    num_tokens: int
    own_replica: str | None
    """The session's own replica, if the request has a session."""
    nearness: Mapping[str, float] = {}
    """How near each node is, in [0, 1]; 1 where nothing is known to be nearer."""


PREFILL_SCORES = ("prefix", "queue", "affinity")
DECODE_SCORES = (*PREFILL_SCORES, "batch", "kv", "topology")


class Scored(msgspec.Struct):
    """A replica with its scores."""

    replica: str
    state: ReplicaState
    cached_tokens: int
    queued_tokens: int
    scores: tuple[float, ...]
    """In the order of PREFILL_SCORES or DECODE_SCORES."""
    total: float

    def candidate(self) -> Candidate:
        scores = dict(zip(DECODE_SCORES, self.scores, strict=False))
        return Candidate(self.replica, self.cached_tokens, self.queued_tokens, scores, self.total)


def score(
    prompt: Prompt,
    replicas: Sequence[str],
    states: Mapping[str, ReplicaState],
    cached_tokens: Mapping[str, int],
    weights: Sequence[float],
) -> list[Scored]:
    """Score each of `replicas`, in the given order.  `weights` belong to PREFILL_SCORES or DECODE_SCORES."""
    queued = [states[replica].queued_tokens.value for replica in replicas]
    horizon = max(1, prompt.num_tokens + max(queued, default=0))
    is_decode = len(weights) == len(DECODE_SCORES)
    found = []
    for replica, waiting in zip(replicas, queued, strict=True):
        state, cached = states[replica], cached_tokens.get(replica, 0)
        scores: tuple[float, ...] = (cached / horizon, 1 - waiting / horizon, float(replica == prompt.own_replica))
        if is_decode:
            scores += _decode_scores(prompt, state, cached)
        total = sum(map(mul, weights, scores))
        found.append(Scored(replica, state, cached, waiting, scores, total))
    return found


def _decode_scores(prompt: Prompt, state: ReplicaState, cached_tokens: int) -> tuple[float, ...]:
    return (
        HALF_BATCH / (HALF_BATCH + state.sequences.value),
        _free_after(prompt.num_tokens - cached_tokens, state),
        prompt.nearness.get(state.info.node_ip, 1.0),
    )


def _free_after(num_tokens: int, state: ReplicaState) -> float:
    """Return the share of KV blocks that would be free with `num_tokens` more tokens in them."""
    used = state.used_blocks.value + state.num_blocks(num_tokens)
    return max(0.0, 1 - used / state.info.num_blocks)


def pick(scored: Sequence[Scored]) -> Scored | None:
    """Return the candidate with the highest total; ties are broken at random.  None if there is no candidate."""
    return max(scored, key=lambda candidate: (candidate.total, random()), default=None)


def weights_of(config: PrefillWeights | DecodeWeights) -> tuple[float, ...]:
    """Return a section of weights in the order that `score` takes."""
    names = PREFILL_SCORES if isinstance(config, PrefillWeights) else DECODE_SCORES
    return tuple(getattr(config, name) for name in names)
