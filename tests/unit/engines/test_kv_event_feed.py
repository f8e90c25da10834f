"""The KV events of an engine, from vLLM's own publisher over real sockets."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.engines import kv_events
from app.engines.kv_events import BUFFER_STEPS, KvEventFeed
from app.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from tests.conftest import eventually

SALT = "salt"


class Batch(msgspec.Struct, array_like=True):
    """What a publisher encodes, whatever its events are."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class Lossy:
    """A PUB socket that leaves out the messages whose numbers `drops` names."""

    def __init__(self, socket: Any, drops: Callable[[int], bool]) -> None:
        self._socket = socket
        self._drops = drops

    def send_multipart(self, frames: tuple[bytes, bytes, bytes]) -> None:
        if not self._drops(int.from_bytes(frames[1], "big")):
            self._socket.send_multipart(frames)

    def close(self, **arguments: Any) -> None:
        self._socket.close(**arguments)


class Engine:
    """An engine's cache, as far as it publishes: batch n stores block n, and removes the one that is then too old."""

    CAPACITY = 5

    def __init__(self, feed: KvEventFeed, drops: Callable[[int], bool], **settings: Any) -> None:
        from vllm.distributed.kv_events import ZmqEventPublisher

        arguments = {**feed.publisher, **settings}
        del arguments["publisher"]
        self._publisher = ZmqEventPublisher(0, **arguments)
        self._publisher._pub = Lossy(self._publisher._pub, drops)
        self._num_published = 0

    def publish(self, num_batches: int) -> None:
        for _ in range(num_batches):
            self.publish_events(wire_events(self._num_published))

    def publish_events(self, events: list[Any]) -> None:
        self._publisher.publish(Batch(time.time(), events))
        self._num_published += 1

    async def all_published(self) -> None:
        """Its thread has nothing left to do."""

        async def is_so() -> bool:
            buffer = self._publisher._buffer
            return bool(buffer) and buffer[-1][0] == self._num_published - 1

        await eventually(is_so, 10, "all is published")

    def stop(self) -> None:
        self._publisher.shutdown()


def wire_events(number: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [stored(number)]
    if number >= Engine.CAPACITY:
        events.append({"type": "BlockRemoved", "block_hashes": [number - Engine.CAPACITY], "medium": "GPU"})
    return events


def stored(block_hash: int | bytes = 1, **fields: Any) -> dict[str, Any]:
    shared = {"parent_block_hash": None, "token_ids": [7, 8], "block_size": 2, "lora_id": None, "medium": "GPU"}
    return {"type": "BlockStored", "block_hashes": [block_hash], **shared, **fields}


class Reader:
    """What comes out of a feed."""

    def __init__(self, feed: KvEventFeed) -> None:
        self.lists: list[list[KvEvent]] = []
        self.task = asyncio.create_task(self._read(feed))

    async def _read(self, feed: KvEventFeed) -> None:
        async for events in feed.batches():
            self.lists.append(events)

    async def until_block(self, block: int) -> None:
        async def is_there() -> bool:
            return bool(self.lists) and any(_names(event, block) for event in self.lists[-1])

        await eventually(is_there, 10, f"block {block}")


def _names(event: KvEvent, block: int) -> bool:
    return isinstance(event, BlockStored) and event.block_hashes == [block]


def numbers_of(lists: Iterable[list[KvEvent]]) -> list[int | str]:
    """The block that each list stores, and ``cleared`` before a list that begins anew."""
    numbers: list[int | str] = []
    for events in lists:
        if events[0] == AllBlocksCleared():
            numbers.append("cleared")
        numbers += [int(event.block_hashes[0]) for event in events if isinstance(event, BlockStored)]
    return numbers


Start = Callable[..., Engine]


@pytest.fixture
def feed() -> Any:
    feed = KvEventFeed()
    yield feed
    feed.close()


@pytest.fixture
def start(feed: KvEventFeed) -> Any:
    """Start an engine that publishes to the feed."""
    engines: list[Engine] = []

    def start(drops: Callable[[int], bool] = lambda number: False, **settings: Any) -> Engine:
        engines.append(Engine(feed, drops, **settings))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.fixture
async def read(feed: KvEventFeed) -> AsyncIterator[Callable[[], Reader]]:
    readers: list[Reader] = []

    def read() -> Reader:
        readers.append(Reader(feed))
        return readers[-1]

    yield read
    for reader in readers:
        reader.task.cancel()
    await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)


async def test_nothing_is_missing_of_what_was_before_nor_of_what_comes_after(
    start: Start, read: Callable[[], Reader]
) -> None:
    engine = start()
    engine.publish(3)
    reader = read()
    await reader.until_block(2)
    engine.publish(4)
    await reader.until_block(6)
    assert numbers_of(reader.lists) == list(range(7))
    assert reader.lists[5] == [BlockStored([5], None, [7, 8], 2), BlockRemoved([0])]


