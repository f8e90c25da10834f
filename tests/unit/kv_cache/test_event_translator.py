"""An engine's events, told in the names that every frontend understands: all that is true, nothing that is not."""

from __future__ import annotations

import gc
import os
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.kv_cache.block_hashes import block_hashes, root_hash
from app.kv_cache.event_translator import EventTranslator
from app.kv_cache.updates import merge_updates
from app.messages import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KvEvent, KvUpdate

BLOCK_SIZE = 2
NUM_BLOCKS = 8

Content = tuple[str | None, tuple[int, ...]]
"""What a block stands for: a salt, and all tokens of a prompt up to the block's end."""

PROMPTS = st.lists(st.integers(0, 1), min_size=BLOCK_SIZE, max_size=6 * BLOCK_SIZE)
SALTS = st.sampled_from([None, "tenant"])


def names(tokens: list[int] | tuple[int, ...], salt: str | None = None) -> list[int]:
    return list(block_hashes(tokens, BLOCK_SIZE, root_hash(salt)))


def contents(tokens: list[int], salt: str | None) -> list[Content]:
    return [(salt, tuple(tokens[:end])) for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)]


class Request:
    """A prompt in an engine, which holds blocks for it; the first `num_cached` of them are in the prefix cache."""

    def __init__(self, contents: list[Content], blocks: list[int], num_cached: int) -> None:
        self.contents = contents
        self.blocks = blocks
        self.num_cached = num_cached


