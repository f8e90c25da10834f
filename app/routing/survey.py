"""Gathers what one decision is based on: who could serve, how good each would be, and how long both ways would take."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from heapq import nlargest
from itertools import islice

from app.config import PredictedPlacement
from app.errors import InvalidRequest, NoReplica, Overloaded
from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import GenerateRequest, Role
from app.routing.decision import Candidate, Prediction, RoutingHints
from app.routing.placement import PlacementChoice, demanded, place
from app.routing.scores import Prompt, Scored, pick, score
from app.routing.state import RouterState
from app.routing.ttft import HandoverWork, PromptWork

NUM_OTHERS = 3
"""Candidates of each pool that an explanation names besides the chosen one."""


class Ranking:
    """The replicas of one pool that could serve, and the best of them."""

    def __init__(self, scored: list[Scored], num_tokens: int, max_queued_tokens: int) -> None:
        self.scored = scored
        self.best = pick(scored)

        def has_room(s: Scored) -> bool:
            # A replica on which nothing waits takes a prompt of any length.
            return not s.queued_tokens or s.queued_tokens + num_tokens - s.cached_tokens <= max_queued_tokens

        self.best_with_room = self.best
        if self.best is not None and not has_room(self.best):
            self.best_with_room = pick([s for s in scored if has_room(s)])


class Survey:
    """What one decision is based on; a pool is looked at when it is first asked for."""

    def __init__(
        self, state: RouterState, request: GenerateRequest, hints: RoutingHints, lost: Collection[str]
    ) -> None:
        self._state = state
        self._request = request
        self._hints = hints
        self._lost = lost
        self._num_tokens = len(request.prompt_token_ids)
        self._cached: dict[int, dict[str, int]] = {}
        self._candidates: dict[Role, list[str]] = {}
        self._rankings: dict[Role, Ranking] = {}
        self._receivers: list[Scored] = []
        """All decode candidates, also those without room for the prompt's KV."""
        self._lacks_link = False
        """Whether there are prefill replicas, but no decode replica can get KV from any of them."""
        self.local_role = state.local_role()

    def place(self, predicted: Prediction) -> PlacementChoice:
        """Choose where to prefill.  Raises InvalidRequest and Overloaded."""
        state, local_role, wish = self._state, self.local_role, demanded(self._request)
        if not state.has_prefill:
            return "local", "aggregated"
        if local_role is None:
            if wish == ("local", "requested"):
                raise InvalidRequest("baton_prefill: this model's decode engine cannot prefill, so it cannot be local")
            return "remote", "only_way"
        if wish is not None and wish[0] == "local":
            return wish
        self.best(local_role)
        if not self.ranking("prefill").scored:
            return "local", "no_usable_link" if self._lacks_link else "no_prefill_replica"
        if not self.ranking("decode").scored:
            return "local", "no_decode_replica"
        if wish is not None:
            return wish
        prefill, local = self.ranking("prefill").best_with_room, self.ranking(local_role).best_with_room
        if prefill is None:
            return "local", "prefill_full"
        if local is None:
            return "remote", "local_full"
        return place(state.config.placement, self._num_tokens, prefill, local, predicted)

    def best(self, role: Role) -> Scored:
        """Return the best replica.  Raises NoReplica."""
        if (best := self.ranking(role).best) is None:
            if role == "prefill" and self._lacks_link:
                raise NoReplica(role, "has no replica from which a decode replica can get KV (see `baton status`)")
            raise NoReplica(role)
        return best

    def receiver(self, prefill: Scored) -> Scored:
        """Return the best decode replica that can get KV from `prefill`.  Raises NoReplica."""
        if (best := self._receiver(prefill)) is None:
            raise NoReplica("decode")
        return best

    def _receiver(self, prefill: Scored) -> Scored | None:
        best = self.ranking("decode").best
        if best is None or best.state.can_get_kv_from(prefill.replica):
            return best
        for group in (self.ranking("decode").scored, self._receivers):
            if linked := [s for s in group if s.state.can_get_kv_from(prefill.replica)]:
                return pick(linked)
        return None

    def demand(self, role: Role) -> Scored:
        """Return the best replica that has room in its queue.  Raises NoReplica and Overloaded."""
        self.best(role)
        if (best := self.ranking(role).best_with_room) is None:
            raise Overloaded(self._retry_after_s())
        return best

    def _retry_after_s(self) -> float:
        """Return after how many seconds, at the measured speed, the least busy replica that prefills will have room."""
        bound = self._state.config.max_queued_tokens
        excesses = [
            s.queued_tokens + self._num_tokens - s.cached_tokens - bound
            for ranking in self._rankings.values()
            for s in ranking.scored
            if s.queued_tokens
        ]
        return self._state.predictor.queue_s(max(0, min(excesses)))

    def ranking(self, role: Role) -> Ranking:
        if role not in self._rankings:
            bound = self._state.config.max_queued_tokens
            self._rankings[role] = Ranking(self._score(role), self._num_tokens, bound)
        return self._rankings[role]

    def _score(self, role: Role) -> list[Scored]:
        pool = self._state.pools[role]
        block_size = pool.block_size
        if block_size is None:
            return []
        cached = self._cached_tokens(block_size)
        own = pool.own_replica(self._hints.session)
        replicas = self._find_candidates(role)
        prompt = Prompt(self._num_tokens, own, self._nearness(replicas) if role == "decode" else {})
        scored = score(prompt, replicas, pool.replicas, cached, self._state.weights[role])
        if role == "prefill":
            return scored
        if role == "decode":
            self._receivers = scored
        # If none has room for the prompt's KV, the engine makes it wait.
        return [s for s in scored if s.has_kv_room] or scored

    def _find_candidates(self, role: Role) -> list[str]:
        """Return the replicas of a pool to choose from; of prefill those from which a decode candidate can get KV."""
        if role not in self._candidates:
            pool = self._state.pools[role]
            cached = self._cached_tokens(pool.block_size) if pool.block_size is not None else {}
            own = pool.own_replica(self._hints.session)
            found = pool.candidates(cached, own, self._lost)
            if role == "prefill":
                found = self._linked(found or (pool.candidates(cached, own, ()) if self.local_role is None else []))
            self._candidates[role] = found
        return self._candidates[role]

    def _linked(self, prefill: list[str]) -> list[str]:
        states = self._state.pools["decode"].replicas
        decode = [states[replica] for replica in self._find_candidates("decode")]
        linked = [replica for replica in prefill if any(state.can_get_kv_from(replica) for state in decode)]
        self._lacks_link = bool(prefill and decode and not linked)
        return linked if decode else prefill

    def _cached_tokens(self, block_size: int) -> dict[str, int]:
        """Return the prompt's cached tokens by replica.  The last token is always computed, for the first new one."""
        if block_size not in self._cached:
            request = self._request
            hashes = block_hashes(request.prompt_token_ids, block_size, root_hash(request.cache_salt))
            found = self._state.index.match(islice(hashes, (self._num_tokens - 1) // block_size))
            self._cached[block_size] = {replica: blocks * block_size for replica, blocks in found.items()}
        return self._cached[block_size]

    def _nearness(self, replicas: Collection[str]) -> Mapping[str, float]:
        """Return how near the nodes of decode `replicas` are to the best prefill replica."""
        if not self._state.has_prefill or (prefill := self.ranking("prefill").best) is None:
            return {}
        states = self._state.pools["decode"].replicas
        nodes = {states[replica].info.node_ip for replica in replicas}
        return self._state.topology.nearness(prefill.state.info.node_ip, nodes)

    def predict(self) -> Prediction:
        """Predict the times to the first token of the ways that are open."""
        remote = local = None
        if self._state.has_prefill:
            prefill = self.ranking("prefill").best_with_room
            decode = self._receiver(prefill) if prefill is not None else None
            if prefill is not None and decode is not None:
                work, moved = self._work(prefill), self._num_tokens - decode.cached_tokens
                remote = work, HandoverWork.after(work, moved, decode.state.decoding.value, decode.queued_tokens)
        if self.local_role is not None and (best := self.ranking(self.local_role).best_with_room) is not None:
            local = self._work(best)
        placement = self._state.config.placement
        budget_s = placement.itl_budget_ms / 1e3 if isinstance(placement, PredictedPlacement) else math.inf
        return self._state.predictor.predict(remote, local, budget_s)

    def _work(self, scored: Scored) -> PromptWork:
        return PromptWork(self._num_tokens, scored.cached_tokens, scored.queued_tokens, scored.state.decoding.value)

    def others(self, chosen: Collection[str]) -> dict[Role, list[Candidate]]:
        """Return the next best candidates of each pool that was looked at."""
        return {
            role: [s.candidate() for s in nlargest(NUM_OTHERS, rest, key=lambda s: s.total)]
            for role, ranking in self._rankings.items()
            if (rest := [s for s in ranking.scored if s.replica not in chosen])
        }
