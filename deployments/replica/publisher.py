"""Publishes a replica's load and the changes of its prefix cache to all frontends, on their channels."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from functools import partial

from app.background import BackgroundTasks
from app.channel.server import ChannelServer
from app.engines.base import Engine, EngineInfo
from app.kv_cache.event_translator import EventTranslator
from app.messages import EngineStats, KvUpdate, ReplicaLoad

logger = logging.getLogger("baton.publisher")

POLL_S = 0.01
"""How often a busy engine is polled, besides the calls of `poll_soon`."""
POLLS_PER_STATS = 10
"""How many polls there are for each call of the engine's `stats`, which costs more and counts the used blocks."""
IDLE_POLL_S = 1.0
"""How often an idle replica tells its load, for which it asks its engine nothing.  What is left of the past fades
meanwhile, and a frontend that waits for it, or for decode to read its KV, sees that it does not stand still
(app/channel/silence.py)."""

NOTHING = KvUpdate([], [], is_reset=True)
"""What is said of a cache of which nothing is known."""


class Publisher:
    """Publishes the load when it changes, and each change of the prefix cache.

    If it has not changed it is published all the same: with each call of the engine's `stats` while there is any load,
    and every IDLE_POLL_S seconds while there is none.  A frontend combines the last message with its own requests that
    began or ended while the message was on its way, and the next message corrects its errors.
    """

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        info: EngineInfo,
        server: ChannelServer,
        observe: Callable[[EngineStats], ReplicaLoad],
        background: BackgroundTasks,
    ) -> None:
        """`observe` is called with each poll.  It gets the engine's last stats, and returns the replica's load."""
        self._replica_id = replica_id
        self._engine = engine
        self._server = server
        self._observe = observe
        self._stats = EngineStats()
        self._load = ReplicaLoad()
        self._is_busy = asyncio.Event()
        self._will_poll = False
        self._loop = asyncio.get_running_loop()
        self._num_orphans_logged = 0
        background.keep("watch-load", self._watch_load)
        server.publish_load(self._load)
        if info.prefix_cache == "published":
            server.snapshot = lambda: NOTHING
            background.keep("follow-cache", partial(self._follow_cache, info))

    def poll_soon(self) -> None:
        """Publish the load, which is changing now, once everything else in this turn of the event loop has run."""
        if not self._will_poll:
            self._will_poll = True
            self._loop.call_soon(self._poll)

    def _poll(self, *, always: bool = False) -> None:
        self._will_poll = False
        load = self._observe(self._stats)
        if always or load != self._load:
            self._load = load
            self._server.publish_load(load)
        if load.sequences or load.queued_tokens or load.used_blocks:
            self._is_busy.set()

    async def _watch_load(self) -> None:
        """Notice the changes for which nobody calls `poll_soon`: those of the engine's queue and of the used blocks.

        The engine's stats are read once more before this rests, because a finished prefill may leave blocks in use
        until decode has pulled them.
        """
        while True:
            await self._until_busy()
            self._is_busy.clear()
            for _ in range(POLLS_PER_STATS):
                await asyncio.sleep(POLL_S)
                self._poll()
            self._stats = await self._engine.stats()
            self._poll(always=True)

    async def _until_busy(self) -> None:
        """Wait for work, and publish the load now and then until it comes."""
        while not self._is_busy.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_POLL_S):
                    await self._is_busy.wait()
            if not self._is_busy.is_set():
                self._poll(always=True)

    async def _follow_cache(self, info: EngineInfo) -> None:
        """Publish what happens to the cache, from a state in which nothing is known to be there."""
        translator = EventTranslator(info.num_blocks, info.block_size_tokens)
        self._server.snapshot = translator.snapshot
        try:
            async with aclosing(self._engine.kv_events()) as batches:
                async for events in batches:
                    self._publish_kv(translator.apply(events))
                    self._log_orphans(translator)
        finally:  # nobody follows any more
            self._server.snapshot = lambda: NOTHING
            self._publish_kv(NOTHING)

    def _publish_kv(self, update: KvUpdate) -> None:
        if update.is_reset:
            logger.info("replica_id=%s all cached blocks are forgotten", self._replica_id)
        if update.stored or update.removed or update.is_reset:
            self._server.publish_kv(update)

    def _log_orphans(self, translator: EventTranslator) -> None:
        """Each time that they have doubled: what follows a lost event is many."""
        if translator.num_orphans > 2 * self._num_orphans_logged:
            self._num_orphans_logged = translator.num_orphans
            logger.warning("replica_id=%s cached blocks left out so far: %d", self._replica_id, translator.num_orphans)
