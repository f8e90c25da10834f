"""The KV events of vLLM and SGLang: from the ZMQ publisher in the engine's process to `app.messages.KvEvent`.

Both engines number the batches of events that they publish, from 0 on, and keep the last ones for replay:

1. `KvEventFeed.publisher` tells the engine where to publish: at two Unix sockets in a directory of the feed's own.
2. `batches` subscribes and then asks for a replay from 0, because a subscriber gets nothing that was published before.
3. If a number is too high, batches are missing, and a replay brings them.  What arrives twice is dropped.
4. If the last batches are missing, no number tells.  So after a while without events, `batches` asks for a replay.
5. If a replay does not bring a batch any more, it is lost.  Then what is cached is unknown: AllBlocksCleared.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from app.messages import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KvEvent

logger = logging.getLogger("baton.engines.kv_events")

BUFFER_STEPS = 512
"""How many batches an engine keeps for replay, and how many each of the two sockets holds before more are dropped.

An engine publishes at most one batch a step.  So this is 5 to 50 s of a busy engine and some MB: a step's batch has 3
bytes for each token of the blocks that it filled.  The replies to a replay must fit into 1,000 messages, ZMQ's default
limit for the engine's socket; it drops what exceeds them."""

SILENCE_S = 1.0
"""After how long without events a replay checks that none is missing; the engine answers in microseconds."""

REPLAY_TIMEOUT_S = 5.0
"""How long the engine may take from one reply to the next.  The publisher's thread makes a step every 0.1 s."""

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)

GPU = "GPU"
"""The events' name for the memory in which the engine computes; engines on a CPU use it too.  Blocks elsewhere
(SGLang's ``CPU_PINNED``, vLLM's ``CPU``, disks) have to be loaded first, so their events are left out."""