class ModelEngine:
    """An engine's prefix cache as vLLM's: two prompts that are computed at once may leave two copies of a block, each
    of them stored and removed with an event of its own."""

    def __init__(self, seed: int = 0, hash_kind: Literal["int", "bytes"] = "int", num_blocks: int = NUM_BLOCKS) -> None:
        self.events: list[KvEvent] = []
        self.copies: dict[Content, set[int]] = {}
        self.requests: list[Request] = []
        self._seed = seed
        self._hash_kind = hash_kind
        self._free = list(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._content_of: dict[int, Content] = {}

    @property
    def names(self) -> set[int]:
        """What it has cached."""
        return {names(tokens, salt)[-1] for salt, tokens in self.copies}

    @property
    def num_copies(self) -> int:
        return sum(map(len, self.copies.values()))

    def num_hits(self, tokens: list[int], salt: str | None) -> int:
        """Leading blocks of a prompt that need not be computed."""
        blocks = contents(tokens, salt)
        return next((depth for depth, block in enumerate(blocks) if block not in self.copies), len(blocks))

    def admit(self, tokens: list[int], salt: str | None) -> Request | None:
        """Hold blocks for a prompt, evicting others; None if there are too few."""
        wanted = contents(tokens, salt)
        num_hits = self.num_hits(tokens, salt)
        blocks = [min(self.copies[content]) for content in wanted[:num_hits]]
        idle = [block for block in self._free if block not in blocks]
        if len(idle) < len(wanted) - num_hits:
            return None
        for block in idle[: len(wanted) - num_hits]:
            self.evict(block)
            blocks.append(block)
        for block in blocks:
            self._num_holders[block] += 1
        self._free = [block for block in self._free if not self._num_holders[block]]
        self.requests.append(request := Request(wanted, blocks, num_hits))
        return request

    def compute(self, request: Request, num: int) -> None:
        """Cache the next `num` blocks of `request`, or as many as it has left."""
        first, end = request.num_cached, min(request.num_cached + num, len(request.blocks))
        if first == end:
            return
        request.num_cached = end
        for content, block in zip(request.contents[first:end], request.blocks[first:end], strict=True):
            self.copies.setdefault(content, set()).add(block)
            self._content_of[block] = content
        salt, tokens = request.contents[end - 1]
        self.events.append(
            BlockStored(
                [self.key(content) for content in request.contents[first:end]],
                self.key(request.contents[first - 1]) if first else None,
                list(tokens[first * BLOCK_SIZE :]),
                BLOCK_SIZE,
                None if first else salt,  # vLLM names the salt with a prompt's first block only
            )
        )

    def finish(self, request: Request, order: random.Random | None) -> None:
        """Give up the blocks of `request`: the last ones will be evicted first, or any with a random `order`."""
        self.requests.remove(request)
        blocks = request.blocks[::-1]
        if order is not None:
            order.shuffle(blocks)
        for block in blocks:
            self._num_holders[block] -= 1
            if not self._num_holders[block]:
                self._free.append(block)

    def evict(self, block: int) -> None:
        content = self._content_of.pop(block, None)
        if content is None:
            return
        self.copies[content].remove(block)
        if not self.copies[content]:
            del self.copies[content]
        self.events.append(BlockRemoved([self.key(content)]))

    def clear(self) -> None:
        """Empty the cache, as engines do while no request runs."""
        assert not self.requests
        self.copies.clear()
        self._content_of.clear()
        self.events.append(AllBlocksCleared())

    def key(self, content: Content) -> BlockHash:
        digest = blake2b(repr((self._seed, content)).encode(), digest_size=8).digest()
        return digest if self._hash_kind == "bytes" else int.from_bytes(digest, signed=True)


class EngineMachine(RuleBasedStateMachine):
    """What an engine can do, one action after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.engines = [ModelEngine(0, "int"), ModelEngine(1, "bytes")]

    def engine(self, number: int) -> ModelEngine:
        return self.engines[number % len(self.engines)]

    @rule(number=st.integers(0, 3), tokens=PROMPTS, salt=SALTS)
    def admit(self, number: int, tokens: list[int], salt: str | None) -> None:
        self.engine(number).admit(tokens, salt)

    @rule(number=st.integers(0, 3), which=st.integers(0, 7), num=st.integers(1, 6))
    def compute(self, number: int, which: int, num: int) -> None:
        if requests := self.engine(number).requests:
            self.engine(number).compute(requests[which % len(requests)], num)

    @rule(number=st.integers(0, 3), which=st.integers(0, 7), order=st.none() | st.randoms(use_true_random=False))
    def finish(self, number: int, which: int, order: random.Random | None) -> None:
        if requests := self.engine(number).requests:
            self.engine(number).finish(requests[which % len(requests)], order)

    @rule(number=st.integers(0, 3), tokens=PROMPTS, salt=SALTS, num_copies=st.integers(1, 2))
    def serve(self, number: int, tokens: list[int], salt: str | None, num_copies: int) -> None:
        """All of the three, so that caches fill up; the same prompt twice at once, so that there are copies."""
        engine = self.engine(number)
        admitted = [engine.admit(tokens, salt) for _ in range(num_copies)]
        requests = [request for request in admitted if request is not None]
        for request in requests:
            engine.compute(request, len(request.blocks))
        for request in requests:
            engine.finish(request, None)

    @rule(number=st.integers(0, 3))
    def clear(self, number: int) -> None:
        if not self.engine(number).requests:
            self.engine(number).clear()


class MirrorMachine(EngineMachine):
    """A translator of each engine, and a set that follows its updates as a frontend would."""

    def __init__(self) -> None:
        super().__init__()
        self.mirrors = [EventTranslator(NUM_BLOCKS, BLOCK_SIZE) for _ in self.engines]
        self.followers: list[set[int]] = [set() for _ in self.engines]
        self.can_miss = [False for _ in self.engines]

    @rule(number=st.integers(0, 1), num=st.integers(1, 20))
    def follow(self, number: int, num: int) -> None:
        events = self.engines[number].events
        before = set(self.followers[number])
        update = self.mirrors[number].apply(events[:num])
        del events[:num]
        assert len(set(update.stored)) == len(update.stored)
        assert len(set(update.removed)) == len(update.removed)
        assert not set(update.stored) & set(update.removed)
        if update.is_reset:
            assert not update.removed
        else:
            assert before.issuperset(update.removed)
            assert before.isdisjoint(update.stored)
        follow(self.followers[number], update)

    @rule(number=st.integers(0, 1), num=st.integers(1, 20))
    def lose(self, number: int, num: int) -> None:
        events = self.engines[number].events
        events[:num] = [AllBlocksCleared()]
        self.can_miss[number] = True

    @rule(number=st.integers(0, 1), block=st.integers(0, NUM_BLOCKS - 1))
    def lose_block(self, number: int, block: int) -> None:
        """A block whose content turned out to be wrong, be it held or not."""
        self.engines[number].evict(block)
        self.can_miss[number] = True

    @invariant()
    def mirrors_and_followers_agree(self) -> None:
        for translator, follower in zip(self.mirrors, self.followers, strict=True):
            assert set(translator.snapshot().stored) == follower
            assert len(translator) == len(follower)
            assert translator.num_overflows == 0

    @invariant()
    def what_is_mirrored_is_there(self) -> None:
        for engine, translator, follower, can_miss in zip(
            self.engines, self.mirrors, self.followers, self.can_miss, strict=True
        ):
            if engine.events:
                continue
            assert follower <= engine.names
            if not can_miss:
                assert follower == engine.names
                assert translator.num_orphans == 0

    @precondition(lambda self: not any(engine.requests for engine in self.engines))
    @rule()
    def start_again(self) -> None:
        """After a clear nothing is missed any more."""
        for number, engine in enumerate(self.engines):
            engine.clear()
            self.follow(number, len(engine.events))
            self.can_miss[number] = False
            self.mirrors[number].num_orphans = 0


TestMirror = MirrorMachine.TestCase
TestMirror.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def follow(held: set[int], update: KvUpdate) -> None:
    """What `KvUpdate` says to do."""
    if update.is_reset:
        held.clear()
    held.difference_update(update.removed)
    held.update(update.stored)


def stored(keys: list[BlockHash], parent: BlockHash | None, tokens: list[int], salt: str | None = None) -> BlockStored:
    return BlockStored(keys, parent, tokens, BLOCK_SIZE, salt)


@pytest.mark.parametrize("key", [lambda number: number, lambda number: bytes([number]) * 32])
def test_a_chain_gets_the_names_that_a_prompt_has(key: Callable[[int], BlockHash]) -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    update = translator.apply([stored([key(1), key(2)], None, [5, 6, 7, 8]), stored([key(3)], key(2), [9, 9])])
    assert update == KvUpdate(stored=names([5, 6, 7, 8, 9, 9]), removed=[])
    update = translator.apply([BlockRemoved([key(2), key(3)])])
    assert update == KvUpdate(stored=[], removed=names([5, 6, 7, 8, 9, 9])[1:])
    assert translator.snapshot() == KvUpdate(stored=names([5, 6]), removed=[], is_reset=True)


def test_a_salt_is_in_the_names_of_all_blocks_after_it() -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    update = translator.apply([stored([1], None, [5, 6], "tenant"), stored([2], 1, [7, 8])])
    assert update.stored == names([5, 6, 7, 8], "tenant")


def test_blocks_of_an_unknown_parent_are_left_out_and_counted() -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    update = translator.apply([stored([2, 3], 1, [5, 6, 7, 8]), stored([4], 3, [9, 9])])
    assert update == KvUpdate(stored=[], removed=[])
    assert translator.num_orphans == 3
    assert translator.apply([BlockRemoved([2, 3, 4])]) == KvUpdate(stored=[], removed=[])


@pytest.mark.parametrize(
    "event",
    [
        BlockStored([1], None, [5, 6, 7, 8], 4),
        BlockStored([1, 2], None, [5, 6], BLOCK_SIZE),
        BlockStored([1], None, [5, 6, 7, 8], BLOCK_SIZE),
        BlockStored([1], None, [5, 6], 1),
    ],
    ids=["another block size", "tokens missing", "blocks missing", "another block size, blocks missing"],
)
def test_blocks_that_cannot_be_named_are_left_out_and_counted(event: BlockStored) -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    assert translator.apply([event]) == KvUpdate(stored=[], removed=[])
    assert translator.num_orphans == len(event.block_hashes)


def test_a_block_is_there_until_its_last_copy_goes() -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    translator.apply([stored([1], None, [5, 6])] * 3)
    for _ in range(2):
        assert translator.apply([BlockRemoved([1])]) == KvUpdate(stored=[], removed=[])
    assert translator.apply([BlockRemoved([1])]) == KvUpdate(stored=[], removed=names([5, 6]))
    assert translator.apply([BlockRemoved([1])]) == KvUpdate(stored=[], removed=[])


def test_copies_are_forgotten_when_all_is() -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    event = stored([1], None, [5, 6])
    translator.apply([event, event, AllBlocksCleared(), event])
    assert translator.apply([BlockRemoved([1])]) == KvUpdate(stored=[], removed=names([5, 6]))


def test_only_the_net_effect_of_a_list_is_told() -> None:
    translator = EventTranslator(NUM_BLOCKS, BLOCK_SIZE)
    first, second = stored([1], None, [5, 6]), stored([2], 1, [7, 8])
    assert translator.apply([first, second, BlockRemoved([2])]) == KvUpdate(stored=names([5, 6]), removed=[])
    assert translator.apply([BlockRemoved([1]), first]) == KvUpdate(stored=[], removed=[])
    update = translator.apply([BlockRemoved([1]), AllBlocksCleared(), first, second])
    assert update == KvUpdate(stored=names([5, 6, 7, 8]), removed=[], is_reset=True)


def test_more_blocks_than_the_engine_has_mean_that_removals_were_lost() -> None:
    translator = EventTranslator(16, BLOCK_SIZE)
    tokens = list(range(36))
    for number in range(18):  # 16 and an eighth: told late, perhaps
        translator.apply([stored([number], number - 1 if number else None, tokens[number * 2 : number * 2 + 2])])
    assert (len(translator), translator.num_overflows) == (18, 0)
    update = translator.apply([stored([18], 17, [1, 1])])
    assert update == KvUpdate(stored=[], removed=[], is_reset=True)
    assert (len(translator), translator.num_overflows) == (0, 1)
    assert translator.apply([stored([0], None, [0, 1])]).stored == names([0, 1])


def test_copies_count_towards_the_bound() -> None:
    translator = EventTranslator(16, BLOCK_SIZE)
    translator.apply([stored([1], None, [5, 6])] * 18)
    assert translator.num_overflows == 0
    translator.apply([BlockRemoved([1])] * 10)
    translator.apply([stored([1], None, [5, 6])] * 10)
    assert translator.num_overflows == 0
    translator.apply([stored([1], None, [5, 6])])
    assert translator.num_overflows == 1


STATES = st.sets(st.integers(0, 9))


@st.composite
def exact_changes(draw: st.DrawFn) -> tuple[set[int], list[KvUpdate]]:
    """A state, and updates that lead on from it."""
    before = start = draw(STATES)
    updates = []
    for after, is_reset in draw(st.lists(st.tuples(STATES, st.booleans()), max_size=6)):
        if is_reset:
            updates.append(KvUpdate(sorted(after), [], is_reset=True))
        else:
            updates.append(KvUpdate(sorted(after - before), sorted(before - after)))
        before = after
    return start, updates


@given(exact_changes(), st.integers(0, 6))
def test_merged_updates_do_what_they_do_one_by_one(changes: tuple[set[int], list[KvUpdate]], split: int) -> None:
    start, updates = changes
    one_by_one, merged, in_two = set(start), set(start), set(start)
    for update in updates:
        follow(one_by_one, update)
    whole = merge_updates(*updates)
    follow(merged, whole)
    assert merged == one_by_one
    assert merge_updates(merge_updates(*updates[:split]), *updates[split:]) == whole
    for update in (merge_updates(*updates[:split]), merge_updates(*updates[split:])):
        follow(in_two, update)
    assert in_two == one_by_one
    # Exact again: so it stays as small as can be, whatever was merged.
    assert whole.is_reset == any(update.is_reset for update in updates)
    if whole.is_reset:
        assert (sorted(whole.stored), whole.removed) == (sorted(one_by_one), [])
    else:
        assert Counter(whole.stored) == Counter(one_by_one - start)
        assert Counter(whole.removed) == Counter(start - one_by_one)


@pytest.mark.parametrize(
    ("make_key", "most_bytes"),
    [(lambda: int.from_bytes(os.urandom(8), signed=True), 160), (lambda: os.urandom(32), 190)],
    ids=["int", "bytes"],
)
def test_a_block_takes_the_memory_that_is_stated(make_key: Callable[[], BlockHash], most_bytes: int) -> None:
    num_blocks = 44_000  # just after the dict has grown, when it takes the most
    translator = EventTranslator(num_blocks, BLOCK_SIZE)
    gc.collect()
    tracemalloc.start()
    try:
        for start in range(0, num_blocks, 100):
            # Made here, as an engine's messages are decoded: nobody else holds the hashes.
            keys = [make_key() for _ in range(100)]
            translator.apply([stored(keys, None, [*range(start, start + 100 * BLOCK_SIZE)])])
        del keys
        allocated = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(translator) == num_blocks
    assert translator.size_bytes() <= most_bytes * num_blocks
    assert (
        0.8 * translator.size_bytes() <= allocated <= translator.size_bytes()
    )  # which is before the allocator rounds up
