"""Gathers what one decision is based on: who could serve, how good each would be, and what each way would bring."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from heapq import nlargest
from itertools import islice

from app.errors import InvalidRequest, NoReplica
from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import GenerateRequest, Role
from app.routing.capacity import has_queue_room
from app.routing.decision import Candidate, Lack, RoutingHints, Way
from app.routing.placement import demanded
from app.routing.pool_state import PoolState
from app.routing.scores import Prompt, Scored, pick, score
from app.routing.state import RouterState
from app.routing.times import PromptTimes

NUM_OTHERS = 3
"""Candidates of each pool that an explanation names besides the chosen one."""


class Survey:
    """What one decision is based on; a pool is looked at when it is first asked for."""

    def __init__(
        self,
        state: RouterState,
        request: GenerateRequest,
        hints: RoutingHints,
        lost: Collection[str],
        *,
        overtakes: bool = False,
    ) -> None:
        """`overtakes` says that prefill engines which know an order compute its prompt before others."""
        self._overtakes = overtakes
        self._state = state
        self._request = request
        self._hints = hints
        self._lost = lost
        self._num_tokens = len(request.prompt_token_ids)
        self._cached: dict[int, dict[str, int]] = {}
        self._usable: dict[Role, list[str]] = {}
        self._candidates: dict[Role, list[str]] = {}
        self._rankings: dict[tuple[Role, bool], list[Scored]] = {}
        self._lacks_link = False
        """Whether there are prefill replicas, but no decode replica can get KV from any of them."""
        self._whole_roles = self._find_whole_roles()
        """The pools that can serve the sequence whole, the preferred one first."""
        self.local_role = next(iter(self._whole_roles), None) or state.local_role()

    def only_way(self) -> tuple[Way, str] | None:
        """Return the way that this request has to take, and why; None if there is a choice.

        What was demanded is done where it can be: without decode a remote prefill is none, but the request is served.

        Raises NoReplica, and InvalidRequest for a local prefill that no replica is capable of.
        """
        state, local_role, wish = self._state, self.local_role, demanded(self._request)
        if not state.has_prefill:
            return self.local("decode"), "aggregated"
        if local_role is None:
            if wish == ("local", "requested"):
                raise InvalidRequest("baton_prefill: this model's decode engine cannot prefill, so it cannot be local")
            return self.remote(), "only_way"
        if wish is not None and wish[0] == "local" and local_role != "prefill":
            return self.local(local_role), wish[1]
        if not self.ranking("prefill") and local_role != "prefill":
            return self._whole(), "no_usable_link" if self._lacks_link else "no_prefill_replica"
        if not self._has_decode():
            return self._whole(), "no_decode_replica"
        if wish is not None:
            return self.remote(), wish[1]
        return None if self._whole_roles else (self.remote(), "only_way")

    def _find_whole_roles(self) -> list[Role]:
        """Return the pools that can serve the sequence whole; those whose replicas are all ejected only if all are."""
        roles = [role for role in self._state.whole_roles if self._find_usable(role)]
        return [role for role in roles if not self._is_ejected(role)] or roles

    def _is_ejected(self, role: Role) -> bool:
        """Whether all usable replicas of a pool are ejected, of which there is one at least."""
        return self._state.ejections.is_ejected(self._find_usable(role)[0])  # the others are used if any is not

    def _has_decode(self) -> bool:
        """Whether the decode pool can take the sequence: not if others can, and all of its replicas are ejected."""
        if not self._find_usable("decode"):
            return False
        return not self._is_ejected("decode") or all(map(self._is_ejected, self._whole_roles))

    def _whole(self) -> Way:
        """Return the best way to serve it whole, in the first pool that has room.  Raises NoReplica."""
        ways = [self.local(role) for role in self._whole_roles or ["decode"]]
        return next((way for way in ways if not way.lacks), ways[0])

    def ways(self) -> list[Way]:
        """Return a remote and a local way, and one on a prefill replica if decode has no room or KV moves slowly."""
        assert self.local_role is not None
        remote = self.remote()
        ways = [remote, self.local(self.local_role, is_optional=True)]
        if self._state.can_prefill_decode and (remote.pull_s or all(way.lacks == "decode" for way in ways)):
            ways.append(self.on_prefill())
        return ways

    def remote(self) -> Way:
        """Return the best remote way.  Raises NoReplica."""
        prefill = self._best("prefill", self._can_take_prompt)
        decode, lacks = self._receiver(prefill)
        if not self._can_take_prompt(prefill):  # what decode has taken then waits for prefill too
            lacks = "prefill"
        times = self._times(prefill)
        predictor, num_moved = self._state.predictor, self._num_tokens - decode.cached_tokens
        return Way(
            kind="remote",
            serving=decode.candidate(),
            serving_role="decode",
            prefill=prefill.candidate(),
            queue_s=predictor.prefill.value * times.queue_s,
            alone_s=predictor.prefill.value * times.prompt_s + predictor.handover_s(num_moved),
            pull_s=predictor.pull_s(
                num_moved, self._state.topology.slowness(prefill.state.info.node_ip, decode.state.info.node_ip)
            ),
            itl_s=self._state.capacity.itl_after_s(decode.state, self._num_tokens),
            lacks=lacks,
        )

    def local(self, role: Role, *, is_optional: bool = False) -> Way:
        """Return the best way to prefill where the sequence is decoded.  Raises NoReplica.

        If `is_optional`, the prompt could be prefilled elsewhere, so the sequences there are not to suffer by it.
        """

        def can_prefill(s: Scored) -> bool:
            return self._has_queue_room(s) and (not is_optional or self._is_within_budget(s))

        conditions = (lambda s: self._has_decode_room(s) and can_prefill(s), self._has_decode_room)
        best = self._best(role, *conditions, is_whole=True)
        lacks: Lack = ""
        if not self._has_decode_room(best):
            lacks = "decode"
        elif not can_prefill(best):
            lacks = "prefill"
        return self._local_way(best, role, lacks)

    def on_prefill(self) -> Way:
        """Return the best way to serve the sequence whole on a prefill replica beside decode.  Raises NoReplica.

        Those that serve sequences already come first, so that the others stay free for prompts.
        """
        ranking = self.ranking("prefill", is_whole=True)
        can_serve = [s for s in ranking if self._has_queue_room(s) and self._can_serve_whole(s)]
        best = max(can_serve, key=lambda s: (s.state.num_served, s.total), default=None)
        return self._local_way(best or self._best("prefill", is_whole=True), "prefill", "" if best else "decode")

    def _local_way(self, scored: Scored, role: Role, lacks: Lack) -> Way:
        times, learnt, itl_s = self._times(scored), self._state.predictor.local.value, self._state.capacity.itl_s
        alone_s = learnt * times.prompt_s
        return Way(
            kind="local",
            serving=scored.candidate(),
            serving_role=role,
            queue_s=learnt * times.queue_s,
            alone_s=alone_s,
            itl_s=self._state.capacity.itl_after_s(scored.state, self._num_tokens, alone_s),
            interference_s=scored.state.num_served * max(0.0, alone_s - itl_s),
            lacks=lacks,
        )

    def _times(self, scored: Scored) -> PromptTimes:
        state = scored.state
        return PromptTimes(state.queue_s, state.pace.prompt_s(self._num_tokens, scored.cached_tokens))

    def _can_take_prompt(self, scored: Scored) -> bool:
        """Whether a prefill replica will soon compute a prompt for another replica, and its sequences can bear it."""
        overtakes = self._overtakes and scored.state.info.engine != "sglang"
        return self._has_queue_room(scored, overtakes=overtakes) and self._is_within_budget(scored)

    def _has_queue_room(self, scored: Scored, *, overtakes: bool = False) -> bool:
        return has_queue_room(scored.state, self._num_tokens, scored.cached_tokens, overtakes=overtakes)

    def _is_within_budget(self, scored: Scored, *, joins: bool = False) -> bool:
        uncached = self._num_tokens - scored.cached_tokens
        prompt_s = self._state.predictor.local.value * self._times(scored).prompt_s
        return self._state.capacity.has_prefill_budget(scored.state, uncached, prompt_s, joins=joins)

    def _has_decode_room(self, scored: Scored) -> bool:
        return self._state.capacity.has_decode_room(scored.state, self._num_tokens, scored.cached_tokens)

    def _can_serve_whole(self, scored: Scored) -> bool:
        """Whether a prefill replica can serve the sequence so that it keeps the time between tokens there."""
        return self._has_decode_room(scored) and self._is_within_budget(scored, joins=True)

    def _best(self, role: Role, *conditions: Callable[[Scored], bool], is_whole: bool = False) -> Scored:
        """Return the best replica of those that satisfy the first condition, else the next one, else of all.

        `is_whole` is as for `ranking`.  Raises NoReplica.
        """
        ranking = self.ranking(role, is_whole=is_whole)
        for condition in conditions:
            if (best := pick([s for s in ranking if condition(s)])) is not None:
                return best
        if (best := pick(ranking)) is None:
            if role == "prefill" and self._lacks_link and not is_whole:
                raise NoReplica(role, "has no replica from which a decode replica can get KV (see `baton status`)")
            raise NoReplica(role)
        return best

    def _receivers(self, prefill_replica: str) -> list[Scored]:
        """Return the decode replicas that can get KV from there, by pairs that are not ejected if there is any."""
        linked = [s for s in self.ranking("decode") if s.state.can_get_kv_from(prefill_replica)]
        is_ejected = self._state.ejections.is_pair_ejected
        return [s for s in linked if not is_ejected(prefill_replica, s.replica)] or linked

    def _receiver(self, prefill: Scored) -> tuple[Scored, Lack]:
        """Return the best decode replica that can get KV from `prefill`, and whether it lacks room.

        Raises NoReplica.
        """
        linked = self._receivers(prefill.replica)
        if (best := pick([s for s in linked if self._has_decode_room(s)])) is not None:
            return best, ""
        if (best := pick(linked)) is None:
            raise NoReplica("decode")
        return best, "decode"

    def receiver_of(self, prefill_replica: str, preferred: str) -> Candidate | None:
        """Return the best decode replica for KV that `prefill_replica` has nearly computed; None if none has room.

        `preferred` is taken if no other one is better.
        """
        with_room = [s for s in self._receivers(prefill_replica) if self._has_decode_room(s)]
        best = max(with_room, key=lambda s: (s.total, s.replica == preferred), default=None)
        return best.candidate() if best is not None else None

    def ranking(self, role: Role, *, is_whole: bool = False) -> list[Scored]:
        """Return the replicas to choose from; those of prefill are for a decode replica's prompt unless `is_whole`."""
        key = role, is_whole and role == "prefill"
        if key not in self._rankings:
            self._rankings[key] = self._score(role, self._find_usable(role) if key[1] else self._find_candidates(role))
        return self._rankings[key]

    def _score(self, role: Role, replicas: list[str]) -> list[Scored]:
        if not replicas:
            return []
        pool = self._state.pools[role]
        cached, own = self._cached_tokens(pool), pool.own_replica(self._hints.session)
        prompt = Prompt(self._num_tokens, own, self._nearness(replicas) if role == "decode" else {})
        return score(prompt, replicas, pool.replicas, cached, self._state.weights[role])

    def _find_usable(self, role: Role) -> list[str]:
        """Return the replicas of a pool that may be used for this request, which are not ejected if there is any."""
        if role not in self._usable:
            self._usable[role] = self._draw(role, self._lost)
        return self._usable[role]

    def _draw(self, role: Role, lost: Collection[str]) -> list[str]:
        pool = self._state.pools[role]
        return pool.candidates(self._cached_tokens(pool), pool.own_replica(self._hints.session), lost)

    def _find_candidates(self, role: Role) -> list[str]:
        """Return the replicas of a pool to choose from; of prefill those from which a decode candidate can get KV."""
        if role not in self._candidates:
            found = self._find_usable(role)
            if role == "prefill" and self.local_role is None:
                found = self._linked(found or self._draw(role, ()))
            elif role == "prefill":  # decode does better without prefill than with one that is left out
                found = self._linked([replica for replica in found if not self._state.ejections.is_ejected(replica)])
            self._candidates[role] = found
        return self._candidates[role]

    def _linked(self, prefill: list[str]) -> list[str]:
        """Return those from which a decode candidate can get KV, by pairs that are not ejected.

        If there is none and KV has to come from somewhere, it may be by others.
        """
        states, is_ejected = self._state.pools["decode"].replicas, self._state.ejections.is_pair_ejected
        decode = self._find_candidates("decode")
        linked = [replica for replica in prefill if any(states[d].can_get_kv_from(replica) for d in decode)]
        self._lacks_link = bool(prefill and decode and not linked)
        if not decode:
            return prefill
        willing = [
            replica
            for replica in linked
            if any(states[d].can_get_kv_from(replica) and not is_ejected(replica, d) for d in decode)
        ]
        return willing or (linked if self.local_role is None else [])

    def _cached_tokens(self, pool: PoolState) -> dict[str, int]:
        """Return the prompt's cached tokens by replica.  The last token is always computed, for the first new one."""
        if (block_size := pool.block_size) is None:
            return {}
        if block_size not in self._cached:
            request = self._request
            hashes = block_hashes(request.prompt_token_ids, block_size, root_hash(request.cache_salt))
            found = self._state.index.match(islice(hashes, (self._num_tokens - 1) // block_size))
            self._cached[block_size] = {replica: blocks * block_size for replica, blocks in found.items()}
        return self._cached[block_size]

    def _nearness(self, replicas: Collection[str]) -> Mapping[str, float]:
        """Return how near the nodes of decode `replicas` are to the best prefill replica."""
        if not self._state.has_prefill or (prefill := pick(self.ranking("prefill"))) is None:
            return {}
        states = self._state.pools["decode"].replicas
        nodes = {states[replica].info.node_ip for replica in replicas}
        return self._state.topology.nearness(prefill.state.info.node_ip, nodes)

    def others(self, chosen: Collection[str]) -> dict[Role, list[Candidate]]:
        """Return the next best candidates of each pool that was looked at."""
        return {
            role: [s.candidate() for s in nlargest(NUM_OTHERS, rest, key=lambda s: s.total)]
            for (role, _), ranking in self._rankings.items()
            if (rest := [s for s in ranking if s.replica not in chosen])
        }
