"""The KV blocks of a sim engine: which requests hold them, what they have cached, and in what order they are evicted.

A block is *empty*, *held* by one or more requests, or *idle*: cached but held by nobody.  When no empty block is left,
the idle one that was used longest ago is evicted first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from app.messages import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KvEvent

MAX_WAITING_EVENTS = 10_000
"""How many KV events are kept for a consumer that does not take them."""


def chain_hashes(tokens: list[int], block_size: int, hashes: list[int], num: int, root: int) -> None:
    """Extend `hashes`, the block hashes of `tokens`, to the first `num` blocks.

    A hash covers its block and, through its parent, all blocks before it.  Python's hash of a tuple of integers is
    the same in every process and 64 bits wide.  It does not withstand an attacker, which a simulation does not need.
    """
    parent = hashes[-1] if hashes else root
    for start in range(len(hashes) * block_size, num * block_size, block_size):
        parent = hash((parent, *tokens[start : start + block_size]))
        hashes.append(parent)


class BlockPool:
    """`num_blocks` blocks and the prefix cache over them."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self._block_size = block_size
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self._hash_of: list[int | None] = [None] * num_blocks
        self._block_of: dict[int, int] = {}
        self._taints: dict[int, int] = {}
        self._events: list[KvEvent] | None = None

    @property
    def num_free(self) -> int:
        """The number of blocks that can be taken: those that are empty or idle."""
        return len(self._empty) + len(self._idle)

    @property
    def has_events(self) -> bool:
        """Whether `take_events` would return any."""
        return self._events != []

    @property
    def cached_hashes(self) -> set[int]:
        """Return the hashes of the blocks in the prefix cache."""
        return set(self._block_of)

    def num_holders(self, block: int) -> int:
        """Return how many requests hold `block`."""
        return self._num_holders[block]

    def find(self, hashes: Iterable[int]) -> list[int]:
        """Return the cached blocks of the longest prefix of `hashes`, without holding them for the caller."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, found: list[int], num_more: int) -> list[int] | None:
        """Hold the blocks `found` in the cache and `num_more` others.  If there are too few, hold none, return None."""
        idle, holders = self._idle, self._num_holders
        num_idle = sum(1 for block in found if not holders[block])
        if num_more > self.num_free - num_idle:
            return None
        for block in found:
            if not holders[block]:
                del idle[block]
            holders[block] += 1
        return found + self._take(num_more)

    def _take(self, num: int) -> list[int]:
        """Return `num` blocks without content; so many must be free."""
        empty = self._empty
        at = max(0, len(empty) - num)
        taken = empty[at:]
        del empty[at:]
        if len(taken) < num:
            taken += self._evict(num - len(taken))
        holders = self._num_holders
        for block in taken:
            holders[block] = 1
        return taken

    def _evict(self, num: int) -> list[int]:
        blocks = [self._idle.popitem(last=False)[0] for _ in range(num)]
        removed: list[BlockHash] = []
        for block in blocks:
            block_hash = self._hash_of[block]
            assert block_hash is not None
            self._hash_of[block] = None
            del self._block_of[block_hash]
            self._taints.pop(block, None)
            removed.append(block_hash)
        if self._events is not None:
            self._record(BlockRemoved(removed))
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Give up one hold on each of `blocks`.  The last ones of a prompt become evictable first."""
        holders, hash_of = self._num_holders, self._hash_of
        for block in reversed(blocks):
            left = holders[block] = holders[block] - 1
            if left:
                continue
            if hash_of[block] is None:
                self._empty.append(block)
            else:
                self._idle[block] = None

    def store(
        self,
        blocks: list[int],
        hashes: list[int],
        parent: int | None,
        token_ids: list[int],
        taint: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Cache `blocks`, which are held and full, with their hashes, the block before them, their tokens and salt.

        If a hash is cached already, its block stays the cached one, and the new block with the same content stays
        uncached.  `taint` is not 0 if the KV belongs to another prompt than the hashes say.
        """
        size = self._block_size
        first = 0
        for index, (block, block_hash) in enumerate(zip(blocks, hashes, strict=True)):
            if block_hash in self._block_of:
                self._record_stored(hashes, parent, token_ids, first, index, cache_salt)
                first = index + 1
                continue
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            if taint:
                self._taints[block] = taint
        self._record_stored(hashes, parent, token_ids, first, len(blocks), cache_salt)
        assert len(token_ids) == len(blocks) * size

    def _record_stored(
        self,
        hashes: list[int],
        parent: int | None,
        token_ids: list[int],
        first: int,
        end: int,
        cache_salt: str | None,
    ) -> None:
        if self._events is None or first == end:
            return
        size = self._block_size
        before = hashes[first - 1] if first else parent
        keys: list[BlockHash] = [*hashes[first:end]]
        self._record(BlockStored(keys, before, token_ids[first * size : end * size], size, cache_salt))

    def taint(self, blocks: list[int]) -> int:
        """Return the taint of cached `blocks`: not 0 if KV in them belongs to another prompt than its hash says."""
        if not self._taints:
            return 0
        return next((taint for block in reversed(blocks) if (taint := self._taints.get(block, 0))), 0)

    def _record(self, event: KvEvent) -> None:
        assert self._events is not None
        self._events.append(event)
        if len(self._events) > MAX_WAITING_EVENTS:
            self._events = None

    def take_events(self) -> list[KvEvent]:
        """Return what has happened to the cache since the last call.

        Events are recorded from the first call on, until too many wait to be taken.  After that the next list begins
        with AllBlocksCleared and leaves out what the cache holds already.
        """
        events, self._events = self._events, []
        return [AllBlocksCleared()] if events is None else events
