"""The scheduler of a sim engine.  It uses no clock, so it runs in real as well as in virtual time.

Each `step` is one step of an engine that batches continuously:

1. Running sequences that need a block for their next token get one.  If none is left, the sequence that would go
   last (see 3) gives up its blocks and is computed again later.
2. Every running sequence whose prompt is computed gets a token.
3. What is left of `max_num_batched_tokens` goes to prompts, in chunks: first to those that were begun, then to
   sequences whose KV has arrived, then to waiting ones as long as there are blocks for all of their tokens.  Of these
   the least `priority` goes first, and then who came first.
4. The profile says how long the step takes.  The caller lets that time pass and then gives out the tokens.

Tokens come from a hash of (seed, digest of the prompt's KV, position).  So batching, preemption and transfers do not
change them, but the KV of another prompt does.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as Tokens
from itertools import count
from operator import attrgetter
from typing import Literal

import msgspec

from app.engines.sim.blocks import BlockPool, chain_hashes
from app.engines.sim.profile import SimProfile
from app.kv_cache.block_hashes import root_hash

State = Literal["new", "waiting", "preempted", "transferring", "arrived", "running", "held", "ended"]


class SchedulerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a batch, under vLLM's names."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True


class ScheduledSequence:
    """One request: its tokens, and how much of it the scheduler has done."""

    __slots__ = (
        "blocks",
        "cache_salt",
        "cached_tokens",
        "computed",
        "digest",
        "finish_reason",
        "hashes",
        "is_handoff",
        "is_pulled",
        "is_stored_to",
        "max_length",
        "min_length",
        "order",
        "prompt_tokens",
        "replayed",
        "root",
        "sampling_seed",
        "state",
        "stop_token_ids",
        "stream",
        "taint",
        "tokens",
        "transferred_tokens",
    )

    def __init__(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        min_tokens: int = 0,
        num_replayed: int = 0,
        stop_token_ids: Tokens[int] = (),
        sampling_seed: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        is_handoff: bool = False,
        is_pulled: bool = False,
    ) -> None:
        """Make a sequence of at most `max_tokens` tokens after its prompt, whose last `num_replayed` are of these.

        Prompts with different salts share no blocks.  With `is_handoff` the sequence ends with its prompt, and its
        blocks are kept until `cancel`.  With `is_pulled` its KV comes from another engine.
        """
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.max_length = len(prompt) - num_replayed + max_tokens
        self.min_length = len(prompt) - num_replayed + min_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.sampling_seed = () if sampling_seed is None else (sampling_seed,)
        self.cache_salt = cache_salt
        self.root = root_hash(cache_salt)
        self.order = priority, 0
        """By it and the number of its arrival sequences wait."""
        self.is_handoff = is_handoff
        self.is_pulled = is_pulled
        self.state: State = "new"
        self.digest = prompt_digest(prompt)
        self.replayed = self.digest ^ prompt_digest(prompt[:-num_replayed]) if num_replayed else 0
        """Turns the digest into that of the prompt without what is replayed."""
        self.taint = 0
        self.stream: int | None = None
        self.hashes: list[int] = []
        self.blocks: list[int] = []
        self.computed = 0
        self.is_stored_to = 0
        self.cached_tokens = 0
        self.transferred_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None

    @property
    def kv_digest(self) -> int:
        """The digest of what this prompt's KV holds: its own, unless part of the KV came from another prompt."""
        return self.digest ^ self.taint


def prompt_digest(prompt: list[int]) -> int:
    """Return one number for what the KV of a prompt holds.  It is the same in every process."""
    return hash(tuple(prompt))


class Step(msgspec.Struct, gc=False):
    """One engine step."""

    duration_s: float
    outputs: list[ScheduledSequence]
    """Sequences that got their next token, ``tokens[-1]``, or whose handoff is ready.  Those that ended do not run any
    more."""
    pulls: list[ScheduledSequence]
    """Sequences whose transfer has to begin now; its result goes to `Scheduler.end_transfer`."""
    num_preempted: int


