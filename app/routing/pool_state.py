"""What a frontend knows of one pool: its replicas, how busy each is, and what each has cached.

A replica's load is what it reported last, corrected by what this frontend has sent and seen finished since then.  So
a frontend's own requests count at once, and those of other frontends after one message from the replica.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import nlargest
from typing import Generic, TypeVar

import msgspec

from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaInfo, ReplicaLoad, Role
from app.pace import Pace
from app.routing.affinity import SessionRing
from app.routing.ejection import Ejections
from app.routing.learnt_ratio import LearntRatio
from app.routing.prefix_index import ApproximateCache, PrefixIndex

SMALL_POOL = 16
"""A pool of at most this many replicas is looked at as a whole."""
NUM_DRAWN = 8
"""Of a larger pool, this many replicas that have cached the most of the prompt are looked at, the session's own, and
this many drawn at random.  The best of 8 drawn is among the least loaded quarter of a pool with probability 0.9
(1 - 0.75**8), and frontends that do not talk to each other do not all draw the same one."""


START_PACE = Pace(
    prefill_base_s=0.01,
    prefill_s_per_token=4e-5,
    step_base_s=0.0,
)
"""What is taken for the pace of a replica that tells none, until requests have shown how far it is off: 10 ms, and
25,000 tokens/s, which an 8B model reaches on an H200 (docs/benchmarks/2026-11-21-h200.md)."""


Number = TypeVar("Number", int, float)


class Gauge(Generic[Number]):
    """A quantity: a replica reports the whole of it, and this frontend knows its own part."""

    __slots__ = ("_others", "own", "value")

    def __init__(self, zero: Number) -> None:
        self.own: Number = zero
        self.value: Number = zero
        """The best guess of the whole.  It is stored, because it is read far more often than it changes."""
        self._others: Number = zero

    def report(self, value: Number) -> None:
        self._others = value - self.own  # below 0 if the report misses those of ours that are on their way
        self._update()

    def _update(self) -> None:
        self.value = max(self.own, self._others + self.own)

    @contextmanager
    def counting(self, amount: Number) -> Iterator[None]:
        """Count `amount` as this frontend's own while the block runs."""
        self.own += amount
        self._update()
        try:
            yield
        finally:
            self.own -= amount
            self._update()


class ReplicaState:
    """One replica, as this frontend knows it."""

    __slots__ = (
        "_assumed",
        "_sources",
        "compute_s",
        "decoding",
        "info",
        "kv_tokens",
        "load",
        "pace",
        "prompt_slowness",
        "queued_tokens",
        "sequences",
        "used_blocks",
    )

    def __init__(self, info: ReplicaInfo) -> None:
        self.info = info
        self.pace = info.pace or START_PACE
        self.sequences = Gauge[int](0)
        self.queued_tokens = Gauge[int](0)
        self.compute_s = Gauge[float](0.0)
        """What the queued prompts take: see `ReplicaLoad.queued_s`."""
        self.used_blocks = Gauge[int](0)
        self.decoding = Gauge[int](0)
        self.kv_tokens = Gauge[int](0)
        self.load = ReplicaLoad()
        """The latest report.  For what frontends count too, the gauges are more up to date."""
        self.prompt_slowness = LearntRatio()
        """How many times as long as by the pace prompts of this frontend took here, if it prefills for others."""
        self._sources: frozenset[str] | None = None
        self._assumed = ApproximateCache(info.num_blocks) if info.prefix_cache == "silent" else None

    def report(self, load: ReplicaLoad) -> None:
        self.load = load
        self.sequences.report(load.sequences)
        self.queued_tokens.report(load.queued_tokens)
        self.compute_s.report(load.queued_s if self.info.pace else START_PACE.compute_s(load.queued_tokens))
        self.used_blocks.report(load.used_blocks)
        self.decoding.report(load.decoding)
        self.kv_tokens.report(load.kv_tokens)

    @property
    def queue_s(self) -> float:
        """The seconds until all prompts that wait here are computed, by the pace."""
        return self.pace.queue_s(self.queued_tokens.value, self.compute_s.value)

    @property
    def num_served(self) -> int:
        """The sequences that decode here or will; on a prefill replica those that it serves whole."""
        return self.decoding.value if self.info.role == "prefill" else self.sequences.value

    def kv_use_after(self, num_tokens: int) -> float:
        """The share of the KV memory that is taken once `num_tokens` tokens more are in it."""
        return (self.used_blocks.value + self.num_blocks(num_tokens)) / self.info.num_blocks

    def report_links(self, links: Sequence[Link]) -> None:
        self._sources = frozenset(link.prefill_replica for link in links if not link.problem)

    def can_get_kv_from(self, prefill_replica: str) -> bool:
        """Whether this decode replica's link to a prefill replica is usable.  Until it tells of its links, all are."""
        return self._sources is None or prefill_replica in self._sources

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.info.block_size_tokens)

    def assume(self, request: GenerateRequest) -> KvUpdate | None:
        """Return what a prompt that is sent here changes in the cache; None if the replica publishes that itself."""
        if self._assumed is None:
            return None
        hashes = block_hashes(request.prompt_token_ids, self.info.block_size_tokens, root_hash(request.cache_salt))
        return self._assumed.assume(list(hashes))


