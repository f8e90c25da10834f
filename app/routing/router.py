"""Which replicas serve a sequence, and where its prompt is prefilled: the one decision, without Ray and without I/O.

1. Hash the prompt's blocks and look up who has cached how much of it (app/routing/prefix_index.py).
2. In each pool that could take part, leave out replicas that cannot (gone, lately failed, full) and score the rest
   (app/routing/scores.py).
3. Predict how long both ways take to the first token (app/routing/ttft.py) and choose (app/routing/disaggregation.py).
4. While the sequence runs its work counts as load (app/routing/in_flight.py), and what it took teaches the predictor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from heapq import nlargest
from itertools import islice

from app.config import PredictedPlacement, RoutingConfig
from app.engines.base import Role
from app.errors import InvalidRequest, NoReplica, Overloaded
from app.messages import GenerateRequest
from app.routing.blocks import block_hashes, root_hash
from app.routing.decision import Candidate, Decision, Prediction, RoutingHints
from app.routing.disaggregation import Placement, demanded, place
from app.routing.in_flight import InFlight
from app.routing.pool_view import PoolView
from app.routing.prefix_index import PrefixIndex
from app.routing.scores import Prompt, Scored, pick, score, weights_of
from app.routing.topology import Topology
from app.routing.ttft import HandoverWork, PromptWork, TtftPredictor

NUM_OTHERS = 3
"""Candidates of each pool that an explanation names besides the chosen one."""

NO_HINTS = RoutingHints()


class Router:
    """Decides for one model, in one frontend."""

    def __init__(
        self,
        config: RoutingConfig,
        *,
        has_prefill: bool,
        has_aggregated: bool = False,
        can_decode_prefill: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`can_decode_prefill`: whether an engine that decodes for a prefill pool can prefill as well."""
        self.config = config
        self.clock = clock
        self.has_prefill = has_prefill
        self.predictor = TtftPredictor(clock)
        self.topology = Topology()
        self.index = PrefixIndex()
        roles: dict[Role, bool] = {"prefill": has_prefill, "decode": True, "aggregated": has_aggregated}
        self.views = {role: PoolView(self.index, clock) for role, is_there in roles.items() if is_there}
        self._can_decode_prefill = can_decode_prefill or not has_prefill
        decode_weights = weights_of(config.decode_weights)
        self.weights: dict[Role, tuple[float, ...]] = {
            "prefill": weights_of(config.prefill_weights),
            "decode": decode_weights,
            "aggregated": decode_weights,
        }

    def decide(self, request: GenerateRequest, hints: RoutingHints = NO_HINTS, lost: Collection[str] = ()) -> Decision:
        """Choose, without sending anything.  `lost` are replicas that this request is not to try again.

        Raises NoReplica, Overloaded, and InvalidRequest for a local prefill that no replica is capable of.
        """
        begin = time.perf_counter()
        survey = _Survey(self, request, hints, lost)
        predicted = survey.predict()
        kind, reason = survey.place(predicted)
        role: Role = "decode"
        prefill = None
        if kind == "remote":
            prefill = survey.demand("prefill")
            serving = survey.best(role)
        else:
            role = survey.local_role or role
            serving = survey.demand(role)
        return Decision(
            kind=kind,
            reason=reason,
            serving=serving.candidate(),
            serving_role=role,
            prefill=prefill.candidate() if prefill else None,
            predicted=predicted,
            others=survey.others({serving.replica, prefill.replica if prefill else ""}) if hints.explain else {},
            decided_in_s=time.perf_counter() - begin,
        )

    def begin(self, request: GenerateRequest, decision: Decision) -> InFlight:
        """Count a sequence that is sent where `decision` says."""
        return InFlight(self.views, self.predictor, self.topology, self.clock, request, decision)

    def local_role(self) -> Role | None:
        """The pool that prefills locally: the aggregated one if any of it is ready; None if there is none."""
        if "aggregated" in self.views and self.views["aggregated"].replicas:
            return "aggregated"
        return "decode" if self._can_decode_prefill else None


class _Ranking:
    """The replicas of one pool that could serve, and the best of them."""

    def __init__(self, scored: list[Scored], num_tokens: int, max_queued_tokens: int) -> None:
        self.scored = scored
        self.best = pick(scored)

        def has_room(s: Scored) -> bool:
            # One on which nothing waits takes a prompt of any length.
            return not s.queued_tokens or s.queued_tokens + num_tokens - s.cached_tokens <= max_queued_tokens

        self.best_with_room = self.best
        if self.best is not None and not has_room(self.best):
            self.best_with_room = pick([s for s in scored if has_room(s)])