class Scheduler:
    """One engine's waiting and running sequences, and its KV blocks."""

    def __init__(self, limits: SchedulerLimits, profile: SimProfile, vocabulary: Tokens[int], seed: int) -> None:
        """`vocabulary` is what tokens are drawn from.  `limits.max_model_len` tokens must fit into the blocks."""
        assert limits.max_model_len <= limits.num_blocks * limits.block_size
        assert limits.max_num_seqs <= limits.max_num_batched_tokens
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self._limits = limits
        self._block_size = limits.block_size
        self._profile = profile
        self._vocabulary = vocabulary
        self._seed = seed
        self._waiting: deque[ScheduledSequence] = deque()
        self._numbers = count()
        self._arrived: deque[ScheduledSequence] = deque()
        self._transferring: set[ScheduledSequence] = set()
        self._running: list[ScheduledSequence] = []
        self._prefill_s = 0.0
        self._num_prefilled = 0
        self._num_decoded = 0
        self._num_kv_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._arrived) + len(self._transferring)

    @property
    def num_used_blocks(self) -> int:
        """The number of blocks that sequences hold, kept handoffs included."""
        return self.pool.num_blocks - self.pool.num_free

    def add(self, sequence: ScheduledSequence) -> None:
        """Queue a new sequence."""
        assert sequence.state == "new"
        assert 0 < sequence.prompt_tokens < self._limits.max_model_len
        sequence.max_length = min(sequence.max_length, self._limits.max_model_len)
        sequence.state = "waiting"
        sequence.order = sequence.order[0], next(self._numbers)
        self._queue(sequence)

    def _queue(self, sequence: ScheduledSequence) -> None:
        """Let a sequence wait where it belongs, which is mostly the end."""
        if not self._waiting or self._waiting[-1].order < sequence.order:
            self._waiting.append(sequence)
        else:
            insort(self._waiting, sequence, key=attrgetter("order"))

    def cancel(self, sequence: ScheduledSequence) -> None:
        """End a sequence, or a handoff that was pulled or that nobody will pull, and free its blocks.

        Does nothing if it has ended already.
        """
        if sequence.state == "running":
            self._running.remove(sequence)
        elif sequence.state in ("waiting", "preempted"):
            self._waiting.remove(sequence)
        elif sequence.state == "arrived":
            self._arrived.remove(sequence)
        elif sequence.state == "transferring":
            self._transferring.remove(sequence)
        self._end(sequence)

    def end_transfer(self, sequence: ScheduledSequence, kv_digest: int | None) -> None:
        """Take note that KV with `kv_digest` has arrived.  With None no KV has, and the prompt is computed here."""
        if sequence.state != "transferring":
            return  # cancelled meanwhile
        self._transferring.remove(sequence)
        if kv_digest is None:
            sequence.transferred_tokens = 0
        else:
            sequence.computed = len(sequence.tokens) - 1
            if kv_digest != sequence.digest:
                sequence.taint = kv_digest ^ sequence.digest
        sequence.state = "arrived"
        self._arrived.append(sequence)

    def step(self) -> Step | None:
        """Compute one batch.  Returns None if nothing can be computed until a sequence, its KV or free blocks come."""
        self._prefill_s = 0.0
        self._num_prefilled = self._num_decoded = self._num_kv_tokens = 0
        num_preempted = self._make_room()
        outputs: list[ScheduledSequence] = []
        prompts = self._decode(outputs)
        budget = self._limits.max_num_batched_tokens - self._num_decoded
        for sequence in prompts:
            if budget > 0:
                budget -= self._prefill(sequence, budget, outputs)
        pulls: list[ScheduledSequence] = []
        self._admit(budget, outputs, pulls, take_waiting=not num_preempted)
        if not (self._num_decoded or self._num_prefilled or pulls):
            return None
        self._remove_ended(outputs)
        return Step(self._duration_s(), outputs, pulls, num_preempted)

    def _make_room(self) -> int:
        """Give running sequences a block for their next token, and return how many other sequences lost theirs."""
        size = self._block_size
        num_preempted = 0
        for sequence in [s for s in self._running if len(s.tokens) > len(s.blocks) * size]:
            while sequence.state == "running":
                if (more := self.pool.acquire([], 1)) is not None:
                    sequence.blocks += more
                    break
                last = max(self._running, key=attrgetter("order"))
                self._running.remove(last)
                self._preempt(last)
                num_preempted += 1
        return num_preempted

    def _preempt(self, sequence: ScheduledSequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.is_stored_to = 0
        sequence.state = "preempted"
        self._queue(sequence)

    def _decode(self, outputs: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Give each running sequence a token, and return those whose prompt is not fully computed yet."""
        size = self._block_size
        sample = self._sample
        num_kv_tokens = 0
        prompts = []
        for sequence in self._running:
            length = len(sequence.tokens)
            if sequence.computed + 1 < length or sequence.is_handoff:
                prompts.append(sequence)
                continue
            sequence.computed = length
            num_kv_tokens += length
            if not length % size:
                self._store(sequence)
            sample(sequence)
            outputs.append(sequence)
        self._num_decoded += len(outputs)
        self._num_kv_tokens += num_kv_tokens
        return prompts

    def _prefill(self, sequence: ScheduledSequence, budget: int, outputs: list[ScheduledSequence]) -> int:
        """Compute up to `budget` tokens of a running sequence, and return how many."""
        length = len(sequence.tokens)
        begin = sequence.computed
        end = min(length, begin + budget)
        if begin + 1 == length:
            # Only its last token is missing, which costs as much as a token of any other sequence.
            self._num_decoded += end - begin
            self._num_kv_tokens += length
        else:
            times = self._profile.prefill
            self._prefill_s += times.per_token_s * (end - begin)
            self._prefill_s += times.per_token_squared_s * (end * end - begin * begin)
            self._num_prefilled += end - begin
        sequence.computed = end
        self._store(sequence)
        if end == length:
            if not sequence.is_handoff:
                self._sample(sequence)
            outputs.append(sequence)
        return end - begin

    def _admit(
        self, budget: int, outputs: list[ScheduledSequence], pulls: list[ScheduledSequence], *, take_waiting: bool
    ) -> None:
        """Admit sequences while tokens, places in the batch and blocks last."""
        seats = self._limits.max_num_seqs - len(self._running)
        while budget > 0 and seats > 0 and (self._arrived or (take_waiting and self._waiting)):
            if self._arrived:
                sequence = self._arrived.popleft()
            elif self._seat(self._waiting[0]):
                sequence = self._waiting.popleft()
            else:
                return
            is_new = sequence.state == "waiting"
            if is_new and sequence.is_pulled and sequence.computed + 1 < len(sequence.tokens):
                sequence.transferred_tokens = len(sequence.tokens) - sequence.computed
                sequence.state = "transferring"
                self._transferring.add(sequence)
                pulls.append(sequence)
                continue
            sequence.state = "running"
            self._running.append(sequence)
            seats -= 1
            budget -= self._prefill(sequence, budget, outputs)

    def _seat(self, sequence: ScheduledSequence) -> bool:
        """Give a waiting sequence blocks for all of its tokens, cached ones first.  False if there are too few."""
        size = self._block_size
        length = len(sequence.tokens)
        found: list[int] = []
        if self._limits.enable_prefix_caching:
            # The last token is always computed, because the next one is sampled from the result.
            num_full = (length - 1) // size
            if len(sequence.hashes) < num_full:
                chain_hashes(sequence.tokens, size, sequence.hashes, num_full, sequence.root)
            found = self.pool.find(sequence.hashes[:num_full])
        blocks = self.pool.acquire(found, -(-length // size) - len(found))
        if blocks is None:
            return False
        sequence.blocks = blocks
        sequence.computed = len(found) * size
        sequence.is_stored_to = len(found)
        if sequence.state == "waiting":
            sequence.cached_tokens = sequence.computed
        if sequence.stream is None:
            sequence.taint = self.pool.taint(found)
        return True

    def _store(self, sequence: ScheduledSequence) -> None:
        """Put the blocks that have been filled into the prefix cache."""
        if not self._limits.enable_prefix_caching:
            return
        size = self._block_size
        begin, end = sequence.is_stored_to, sequence.computed // size
        if begin == end:
            return
        hashes = sequence.hashes
        if len(hashes) < end:
            chain_hashes(sequence.tokens, size, hashes, end, sequence.root)
        self.pool.store(
            sequence.blocks[begin:end],
            hashes[begin:end],
            hashes[begin - 1] if begin else None,
            sequence.tokens[begin * size : end * size],
            sequence.taint,
            sequence.cache_salt,
        )
        sequence.is_stored_to = end

    def _sample(self, sequence: ScheduledSequence) -> None:
        """Append the next token, and set the finish_reason if it is the last."""
        stream = sequence.stream
        if stream is None:
            stream = sequence.stream = hash(
                (self._seed, sequence.kv_digest ^ sequence.replayed, *sequence.sampling_seed)
            )
        tokens = sequence.tokens
        vocabulary = self._vocabulary
        token = vocabulary[hash((stream, len(tokens))) % len(vocabulary)]
        tokens.append(token)
        length = len(tokens)
        if token in sequence.stop_token_ids and length > sequence.min_length:
            sequence.finish_reason = "stop"
        elif length >= sequence.max_length:
            sequence.finish_reason = "length"

    def _remove_ended(self, outputs: list[ScheduledSequence]) -> None:
        """Remove ended sequences and ready handoffs from the running ones."""
        leaving = [s for s in outputs if s.finish_reason is not None or s.is_handoff]
        if not leaving:
            return
        for sequence in leaving:
            if sequence.is_handoff:
                sequence.state = "held"
            else:
                self._end(sequence)
        self._running = [s for s in self._running if s.state == "running"]

    def _end(self, sequence: ScheduledSequence) -> None:
        if sequence.state != "ended":
            sequence.state = "ended"
            self.pool.free(sequence.blocks)
            sequence.blocks = []

    def _duration_s(self) -> float:
        profile = self._profile
        base_s = profile.prefill.base_s if self._num_prefilled else 0.0
        seconds = self._prefill_s
        if self._num_decoded:
            base_s = max(base_s, profile.step.base_s)
            seconds += profile.step.per_sequence_s * self._num_decoded
            seconds += profile.step.per_kv_token_s * self._num_kv_tokens
        return base_s + seconds
