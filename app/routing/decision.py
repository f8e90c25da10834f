"""What the router decided for one sequence, and everything that it based this on."""

from __future__ import annotations

import msgspec

from app.messages import PrefillKind, Role


class Candidate(msgspec.Struct, frozen=True):
    """One replica that could serve, and how good it would be."""

    replica: str
    cached_tokens: int
    """Prompt tokens that its prefix cache is expected to hold."""
    queued_tokens: int
    """Prompt tokens that wait there to be computed."""
    scores: dict[str, float]
    """Each score is in [0, 1], by the name of its weight in the configuration; app/routing/scores.py explains them."""
    total: float
    """The weighted sum of the scores."""


class Prediction(msgspec.Struct, frozen=True):
    """Predicted seconds to the first token, one for each way; None if that way is not open or nothing was measured."""

    remote_s: float | None = None
    local_s: float | None = None
    interference_s: float = 0.0
    """How long a local prefill would make the sequences that run there wait beyond their budget, added up over them."""


class Decision(msgspec.Struct, frozen=True):
    """Where one sequence is prefilled and decoded.

    `kind` and `reason` are labels of ``baton_decisions_total``.  A local prefill has one of the reasons ``aggregated``
    (there is no prefill pool), ``requested``, ``prompt_logprobs``, ``no_prefill_replica``, ``no_usable_link`` (decode
    can get KV from no prefill replica), ``no_decode_replica`` (an aggregated replica serves), ``prefill_full``,
    ``faster``, ``short`` and ``prefill_queue`` (by thresholds).  A remote one has ``requested``, ``only_way`` (nothing
    else can prefill), ``configured``, ``unmeasured``, ``faster``, ``long`` (by thresholds) or ``local_full``.
    """

    kind: PrefillKind
    reason: str
    serving: Candidate
    """The replica that decodes, and prefills if `kind` is local."""
    serving_role: Role
    prefill: Candidate | None
    predicted: Prediction
    others: dict[Role, list[Candidate]] = {}
    """The next best candidates of each pool that was looked at, if an explanation was asked for."""
    decided_in_s: float = 0.0
    """How long the decision took."""

    @property
    def expected_cached_tokens(self) -> int:
        """Prompt tokens that no engine is expected to compute."""
        return max(self.serving.cached_tokens, self.prefill.cached_tokens if self.prefill else 0)

    @property
    def predicted_ttft_s(self) -> float | None:
        """The predicted seconds to the first token of the way that was chosen."""
        return self.predicted.remote_s if self.kind == "remote" else self.predicted.local_s


class RoutingHints(msgspec.Struct, frozen=True):
    """What a client says about routing."""

    session: str | None = None
    """Requests of one session are preferably served by one replica."""
    explain: bool = False
    """Whether `Decision.others` is wanted."""