class PoolState:
    """The replicas of one pool that can be reached."""

    def __init__(self, index: PrefixIndex, ejections: Ejections | None = None) -> None:
        """Pools may share `index`: one walk over a prompt's blocks then finds all replicas that hold it.

        Pools of one model share `ejections`, which has pairs too.
        """
        self.replicas: dict[str, ReplicaState] = {}
        self.joining: dict[str, asyncio.Task[None]] = {}
        """What makes the first connection to a replica that is about to join, and ends when it has joined."""
        self.index = index
        self._ejections = ejections or Ejections(time.monotonic)
        self._ids: list[str] = []
        self._ring = SessionRing()
        self.on_join: Callable[[], object] = lambda: None
        """Called when a replica has come."""
        self.on_change: Callable[[], object] = lambda: None
        """Called when a replica has come or has told something of itself."""
        self.on_end: Callable[[str, str | None], object] = lambda replica, node: None
        """Called with a replica whose engine died, and None, or that Serve has removed, and its node.  It is not called
        if only a connection broke."""

    @property
    def block_size(self) -> int | None:
        """The tokens in a block, the same for all replicas of a pool; None if there is no replica."""
        return self.replicas[self._ids[0]].info.block_size_tokens if self._ids else None

    @property
    def kv_size(self) -> int:
        """The tokens that fit into the KV memory of all its replicas."""
        return sum(state.info.num_blocks * state.info.block_size_tokens for state in self.replicas.values())

    def join(self, info: ReplicaInfo) -> None:
        """Add a replica that can be reached from now on; nothing is known of its load and cache yet."""
        self.leave(info.replica_id)
        self._add(ReplicaState(info))
        self.on_join()

    def _add(self, state: ReplicaState) -> None:
        replica = state.info.replica_id
        self.replicas[replica] = state
        self._ids.append(replica)
        self._ring.add(replica)
        self._ejections.joined(replica, state.info.role)
        self.on_change()

    def leave(self, replica: str) -> None:
        """Forget a replica; nothing happens if it is not known."""
        if replica in self.replicas:
            self.give(replica)
            self.index.forget(replica)
            self._ejections.left(replica)

    def give(self, replica: str) -> ReplicaState:
        """Take a replica out of this pool, to be put into another one by `take`."""
        self._ids.remove(replica)
        self._ring.remove(replica)
        return self.replicas.pop(replica)

    def take(self, state: ReplicaState, role: Role) -> None:
        """Go on with a replica that another pool of the same `index` has given, in the role of this pool."""
        state.info = msgspec.structs.replace(state.info, role=role)
        self._add(state)

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        if (state := self.replicas.get(replica)) is not None:
            state.report(load)
            self.on_change()

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        if replica in self.replicas:
            self.index.update(replica, update)

    def on_links(self, replica: str, links: list[Link]) -> None:
        if (state := self.replicas.get(replica)) is not None:
            state.report_links(links)
            self.on_change()

    def assume(self, replica: str, request: GenerateRequest) -> None:
        """Take note that `request` is sent to `replica`, which will have its prompt cached."""
        if (state := self.replicas.get(replica)) is not None and (update := state.assume(request)) is not None:
            self.index.update(replica, update)

    def own_replica(self, session: str | None) -> str | None:
        """Return the replica that a session's requests prefer."""
        return self._ring.own(session) if session else None

    def candidates(self, cached: Mapping[str, int], own: str | None, lost: Collection[str]) -> list[str]:
        """Return the replicas that are worth a look: all of a small pool, otherwise as NUM_DRAWN says.

        `cached` has the cached tokens of the prompt by replica, of any pool; `own` is the session's own replica, if it
        has one.  Ejected replicas are left out unless there is no other: a suspect one is better than none.
        """
        if len(self._ids) <= SMALL_POOL:
            found: Iterable[str] = self._ids
        else:
            holders = self.replicas.keys() & cached.keys()
            best = holders if len(holders) <= NUM_DRAWN else nlargest(NUM_DRAWN, holders, key=cached.__getitem__)
            found = {*best, *random.sample(self._ids, NUM_DRAWN), *([own] if own else [])}
        left = [r for r in found if r not in lost]
        if not (willing := self._not_ejected(left)):
            left = [r for r in self._ids if r not in lost]
            willing = self._not_ejected(left)
        return willing or left

    def _not_ejected(self, replicas: Iterable[str]) -> list[str]:
        is_ejected = self._ejections.is_ejected
        return [replica for replica in replicas if not is_ejected(replica)]