class _Stored(msgspec.Struct, tag="BlockStored"):
    """The fields of both engines' events that matter here."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    group_idx: int | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    """From vLLM: what a block's hash depends on besides its tokens.  For a prompt's first block, this is the salt."""
    cache_salt: str | None = None
    """From SGLang."""


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    published_at: float
    events: list[_Stored | _Removed | _Cleared]


_decode = msgspec.msgpack.Decoder(_Batch).decode


class KvEventFeed:
    """The events of one engine, for one consumer."""

    def __init__(self) -> None:
        # Short names: the path of a Unix socket has at most 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="baton-kv-", ignore_cleanup_errors=True)
        self._endpoint = f"ipc://{self._directory.name}/pub"
        self._replay_endpoint = f"ipc://{self._directory.name}/replay"
        self._context = zmq.asyncio.Context()
        self._sockets: set[zmq.asyncio.Socket] = set()
        self._next = 0
        self._published_at = 0.0

    @property
    def publisher(self) -> dict[str, Any]:
        """Return settings for vLLM's ``KVEventsConfig`` and SGLang's ``kv_events_config``; their names are the same."""
        return {
            "publisher": "zmq",
            "endpoint": self._endpoint,
            "replay_endpoint": self._replay_endpoint,
            "buffer_steps": BUFFER_STEPS,
            "hwm": BUFFER_STEPS,
        }

    async def batches(self) -> AsyncGenerator[list[KvEvent], None]:
        """Yield the events of each batch, in order, until `close`.  Another call starts again from the first batch.

        A list begins with AllBlocksCleared if batches before it were lost.  Raises msgspec.DecodeError for a message
        that is not an event of these engines.
        """
        self._next = 0
        try:
            with self._connected(zmq.SUB, self._endpoint, SILENCE_S) as updates:
                updates.subscribe(b"")
                batches = await self._catch_up()
                while True:
                    for events in filter(None, batches):
                        yield events
                    batches = await self._advance(updates)
        except zmq.ZMQError:
            if not self._context.closed:
                raise

    async def _advance(self, updates: zmq.asyncio.Socket) -> list[list[KvEvent]]:
        """Return the batch that the next message brings, and those of a replay if some are or may be missing."""
        try:
            number, batch = _parse(await _receive(updates))
        except zmq.Again:
            return await self._catch_up()
        if number < self._next:
            if batch.published_at <= self._published_at:
                return []  # a replay brought it before
            logger.warning("the engine counts its KV events from 0 again: what it has cached is asked for anew")
            self._next = 0
            return [[AllBlocksCleared()], *await self._catch_up()]
        batches = await self._catch_up() if number > self._next else []
        if number >= self._next:
            batches.append(self._accept(number, batch))
        return batches

    async def _catch_up(self) -> list[list[KvEvent]]:
        """Return the batches of a replay that have not been received yet."""
        batches = []
        with self._connected(zmq.DEALER, self._replay_endpoint, REPLAY_TIMEOUT_S) as replay:
            await replay.send_multipart([b"", self._next.to_bytes(8, "big")])
            try:
                while (reply := await _receive(replay))[2] != END_OF_REPLAY:
                    batches.append(self._accept(*_parse(reply[1:])))
            except zmq.Again:
                logger.warning("the engine did not replay its KV events from %d on", self._next)
        return batches

    def _accept(self, number: int, batch: _Batch) -> list[KvEvent]:
        """Return the events of the next batch that can be had.  Batches missing before it are lost."""
        events = _normalise(batch)
        if number != self._next:
            logger.warning("%d batches of KV events are lost: the cache is taken as empty", number - self._next)
            events.insert(0, AllBlocksCleared())
        self._next = number + 1
        self._published_at = batch.published_at
        return events

    @contextmanager
    def _connected(self, kind: int, endpoint: str, timeout_s: float) -> Iterator[zmq.asyncio.Socket]:
        with self._context.socket(kind) as socket:
            self._sockets.add(socket)
            socket.linger = 0
            socket.rcvhwm = BUFFER_STEPS
            socket.rcvtimeo = int(timeout_s * 1000)
            socket.connect(endpoint)
            try:
                yield socket
            finally:
                self._sockets.discard(socket)

    def close(self) -> None:
        """End `batches` and remove the sockets.  It may be called twice."""
        for socket in list(self._sockets):
            socket.close()
        self._context.term()
        self._directory.cleanup()


async def follow(feed: KvEventFeed | None) -> AsyncGenerator[list[KvEvent], None]:
    """Yield the batches of `feed`; none if the engine has no feed."""
    if feed is not None:
        async with aclosing(feed.batches()) as batches:
            async for events in batches:
                yield events


async def _receive(socket: zmq.asyncio.Socket) -> list[bytes]:
    """Return the next message.  Raises zmq.Again if none comes in time, and ContextTerminated if `close` is called."""
    message = asyncio.ensure_future(socket.recv_multipart())
    await asyncio.wait([message])  # not `await message`: closing the socket cancels it
    if message.cancelled():
        raise zmq.ContextTerminated
    return message.result()


def _parse(frames: list[bytes]) -> tuple[int, _Batch]:
    """Return a batch and its number, from [topic, number, batch]."""
    _, number, batch = frames
    return int.from_bytes(number, "big"), _decode(batch)


def _normalise(batch: _Batch) -> list[KvEvent]:
    """Return the events of the cache on the GPU, and of the first group if a model has several groups of layers."""
    events: list[KvEvent] = []
    for event in batch.events:
        if isinstance(event, _Cleared):
            events.append(AllBlocksCleared())
        elif event.medium in (None, GPU) and not event.group_idx:
            events.append(_stored(event) if isinstance(event, _Stored) else BlockRemoved(event.block_hashes))
    return events


def _stored(event: _Stored) -> BlockStored:
    salt = event.cache_salt
    if salt is None and event.extra_keys and event.extra_keys[0]:
        salt = event.extra_keys[0][0]
    return BlockStored(event.block_hashes, event.parent_block_hash, event.token_ids, event.block_size, salt)
