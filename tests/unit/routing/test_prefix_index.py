"""The prefix index: what its frontends believe is what the engines hold, whatever comes between the two."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.kv_cache.event_translator import EventTranslator
from app.kv_cache.updates import merge_updates
from app.messages import AllBlocksCleared, KvUpdate
from app.routing import prefix_index
from app.routing.prefix_index import ApproximateCache, PrefixIndex
from tests.unit.kv_cache.test_event_translator import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    PROMPTS,
    SALTS,
    EngineMachine,
    ModelEngine,
    follow,
    names,
)

FAR = 100
"""Replicas of no interest, so that those of interest have bits beyond one machine word."""


@pytest.fixture(autouse=True)
def _small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have logs cleaned up in tests too."""
    monkeypatch.setattr(prefix_index, "MIN_LOG", 4)


def longest_prefix(held: set[int], hashes: list[int]) -> int:
    return next((depth for depth, block in enumerate(hashes) if block not in held), len(hashes))


def longest_prefixes(held: dict[str, set[int]], hashes: list[int]) -> dict[str, int]:
    """What `match` is to return, by looking at every replica and every block."""
    depths = {replica: longest_prefix(blocks, hashes) for replica, blocks in held.items()}
    return {replica: depth for replica, depth in depths.items() if depth}


def held_by(index: PrefixIndex, replica: str, among: Iterable[int]) -> set[int]:
    return {block for block in among if replica in index.match([block])}


def test_each_replica_gets_its_own_depth() -> None:
    index = PrefixIndex()
    index.update("long", KvUpdate([1, 2, 3, 4], []))
    index.update("short", KvUpdate([1, 2], []))
    index.update("gap", KvUpdate([1, 3, 4], []))
    index.update("tail", KvUpdate([2, 3, 4], []))
    assert index.match([1, 2, 3, 4, 5]) == {"long": 4, "short": 2, "gap": 1}
    assert index.match([1, 2, 3]) == {"long": 3, "short": 2, "gap": 1}
    assert index.match([5, 1]) == {}
    assert index.match([]) == {}


def test_a_block_that_comes_back_makes_those_behind_it_count_again() -> None:
    index = PrefixIndex()
    index.update("a", KvUpdate([1, 2, 3], []))
    index.update("a", KvUpdate([], [2]))
    assert index.match([1, 2, 3]) == {"a": 1}
    index.update("a", KvUpdate([2], []))
    assert index.match([1, 2, 3]) == {"a": 3}


def test_no_more_is_hashed_than_the_best_replica_has() -> None:
    def hashes() -> Iterator[int]:
        for block in range(1, 100):
            taken.append(block)
            yield block

    index = PrefixIndex()
    index.update("long", KvUpdate([1, 2, 3, 4], []))
    index.update("short", KvUpdate([1, 2], []))
    index.update("elsewhere", KvUpdate([5, 6, 7], []))
    taken: list[int] = []
    assert index.match(hashes()) == {"long": 4, "short": 2}
    assert taken == [1, 2, 3, 4, 5]


def test_a_forgotten_replica_is_nowhere_and_the_next_one_in_its_place_has_nothing_of_it() -> None:
    index = PrefixIndex()
    index.update("a", KvUpdate([1, 2], []))
    index.update("b", KvUpdate([1, 2, 3], []))
    index.forget("a")
    index.forget("never there")
    index.update("c", KvUpdate([3], []))
    assert index.match([1, 2, 3]) == {"b": 3}
    assert index.match([3]) == {"b": 1, "c": 1}
    assert [index.num_blocks(replica) for replica in "abc"] == [0, 3, 1]
    assert len(index) == 3


def test_replicas_that_come_and_go_leave_nothing_behind() -> None:
    def with_two(index: PrefixIndex) -> int:
        index.update("a", KvUpdate([1], []))
        index.update("b", KvUpdate([1], []))
        return index.size_bytes()

    index = PrefixIndex()
    for number in range(1000):
        index.update(str(number), KvUpdate([1], []))
        if number:
            index.forget(str(number - 1))
    index.forget("999")
    assert len(index) == 0
    assert with_two(index) == with_two(PrefixIndex())


BLOCKS = st.lists(st.integers(0, 12), max_size=12, unique=True)
REPLICAS = st.sampled_from(["a", "b", "c", "d"])