class _Survey:
    """What one decision goes by; pools are looked at when they are first asked for."""

    def __init__(self, router: Router, request: GenerateRequest, hints: RoutingHints, lost: Collection[str]) -> None:
        self._router = router
        self._request = request
        self._hints = hints
        self._lost = lost
        self._num_tokens = len(request.prompt_token_ids)
        self._cached: dict[int, dict[str, int]] = {}
        self._rankings: dict[Role, _Ranking] = {}
        self.local_role = router.local_role()

    def place(self, predicted: Prediction) -> Placement:
        """Where to prefill.  Raises InvalidRequest and Overloaded."""
        router, local_role, wish = self._router, self.local_role, demanded(self._request)
        if not router.has_prefill:
            return "local", "aggregated"
        if local_role is None:
            if wish == ("local", "requested"):
                raise InvalidRequest("baton_prefill: this model's decode engine cannot prefill, so it cannot be local")
            return "remote", "only_way"
        if wish is not None and wish[0] == "local":
            return wish
        self.best(local_role)
        if not self.ranking("prefill").scored:
            return "local", "no_prefill_replica"
        if not self.ranking("decode").scored:
            return "local", "no_decode_replica"
        if wish is not None:
            return wish
        prefill, local = self.ranking("prefill").best_with_room, self.ranking(local_role).best_with_room
        if prefill is None:
            return "local", "prefill_full"
        if local is None:
            return "remote", "local_full"
        return place(router.config.placement, self._num_tokens, prefill, local, predicted)

    def best(self, role: Role) -> Scored:
        """The best replica.  Raises NoReplica."""
        if (best := self.ranking(role).best) is None:
            raise NoReplica(role)
        return best

    def demand(self, role: Role) -> Scored:
        """The best replica that has room in its queue.  Raises NoReplica and Overloaded."""
        self.best(role)
        if (best := self.ranking(role).best_with_room) is None:
            raise Overloaded(self._retry_after_s())
        return best

    def _retry_after_s(self) -> float:
        """When the least busy replica that prefills will have room, at the measured speed."""
        bound = self._router.config.max_queued_tokens
        excesses = [
            s.queued_tokens + self._num_tokens - s.cached_tokens - bound
            for ranking in self._rankings.values()
            for s in ranking.scored
            if s.queued_tokens
        ]
        return self._router.predictor.queue_s(max(0, min(excesses)))

    def ranking(self, role: Role) -> _Ranking:
        if role not in self._rankings:
            bound = self._router.config.max_queued_tokens
            self._rankings[role] = _Ranking(self._score(role), self._num_tokens, bound)
        return self._rankings[role]

    def _score(self, role: Role) -> list[Scored]:
        view = self._router.views[role]
        block_size = view.block_size
        if block_size is None:
            return []
        cached = self._cached_tokens(block_size)
        own = view.own_replica(self._hints.session)
        replicas = view.candidates(cached, own, self._lost)
        if not replicas and role == "prefill" and self.local_role is None:
            replicas = view.candidates(cached, own, ())  # nothing else can prefill
        prompt = Prompt(self._num_tokens, own, self._nearness(replicas) if role == "decode" else {})
        scored = score(prompt, replicas, view.replicas, cached, self._router.weights[role])
        if role == "prefill":
            return scored
        # Where none has room for the prompt's KV, engines make it wait.
        return [s for s in scored if s.has_kv_room] or scored

    def _cached_tokens(self, block_size: int) -> dict[str, int]:
        """Of the prompt, by replica.  Its last token is always computed: the first new one is sampled from it."""
        if block_size not in self._cached:
            request = self._request
            hashes = block_hashes(request.prompt_token_ids, block_size, root_hash(request.cache_salt))
            found = self._router.index.match(islice(hashes, (self._num_tokens - 1) // block_size))
            self._cached[block_size] = {replica: blocks * block_size for replica, blocks in found.items()}
        return self._cached[block_size]

    def _nearness(self, replicas: Collection[str]) -> Mapping[str, float]:
        """Of the nodes of decode `replicas` to the best prefill replica."""
        if not self._router.has_prefill or (prefill := self.ranking("prefill").best) is None:
            return {}
        views = self._router.views["decode"].replicas
        nodes = {views[replica].info.node_ip for replica in replicas}
        return self._router.topology.nearness(prefill.view.info.node_ip, nodes)

    def predict(self) -> Prediction:
        """The times to the first token of the ways that are open."""
        remote = local = None
        if self._router.has_prefill:
            prefill, decode = self.ranking("prefill").best_with_room, self.ranking("decode").best
            if prefill is not None and decode is not None:
                work, moved = self._work(prefill), self._num_tokens - decode.cached_tokens
                remote = work, HandoverWork.after(work, moved, decode.view.decoding.value, decode.queued_tokens)
        if self.local_role is not None and (best := self.ranking(self.local_role).best_with_room) is not None:
            local = self._work(best)
        placement = self._router.config.placement
        budget_s = placement.itl_budget_ms / 1e3 if isinstance(placement, PredictedPlacement) else math.inf
        return self._router.predictor.predict(remote, local, budget_s)

    def _work(self, scored: Scored) -> PromptWork:
        return PromptWork(self._num_tokens, scored.cached_tokens, scored.queued_tokens, scored.view.decoding.value)

    def others(self, chosen: Collection[str]) -> dict[Role, list[Candidate]]:
        """The next best of each pool that was looked at."""
        return {
            role: [s.candidate() for s in nlargest(NUM_OTHERS, rest, key=lambda s: s.total)]
            for role, ranking in self._rankings.items()
            if (rest := [s for s in ranking.scored if s.replica not in chosen])
        }
