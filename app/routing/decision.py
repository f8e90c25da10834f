"""What the router decided for one sequence, and all that it decided by."""

from __future__ import annotations

from typing import Literal

import msgspec

from app.messages import Role


class Candidate(msgspec.Struct, frozen=True):
    """One replica that could serve, and how good it would be."""

    replica: str
    cached_tokens: int
    """Prompt tokens that its prefix cache is expected to hold."""
    queued_tokens: int
    """Prompt tokens that wait there to be computed."""
    scores: dict[str, float]
    """Each in [0, 1], by the name of its weight in the configuration; app/routing/scores.py says what they are."""
    total: float
    """The weighted sum of the scores."""


class Prediction(msgspec.Struct, frozen=True):
    """Predicted seconds to the first token, of both ways; None where that way is not open or nothing was measured."""

    remote_s: float | None = None
    local_s: float | None = None
    interference_s: float = 0.0
    """What a local prefill would cost the sequences that run there, beyond their budget, added up over them."""


class Decision(msgspec.Struct, frozen=True):
    """Where one sequence is prefilled and decoded.

    `kind` and `reason` are labels of ``baton_decisions_total``.  Reasons of a local prefill: ``aggregated`` (there is
    no prefill pool), ``requested``, ``prompt_logprobs``, ``no_prefill_replica``, ``no_decode_replica`` (an aggregated
    one serves), ``prefill_full``, ``faster``, ``short`` and ``prefill_queue`` (thresholds).  Of a remote one:
    ``requested``, ``only_way`` (nothing else can prefill), ``configured``, ``unmeasured``, ``faster``, ``long``
    (thresholds), ``local_full``.
    """

    kind: Literal["remote", "local"]
    reason: str
    serving: Candidate
    """The replica that decodes, and prefills if `kind` is local."""
    serving_role: Role
    prefill: Candidate | None
    predicted: Prediction
    others: dict[Role, list[Candidate]] = {}
    """The next best of each pool that was looked at, where an explanation was asked for."""
    decided_in_s: float = 0.0
    """How long it took to decide."""

    @property
    def expected_cached_tokens(self) -> int:
        """Prompt tokens that no engine is expected to compute."""
        return max(self.serving.cached_tokens, self.prefill.cached_tokens if self.prefill else 0)

    @property
    def predicted_ttft_s(self) -> float | None:
        """Of the way that was chosen."""
        return self.predicted.remote_s if self.kind == "remote" else self.predicted.local_s


class RoutingHints(msgspec.Struct, frozen=True):
    """What a client says that concerns routing only."""

    session: str | None = None
    """Requests of one session are preferably served by one replica."""
    explain: bool = False
    """Whether `Decision.others` is wanted."""