class IndexMachine(RuleBasedStateMachine):
    """Any updates, also such as change nothing, against one set of blocks for each replica."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[str, set[int]] = {}
        for number in range(FAR):
            self.index.update(f"far{number}", KvUpdate([], []))

    @rule(replica=REPLICAS, stored=BLOCKS, removed=BLOCKS, is_reset=st.sampled_from([False, False, False, True]))
    def update(self, replica: str, stored: list[int], removed: list[int], is_reset: bool) -> None:
        update = KvUpdate(stored, [block for block in removed if block not in stored], is_reset)
        self.index.update(replica, update)
        follow(self.held.setdefault(replica, set()), update)

    @rule(replica=REPLICAS)
    def forget(self, replica: str) -> None:
        self.index.forget(replica)
        self.held.pop(replica, None)

    @rule(hashes=BLOCKS)
    def match(self, hashes: list[int]) -> None:
        assert self.index.match(iter(hashes)) == longest_prefixes(self.held, hashes)

    @invariant()
    def each_block_is_where_it_should_be(self) -> None:
        for block in range(13):
            assert self.index.match([block]) == longest_prefixes(self.held, [block])

    @invariant()
    def the_counts_are_right(self) -> None:
        assert len(self.index) == len(set().union(*self.held.values()))
        for replica in "abcd":
            assert self.index.num_blocks(replica) == len(self.held.get(replica, ()))

    @invariant()
    def the_logs_are_bounded(self) -> None:
        for replica in self.index._replicas.values():
            assert len(replica.log) <= max(prefix_index.MIN_LOG, 2 * replica.num_blocks)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Frontend:
    """One that hears of each replica what is delivered to it."""

    def __init__(self) -> None:
        self.index = PrefixIndex()
        self.inbox: dict[str, list[KvUpdate]] = {}

    def receive(self, replica: str, num: int) -> None:
        """The next `num` updates, as one."""
        waiting = self.inbox[replica]
        self.index.update(replica, merge_updates(*waiting[:num]))
        del waiting[:num]


class FleetMachine(EngineMachine):
    """Engines, a mirror beside each, and frontends that get its updates, sooner or later and merged as it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.mirrors = [EventTranslator(NUM_BLOCKS, BLOCK_SIZE) for _ in self.engines]
        self.frontends: list[Frontend] = []
        self.can_miss = [False for _ in self.engines]
        self.num_started = len(self.engines)
        self.seen: set[int] = set()
        self.connect()

    @rule(number=st.integers(0, 1), num=st.integers(1, 20))
    def publish(self, number: int, num: int) -> None:
        events = self.engines[number].events
        if not events:
            return
        update = self.mirrors[number].apply(events[:num])
        del events[:num]
        self.seen.update(update.stored)
        for frontend in self.frontends:
            frontend.inbox[str(number)].append(update)

    @rule(number=st.integers(0, 1), num=st.integers(1, 20))
    def lose(self, number: int, num: int) -> None:
        """Events do not arrive, which their numbers tell."""
        self.engines[number].events[:num] = [AllBlocksCleared()]
        self.can_miss[number] = True

    @rule(number=st.integers(0, 1))
    def restart(self, number: int) -> None:
        self.engines[number] = ModelEngine(self.num_started, "int")
        self.num_started += 1
        self.mirrors[number] = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
        self.can_miss[number] = False
        for frontend in self.frontends:
            frontend.index.forget(str(number))
            frontend.inbox[str(number)] = [self.mirrors[number].snapshot()]

    @rule()
    def connect(self) -> None:
        """A frontend that begins to listen now."""
        if len(self.frontends) < 3:
            self.frontends.append(frontend := Frontend())
            for number, mirror in enumerate(self.mirrors):
                frontend.inbox[str(number)] = [mirror.snapshot()]

    @rule(which=st.integers(0, 2), number=st.integers(0, 1))
    def reconnect(self, which: int, number: int) -> None:
        """A connection broke, and what was on its way is lost."""
        self.frontends[which % len(self.frontends)].inbox[str(number)] = [self.mirrors[number].snapshot()]

    @rule(which=st.integers(0, 2), number=st.integers(0, 1), num=st.integers(1, 10))
    def receive(self, which: int, number: int, num: int) -> None:
        self.frontends[which % len(self.frontends)].receive(str(number), num)

    @rule(tokens=PROMPTS, salt=SALTS)
    def all_arrives(self, tokens: list[int], salt: str | None) -> None:
        for number in range(len(self.engines)):
            self.publish(number, len(self.engines[number].events))
            for frontend in self.frontends:
                frontend.receive(str(number), len(frontend.inbox[str(number)]))
        for frontend in self.frontends:
            self.check(frontend)
            self.check_match(frontend, tokens, salt)

    def check(self, frontend: Frontend) -> None:
        for number, (engine, mirror) in enumerate(zip(self.engines, self.mirrors, strict=True)):
            believed = held_by(frontend.index, str(number), self.seen)
            assert believed <= engine.names
            assert self.can_miss[number] or believed == engine.names
            assert believed == set(mirror.snapshot().stored)
            assert frontend.index.num_blocks(str(number)) == len(believed)

    def check_match(self, frontend: Frontend, tokens: list[int], salt: str | None) -> None:
        found = frontend.index.match(names(tokens, salt))
        assert found == self.frontends[0].index.match(names(tokens, salt))
        for number, engine in enumerate(self.engines):
            num_hits = engine.num_hits(tokens, salt)
            assert found.get(str(number), 0) <= num_hits
            assert self.can_miss[number] or found.get(str(number), 0) == num_hits

    def teardown(self) -> None:
        self.all_arrives([0, 1] * 4, None)


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(max_examples=50, stateful_step_count=80, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(1, 30)), max_size=60), st.randoms(use_true_random=False))
def test_match_over_a_large_fleet(depths: list[tuple[int, int]], order: random.Random) -> None:
    prompt = names([order.randrange(10) for _ in range(30 * BLOCK_SIZE)])
    index = PrefixIndex()
    held: dict[str, set[int]] = {}
    for number in range(200):
        index.update(str(number), KvUpdate([], []))
    for number, depth in depths:
        update = KvUpdate(prompt[:depth], order.sample(prompt[depth:], (30 - depth) // 2))
        index.update(str(number), update)
        follow(held.setdefault(str(number), set()), update)
    assert index.match(prompt) == longest_prefixes(held, prompt)


class ReferenceCache:
    """An LRU cache as simple as can be: a list, the least recently used block first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: list[int] = []

    def use(self, hashes: list[int]) -> None:
        used = hashes[: self.capacity]
        self.blocks = [block for block in self.blocks if block not in used] + used[::-1]
        self.blocks = self.blocks[-self.capacity :]


@given(st.integers(1, 8), st.lists(PROMPTS, max_size=20))
def test_an_approximate_cache_is_an_lru_cache_that_drops_the_ends_of_prompts_first(
    capacity: int, prompts: list[list[int]]
) -> None:
    cache, reference = ApproximateCache(capacity), ReferenceCache(capacity)
    held: set[int] = set()
    for tokens in prompts:
        hashes = names(tokens)
        update = cache.assume(hashes)
        assert held.isdisjoint(update.stored)
        assert held.issuperset(update.removed)
        follow(held, update)
        reference.use(hashes)
        assert held == set(reference.blocks)
        assert len(cache) == len(held) <= capacity
        assert longest_prefix(held, hashes) == min(len(hashes), capacity)


def test_a_block_takes_the_memory_that_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    num_blocks = 44_000  # just after the dict has grown, when it takes the most
    index = PrefixIndex()
    for number in range(FAR):
        index.update(f"far{number}", KvUpdate([], []))
    sizes = []
    gc.collect()
    tracemalloc.start()
    try:
        for replica in range(8):
            source = random.Random(0)
            for _ in range(num_blocks // 500):
                # Made here, as messages are decoded: nobody else holds the hashes.
                index.update(str(replica), KvUpdate([source.getrandbits(64) - 2**63 for _ in range(500)], []))
            sizes.append(index.size_bytes())
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(index) == num_blocks
    assert 90 * num_blocks <= sizes[0] <= 130 * num_blocks
    for before, after in pairwise(sizes):
        assert 8 * num_blocks <= after - before <= 18 * num_blocks
    assert 0.8 * sizes[-1] <= allocated <= sizes[-1]  # which is before the allocator rounds up


@pytest.mark.parametrize("num_held", [0, 1, 5])
def test_no_more_of_a_prompt_is_hashed_than_somebody_holds_and_one_block(num_held: int) -> None:
    index = PrefixIndex()
    index.update("a", KvUpdate(list(range(1, num_held + 1)), []))
    hashes = iter(range(1, 1000))
    assert index.match(hashes) == ({"a": num_held} if num_held else {})
    assert next(hashes) == num_held + 2
