"""What a replica tells of itself, and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from app.background import BackgroundTasks
from app.channel.server import ChannelServer, FrontendChannel
from app.engines.base import EngineInfo
from app.engines.prompt_queue import PromptQueue
from app.errors import EngineDead
from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EngineStats,
    KvEvent,
    KvUpdate,
    PrefixCache,
    ReplicaLoad,
)
from deployments.replica import publisher as publishing
from deployments.replica.publisher import Publisher
from tests.unit.waiting import until

FIRST, SECOND = BlockStored([11], None, [1, 2], 2), BlockStored([12], 11, [3, 4], 2)
NAMES = list(block_hashes([1, 2, 3, 4], 2, root_hash(None)))


class Engine:
    """What a publisher asks of an engine."""

    def __init__(self) -> None:
        self.prompt_queue = PromptQueue()
        self.used_blocks = 0
        self.num_polls = 0
        self.is_dead = False
        self.events: asyncio.Queue[list[KvEvent] | Exception | None] = asyncio.Queue()

    async def stats(self) -> EngineStats:
        self.num_polls += 1
        if self.is_dead:
            raise EngineDead
        return EngineStats(num_used_blocks=self.used_blocks)

    async def kv_events(self) -> AsyncIterator[list[KvEvent]]:
        while (events := await self.events.get()) is not None:
            if isinstance(events, Exception):
                raise events
            yield events


class Replica:
    """A replica around that engine, and the one frontend that listens to it."""

    def __init__(self, *, prefix_cache: PrefixCache = "published") -> None:
        self.engine = Engine()
        self.num_requests = 0
        self.prefill_share = 0.0
        self.server = ChannelServer("r", self._run)
        info = EngineInfo(
            engine="sim",
            version="1",
            num_blocks=8,
            block_size_tokens=2,
            max_model_len=64,
            prefix_cache=prefix_cache,
        )
        engine: Any = self.engine
        self.deaths: list[EngineDead] = []
        self.background = BackgroundTasks("replica_id=r", self.deaths.append)
        self.publisher = Publisher("r", engine, info, self.server, self._observe, self.background)
        self.channel = FrontendChannel("l", None, self.server.snapshot)
        self.server.channels["l"] = self.channel
        self.loads: list[ReplicaLoad] = []
        self.updates: list[KvUpdate] = []

    async def _run(self, *_: Any) -> None: ...

    def _observe(self, stats: EngineStats) -> ReplicaLoad:
        queued_tokens = self.engine.prompt_queue.queued_tokens
        if (
            not self.num_requests
        ):  # it takes more polls to fade than a busy replica makes until it notices that it idles
            self.prefill_share = max(0.0, self.prefill_share - 1 / (4 * publishing.POLLS_PER_STATS))
        return ReplicaLoad(
            self.num_requests, queued_tokens, stats.num_used_blocks, prefill_share=self.prefill_share, window_s=3.0
        )

    def heard(self) -> tuple[list[ReplicaLoad], list[KvUpdate]]:
        """All that the frontend was told so far."""
        batch = self.channel.take_now()
        self.loads += [batch.load] if batch.load else []
        self.updates += [batch.kv] if batch.kv else []
        return self.loads, self.updates


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica()
    yield replica
    await replica.background.stop()
    replica.channel.close()


def load(*counts: int) -> ReplicaLoad:
    """The load that the replica tells with these counts; its window is no sign of any work."""
    return msgspec.structs.replace(ReplicaLoad(*counts), window_s=3.0)


async def turn() -> None:
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_change_of_load_is_published_in_the_next_turn_of_the_loop(replica: Replica) -> None:
    replica.heard()
    replica.publisher.poll_soon()
    replica.num_requests, replica.engine.prompt_queue.queued_tokens = (
        2,
        30,
    )  # what happens before the loop turns is in it
    await turn()
    assert replica.heard()[0][-1] == load(2, 30)
    replica.num_requests = 3
    replica.publisher.poll_soon()
    replica.publisher.poll_soon()
    await turn()
    assert replica.heard()[0][-1] == load(3, 30)


async def test_a_load_that_did_not_change_is_published_again_with_each_poll_only(replica: Replica) -> None:
    """A frontend that misjudged its own part of the load is put right by the next one."""
    replica.num_requests = 1
    replica.publisher.poll_soon()
    await turn()
    assert replica.heard()[0].pop() == load(1)
    replica.publisher.poll_soon()
    await turn()
    assert not replica.heard()[0]
    await until(lambda: replica.engine.num_polls >= 2)
    await turn()
    assert set(replica.heard()[0]) == {load(1)}


async def test_an_idle_replica_says_so_to_a_new_frontend_and_asks_its_engine_nothing(replica: Replica) -> None:
    replica.publisher.poll_soon()
    await asyncio.sleep(2 * publishing.POLL_S * publishing.POLLS_PER_STATS)
    assert replica.engine.num_polls == 0
    assert replica.server._load == load()


async def test_a_busy_engine_is_watched_until_it_is_idle(replica: Replica) -> None:
    replica.engine.prompt_queue.queued_tokens = 10
    replica.publisher.poll_soon()
    await turn()
    replica.engine.prompt_queue.queued_tokens, replica.engine.used_blocks = 0, 5  # the engine says nothing of it
    await until(lambda: replica.server._load == load(0, 0, 5))
    replica.engine.used_blocks = 0
    await until(lambda: replica.server._load == load())
    polls = replica.engine.num_polls
    await asyncio.sleep(4 * publishing.POLL_S * publishing.POLLS_PER_STATS)
    assert replica.engine.num_polls <= polls + 1


async def test_what_is_left_of_the_recent_load_fades_for_the_frontends_of_an_idle_replica(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "IDLE_POLL_S", 0.01)
    replica.prefill_share = 1.0
    replica.num_requests = 1
    replica.publisher.poll_soon()
    await until(lambda: replica.engine.num_polls)
    replica.num_requests = 0
    polls = replica.engine.num_polls
    await until(lambda: replica.server._load == load())
    assert replica.engine.num_polls <= polls + 2


async def test_an_idle_replica_tells_again_and_again_that_it_runs(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "IDLE_POLL_S", 0.01)
    replica.publisher.poll_soon()  # its tasks begin
    for _ in range(3):
        replica.loads.clear()
        await until(lambda: replica.heard()[0] == [load()])
    assert replica.engine.num_polls == 0


async def test_a_queue_that_the_engine_works_off_is_noticed_between_polls(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "POLLS_PER_STATS", 10_000)
    replica.engine.prompt_queue.queued_tokens = 10
    replica.publisher.poll_soon()
    await until(lambda: replica.server._load == load(0, 10))
    replica.engine.prompt_queue.queued_tokens = 4
    await until(lambda: replica.server._load == load(0, 4))
    assert replica.engine.num_polls == 0


async def test_a_dead_engine_is_asked_once(replica: Replica) -> None:
    replica.engine.is_dead = True
    replica.num_requests = 1
    replica.publisher.poll_soon()
    await until(lambda: replica.deaths)
    assert replica.engine.num_polls == 1


async def test_after_an_error_the_load_is_watched_again(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = monkeypatch.context()
    with failing as patch:
        patch.setattr(replica.engine, "stats", lambda: 1 / 0)
        replica.num_requests = 1
        replica.publisher.poll_soon()
        await asyncio.sleep(2 * publishing.POLL_S * publishing.POLLS_PER_STATS)
        assert replica.engine.num_polls == 0
    await until(lambda: replica.engine.num_polls > 0)


async def test_the_caches_changes_are_published_by_the_shared_names(replica: Replica) -> None:
    replica.heard()
    replica.updates.clear()
    await replica.engine.events.put([FIRST])
    await until(lambda: replica.heard()[1])
    await replica.engine.events.put([SECOND, BlockRemoved([11])])
    await until(lambda: len(replica.heard()[1]) == 2)
    assert replica.updates == [KvUpdate([NAMES[0]], []), KvUpdate([NAMES[1]], [NAMES[0]])]
    assert replica.server.snapshot() == KvUpdate([NAMES[1]], [], is_reset=True)


async def test_what_changes_nothing_is_not_published(replica: Replica) -> None:
    replica.heard()
    await replica.engine.events.put([FIRST, BlockRemoved([11])])
    await replica.engine.events.put([BlockRemoved([99])])
    await until(replica.engine.events.empty)
    await turn()
    assert not replica.channel._kv


async def test_a_reset_reaches_the_frontends_and_the_log(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    replica.heard()
    await replica.engine.events.put([FIRST])
    await replica.engine.events.put([AllBlocksCleared()])
    await until(lambda: any(update.is_reset for update in replica.heard()[1][1:]))
    assert replica.updates[-1].stored == []
    assert "replica_id=r all cached blocks are forgotten" in caplog.text


async def test_orphans_are_logged_each_time_they_double(replica: Replica, caplog: pytest.LogCaptureFixture) -> None:
    for key in range(20, 28):
        await replica.engine.events.put([BlockStored([key], 99, [1, 2], 2)])
    await until(replica.engine.events.empty)
    await turn()
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert lines == [f"replica_id=r cached blocks left out so far: {count}" for count in (1, 3, 7)]


@pytest.mark.parametrize("ending", [RuntimeError("broken"), None])
async def test_when_the_cache_is_followed_no_longer_it_is_forgotten_and_then_followed_anew(
    replica: Replica, ending: Exception | None
) -> None:
    replica.heard()
    await replica.engine.events.put([FIRST])
    await until(lambda: replica.server.snapshot().stored)  # type: ignore[union-attr]
    replica.heard()
    await replica.engine.events.put(ending)
    await until(lambda: replica.heard()[1][-1].is_reset)
    assert replica.server.snapshot() == KvUpdate([], [], is_reset=True)
    await replica.engine.events.put([FIRST, SECOND])
    await until(lambda: replica.heard()[1][-1] == KvUpdate(NAMES, []))
    assert replica.server.snapshot() == KvUpdate(NAMES, [], is_reset=True)


async def test_a_replica_without_events_publishes_nothing_of_its_cache() -> None:
    replica = Replica(prefix_cache="none")
    await turn()
    assert replica.channel.take_now().kv is None
    await replica.background.stop()