async def test_what_was_before_is_there_at_once(
    start: Start, read: Callable[[], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "SILENCE_S", 60.0)
    engine = start()
    engine.publish(3)
    await engine.all_published()
    reader = read()
    await reader.until_block(2)
    assert numbers_of(reader.lists) == [0, 1, 2]


async def test_a_gap_is_healed_by_a_replay(start: Start, read: Callable[[], Reader]) -> None:
    engine = start(lambda number: number in (3, 4, 6))
    reader = read()
    engine.publish(2)
    await reader.until_block(1)
    engine.publish(6)
    await reader.until_block(7)
    assert numbers_of(reader.lists) == list(range(8))


async def test_a_lost_end_is_noticed_in_the_silence_that_follows(
    start: Start, read: Callable[[], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "SILENCE_S", 0.05)
    engine = start(lambda number: number >= 2)
    reader = read()
    engine.publish(2)
    await reader.until_block(1)
    engine.publish(2)
    await reader.until_block(3)
    assert numbers_of(reader.lists) == list(range(4))


async def test_what_no_replay_brings_any_more_empties_the_cache(
    start: Start, read: Callable[[], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "SILENCE_S", 5.0)  # none asks before all is published
    engine = start(lambda number: 2 <= number < 8, buffer_steps=3)
    reader = read()
    engine.publish(2)
    await reader.until_block(1)
    engine.publish(7)
    await reader.until_block(8)
    engine.publish(1)
    await reader.until_block(9)
    assert numbers_of(reader.lists) == [0, 1, "cleared", 6, 7, 8, 9]


async def test_who_subscribes_too_late_begins_with_an_empty_cache(start: Start, read: Callable[[], Reader]) -> None:
    engine = start(buffer_steps=2)
    engine.publish(5)
    await engine.all_published()
    reader = read()
    await reader.until_block(4)
    assert numbers_of(reader.lists) == ["cleared", 3, 4]


async def test_an_engine_that_does_not_replay_leaves_no_stale_block(
    start: Start, read: Callable[[], Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "REPLAY_TIMEOUT_S", 0.05)
    engine = start(lambda number: number == 2, replay_endpoint=None)
    reader = read()
    await asyncio.sleep(0.2)  # nothing replays what comes before the subscription
    engine.publish(2)
    await reader.until_block(1)
    engine.publish(2)
    await reader.until_block(3)
    assert numbers_of(reader.lists) == [0, 1, "cleared", 3]


async def test_an_engine_that_counts_from_0_again_begins_with_an_empty_cache(
    start: Start, read: Callable[[], Reader], caplog: pytest.LogCaptureFixture
) -> None:
    num_before = 400  # more than the second engine gets to
    engine = start()
    engine.publish(num_before)
    reader = read()
    await reader.until_block(num_before - 1)
    engine.stop()
    engine = start()

    async def is_noticed() -> bool:
        engine.publish(1)  # what comes before the new subscription is lost, but not the last
        return "cleared" in numbers_of(reader.lists)

    await eventually(is_noticed, 10, "the restart is noticed")
    last = engine._num_published - 1
    await reader.until_block(last)
    assert numbers_of(reader.lists) == [*range(num_before), "cleared", *range(last + 1)]
    assert "from 0 again" in caplog.text


@pytest.mark.parametrize("buffer_steps", [2, BUFFER_STEPS])
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_lost_no_block_is_taken_to_be_there_that_is_not(
    start: Start, read: Callable[[], Reader], seed: int, buffer_steps: int
) -> None:
    """Batches come while replays run: none is lost and none counts twice, as long as a replay has it."""
    draw = random.Random(seed)
    num_batches = 400
    dropped = {number for number in range(num_batches - 1) if draw.random() < 0.3}
    engine = start(dropped.__contains__, buffer_steps=buffer_steps)
    reader = read()
    at = 0
    while at < num_batches:
        step = min(draw.randrange(1, 20), num_batches - at)
        engine.publish(step)
        at += step
        await asyncio.sleep(0)
    await reader.until_block(num_batches - 1)
    if buffer_steps == BUFFER_STEPS:
        assert numbers_of(reader.lists) == list(range(num_batches))
    cached: set[Any] = set()
    for events in reader.lists:
        for event in events:
            if isinstance(event, BlockStored):
                cached.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                cached.difference_update(event.block_hashes)
            else:
                cached.clear()
        last = int(numbers_of([events])[-1])
        assert cached <= set(range(last - Engine.CAPACITY + 1, last + 1))


VLLM: dict[str, Any] = {"lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention", "session_id": "x"}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (stored(2**64 - 1, **VLLM), [BlockStored([2**64 - 1], None, [7, 8], 2)]),
        (stored(b"\x01" * 32, parent_block_hash=b"\x02", **VLLM), [BlockStored([b"\x01" * 32], b"\x02", [7, 8], 2)]),
        (stored(extra_keys=[[SALT], None], **VLLM), [BlockStored([1], None, [7, 8], 2, SALT)]),
        (stored(extra_keys=[None], **VLLM), [BlockStored([1], None, [7, 8], 2)]),
        (stored(-(2**63), cache_salt=SALT), [BlockStored([-(2**63)], None, [7, 8], 2, SALT)]),
        (stored(group_idx=1), []),
        (stored(medium="CPU_PINNED"), []),
        (stored(medium=None), [BlockStored([1], None, [7, 8], 2)]),
        ({"type": "BlockRemoved", "block_hashes": [1, 2], "medium": "GPU", "group_idx": 0}, [BlockRemoved([1, 2])]),
        ({"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 1}, []),
        ({"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU"}, []),
        ({"type": "AllBlocksCleared"}, [AllBlocksCleared()]),
    ],
    ids=[
        "vLLM",
        "vLLM with whole hashes",
        "vLLM with a salt",
        "vLLM without a salt",
        "SGLang with a salt",
        "another group",
        "in host memory",
        "somewhere",
        "removed",
        "removed from another group",
        "removed from host memory",
        "cleared",
    ],
)
async def test_events_of_both_engines_read_the_same(
    start: Start, read: Callable[[], Reader], sent: dict[str, Any], expected: list[KvEvent]
) -> None:
    engine = start()
    reader = read()
    engine.publish_events([sent])
    engine.publish_events([stored(99)])
    await reader.until_block(99)
    assert reader.lists[:-1] == ([expected] if expected else [])


async def test_the_classes_that_vllm_publishes_read_so_too(start: Start, read: Callable[[], Reader]) -> None:
    from vllm.distributed import kv_events as of_vllm

    arguments = {"token_ids": [7, 8], "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None}
    block = of_vllm.BlockStored([3], None, **arguments, extra_keys=[(SALT,)], group_idx=0)
    engine = start()
    reader = read()
    engine.publish_events([of_vllm.AllBlocksCleared(), of_vllm.BlockRemoved([1], "GPU", 0), block])
    engine.publish_events([stored(99)])
    await reader.until_block(99)
    assert reader.lists[0] == [AllBlocksCleared(), BlockRemoved([1]), BlockStored([3], None, [7, 8], 2, SALT)]


async def test_vllm_puts_the_salt_where_it_is_looked_for(start: Start, read: Callable[[], Reader]) -> None:
    """The guess can go once vLLM's events name the salt, as SGLang's do: then `_Stored.cache_salt` has it."""
    from vllm.distributed import kv_events as of_vllm
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys

    salted: Any = SimpleNamespace(cache_salt=SALT, lora_request=None, mm_features=[], prompt_embeds=None)
    keys = [generate_block_hash_extra_keys(salted, begin, begin + 2, 0)[0] for begin in (0, 2)]
    arguments = {"token_ids": [7, 8, 9, 10], "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None}
    block = of_vllm.BlockStored([3, 4], None, **arguments, extra_keys=to_event_extra_keys(keys), group_idx=0)
    engine = start()
    reader = read()
    engine.publish_events([block])
    engine.publish_events([stored(99)])
    await reader.until_block(99)
    assert reader.lists[0] == [BlockStored([3, 4], None, [7, 8, 9, 10], 2, SALT)]
    assert not hasattr(of_vllm.BlockStored, "cache_salt")


async def test_what_is_no_event_is_an_error(start: Start, read: Callable[[], Reader]) -> None:
    engine = start()
    reader = read()
    engine.publish_events([{"type": "BlockStored", "block_hashes": "all"}])
    with pytest.raises(msgspec.DecodeError):
        await asyncio.wait_for(reader.task, 10)


@pytest.mark.parametrize("is_answered", [True, False], ids=["waiting for events", "waiting for a replay"])
async def test_closing_ends_the_stream_at_once_and_leaves_nothing(
    feed: KvEventFeed, start: Start, read: Callable[[], Reader], is_answered: bool
) -> None:
    engine = start(replay_endpoint=feed.publisher["replay_endpoint"] if is_answered else None)
    engine.publish(1)
    reader = read()
    if is_answered:
        await reader.until_block(0)
    else:
        await asyncio.sleep(0.05)
    sockets = Path(feed.publisher["endpoint"].removeprefix("ipc://")).parent
    assert sockets.is_dir()
    began = time.monotonic()
    feed.close()
    await asyncio.wait_for(reader.task, 5)
    assert time.monotonic() - began < 0.5
    assert not sockets.exists()
    feed.close()
    assert [events async for events in feed.batches()] == []


async def test_cancelling_the_reader_ends_it(start: Start, read: Callable[[], Reader]) -> None:
    engine = start()
    engine.publish(1)
    reader = read()
    await reader.until_block(0)
    reader.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader.task
    again = read()
    await again.until_block(0)


def test_the_sockets_are_private_and_their_paths_short(feed: KvEventFeed) -> None:
    from vllm.config import KVEventsConfig

    settings = KVEventsConfig(enable_kv_cache_events=True, **feed.publisher)
    paths = [Path(str(path).removeprefix("ipc://")) for path in (settings.endpoint, settings.replay_endpoint)]
    assert all(len(str(path)) < 107 for path in paths)
    assert paths[0].parent.stat().st_mode & 0o077 == 0
    assert settings.buffer_steps < 1000  # else the engine's ROUTER socket drops replies
