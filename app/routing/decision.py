"""What the router decided for one sequence, and everything that it based this on."""

from __future__ import annotations

from typing import Literal, get_args

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


Lack = Literal["", "prefill", "decode"]
"""What keeps a way from being taken now: no replica has room for the prompt, or none for the sequence."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve a sequence, with the best replicas for it, and what it is predicted to bring."""

    kind: PrefillKind
    serving: Candidate
    """The replica that decodes, and prefills if `kind` is local."""
    serving_role: Role
    prefill: Candidate | None = None
    queue_s: float
    """Predicted seconds until the prompts that wait on the replica that prefills are computed."""
    alone_s: float
    """Predicted seconds to the first token without `queue_s`."""
    pull_s: float = 0.0
    """Predicted seconds for which the sequence's second token waits for the KV after a first that prefill sent."""
    itl_s: float
    """Predicted mean seconds between this sequence's tokens."""
    interference_s: float = 0.0
    """How long a local prefill would make the sequences that run there wait beyond `slo.itl_ms`, added up over them."""
    lacks: Lack = ""

    @property
    def ttft_s(self) -> float:
        return self.queue_s + self.alone_s

    @property
    def flows_s(self) -> float:
        """Predicted seconds until tokens flow: a first one that comes alone is no answer yet."""
        return self.ttft_s + self.pull_s

    @property
    def cost_s(self) -> float:
        """What it costs this sequence and others, in seconds of waiting."""
        return self.flows_s + self.interference_s


class Wait(msgspec.Struct, frozen=True):
    """No replica has room for the sequence now."""

    alone_s: float
    """The predicted seconds to its first token once a replica has room."""
    lacks: Lack


class Decision(msgspec.Struct, frozen=True):
    """Where one sequence is prefilled and decoded.

    `kind` and `reason` are labels of ``baton_decisions_total``.  A local prefill has one of the reasons ``aggregated``
    (there is no prefill pool), ``requested``, ``prompt_logprobs``, ``no_prefill_replica``, ``no_usable_link`` (decode
    can get KV from no prefill replica), ``no_decode_replica`` (another pool's replica serves, as decode is gone or left
    out), ``faster``, ``decode_full`` (a prefill replica serves, as no decode replica has room), ``slow_kv`` (it does,
    as KV moves slowly), ``short`` and
    ``prefill_queue`` (by thresholds).  A remote one has ``requested``, ``only_way`` (nothing else can prefill),
    ``configured``, ``faster`` or ``long`` (by thresholds).
    """

    way: Way
    reason: str
    ways: list[Way] = []
    """All ways that were open, the chosen one included."""
    others: dict[Role, list[Candidate]] = {}
    """The next best candidates of each pool that was looked at, if an explanation was asked for."""
    decided_in_s: float = 0.0
    """How long the decision took."""
    waited_s: float = 0.0
    """How long the request waited in the frontend before it."""

    @property
    def kind(self) -> PrefillKind:
        return self.way.kind

    @property
    def serving(self) -> Candidate:
        return self.way.serving

    @property
    def serving_role(self) -> Role:
        return self.way.serving_role

    @property
    def prefill(self) -> Candidate | None:
        return self.way.prefill

    @property
    def expected_cached_tokens(self) -> int:
        """Prompt tokens that no engine is expected to compute."""
        return max(self.serving.cached_tokens, self.prefill.cached_tokens if self.prefill else 0)

    @property
    def predicted_ttft_s(self) -> float:
        """The predicted seconds to the first token, from the decision on."""
        return self.way.ttft_s


ServiceClass = Literal["priority", "default", "flex"]
"""Who goes first of those that wait (app/routing/waiting_line.py), by OpenAI's names of ``service_tier``."""
SERVICE_CLASSES: tuple[ServiceClass, ...] = get_args(ServiceClass)
"""The highest first."""


class RoutingHints(msgspec.Struct, frozen=True):
    """Who asks, and what a client says about routing."""

    session: str | None = None
    """Requests of one session are preferably served by one replica."""
    explain: bool = False
    """Whether `Decision.others` is wanted."""
    service_class: ServiceClass = "default"
    tenant: str = ""
    """With whom the request shares its part of the tokens (app/routing/fair_order.py); empty for nobody in particular,
    which are one tenant together."""
    weight: float = 1.0
    """How many times as many tokens the tenant gets as one of weight 1 if both want more than they get; above 0."""
