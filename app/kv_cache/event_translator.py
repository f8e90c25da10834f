"""Translates an engine's KV events into the block hashes that all of Baton shares.

An engine's events name blocks by hashes of its own, which mean nothing to anybody else.  So a worker translates them
beside its engine, and the frontends get updates that they can look prompts up in without knowing the engine.
"""

from __future__ import annotations

from sys import getsizeof

from app.kv_cache.block_hashes import block_hashes, hash_bytes, root_hash
from app.kv_cache.updates import Change
from app.messages import AllBlocksCleared, BlockHash, BlockStored, KvEvent, KvUpdate


class EventTranslator:
    """Follows one engine's events, and returns what each list of them changed.

    An engine may hold the same block more than once, as vLLM does after it computed one prompt twice at the same time.
    It then reports each copy as stored and each copy as removed, so a block is there until its last copy goes.

    Blocks that cannot be trusted are left out: it is better to miss a block than to send a request to one that is not
    there.  A block whose parent was removed stays, though no prompt reaches it.  It counts again when the parent is
    back, as it does in the engine.

    A block takes 130 to 160 bytes if the engine's hashes are integers, and 160 to 190 if they are vLLM's 32 bytes
    (`size_bytes` measures it).  Following one that is stored takes 0.4 us.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """The engine has `num_blocks` blocks of `block_size` tokens each."""
        # An engine removes a block before it reuses it, so without loss there are never more than num_blocks.  An
        # eighth is added for an engine that reports a removal somewhat late.
        self._max_copies = num_blocks + num_blocks // 8
        self._block_size = block_size
        self._names: dict[BlockHash, int] = {}
        self._more_copies: dict[BlockHash, int] = {}
        self._num_copies = 0
        self.num_orphans = 0
        """Blocks left out so far: their parent is unknown, their size is another one, or tokens are missing."""
        self.num_overflows = 0
        """How often there were more blocks than the engine has.  Removals must have been lost then, so all blocks were
        forgotten."""

    def __len__(self) -> int:
        return len(self._names)

    def apply(self, events: list[KvEvent]) -> KvUpdate:
        """Follow `events` and return exactly what they changed: `stored` has only blocks that were not there before,
        and `removed` only blocks that were."""
        change = Change()
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event, change)
            elif isinstance(event, AllBlocksCleared):
                self._clear(change)
            else:
                self._remove(event.block_hashes, change)
        if self._num_copies > self._max_copies:
            self.num_overflows += 1
            self._clear(change)
        return change.as_update()

    def snapshot(self) -> KvUpdate:
        """Return all blocks, for a frontend that begins to listen; updates returned later continue this one."""
        return KvUpdate(stored=list(self._names.values()), removed=[], is_reset=True)

    def size_bytes(self) -> int:
        """Return the bytes that it takes in memory.  This walks over all blocks, so it is for benchmarks."""
        tables = getsizeof(self._names) + getsizeof(self._more_copies)
        return tables + sum(hash_bytes(key) + hash_bytes(name) for key, name in self._names.items())

    def _store(self, event: BlockStored, change: Change) -> None:
        parent: int | None
        if event.parent_block_hash is None:
            parent = root_hash(event.cache_salt)
        else:  # the parent has the salt in it
            parent = self._names.get(event.parent_block_hash)
        size = self._block_size
        is_whole = event.block_size == size and len(event.token_ids) == len(event.block_hashes) * size
        if parent is None or not is_whole:
            self.num_orphans += len(event.block_hashes)
            return
        names = self._names
        self._num_copies += len(event.block_hashes)
        for key, name in zip(event.block_hashes, block_hashes(event.token_ids, size, parent), strict=True):
            if key in names:
                self._more_copies[key] = self._more_copies.get(key, 0) + 1
            else:
                names[key] = name
                change.store(name)

    def _remove(self, keys: list[BlockHash], change: Change) -> None:
        for key in keys:
            if key not in self._names:
                continue
            self._num_copies -= 1
            more = self._more_copies.pop(key, 0)
            if not more:
                change.remove(self._names.pop(key))
            elif more > 1:
                self._more_copies[key] = more - 1

    def _clear(self, change: Change) -> None:
        self._names.clear()
        self._more_copies.clear()
        self._num_copies = 0
        change.reset()
