"""Background tasks with an owner: none of them ends unnoticed.

A task that ends is either started again, or its end is the end of what it works for (`BackgroundTasks`), or whoever
started it is told of its death (`watch`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any
from weakref import WeakSet

from app.errors import EngineDead

logger = logging.getLogger("baton.background")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
"""The pauses before a task is started again: each is twice the last one, up to this.  A task that has run for longer
than this begins with the first again."""

Work = Callable[[], Coroutine[Any, Any, None]]
"""Begins anew with each call, and runs until it is cancelled or fails."""

_watched: WeakSet[asyncio.Task[Any]] = WeakSet()


def watch(task: asyncio.Task[Any], on_death: Callable[[BaseException], object]) -> None:
    """Log it if `task` ends by an error, and call `on_death` with that.  A task that is cancelled has not died."""

    def on_end(_: object) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task=%s died", task.get_name(), exc_info=error)
            on_death(error)

    _watched.add(task)
    task.add_done_callback(on_end)


def is_watched(task: asyncio.Task[Any]) -> bool:
    """Whether `task` has an owner who hears of its end."""
    return task in _watched


class BackgroundTasks:
    """The background tasks of one owner, such as a replica or an engine."""

    def __init__(self, owner: str, on_death: Callable[[EngineDead], object]) -> None:
        """`owner` is its name in the log.  `on_death` is called with the reason why the owner cannot go on."""
        self._owner = owner
        self._on_death = on_death
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, task: asyncio.Task[Any]) -> bool:
        return task in self._tasks

    def keep(self, name: str, work: Work) -> None:
        """Run `work`, and start it again after a pause whenever it ends.  If it raises EngineDead, so has the owner."""
        self._spawn(name, self._keep(name, work))

    def need(self, name: str, work: Work) -> None:
        """Run `work`, which cannot be started again: whatever ends it ends the owner."""
        self._spawn(name, self._need(name, work))

    def _spawn(self, name: str, task: Coroutine[Any, Any, None]) -> None:
        spawned = asyncio.create_task(task, name=name)
        self._tasks.add(spawned)
        _watched.add(spawned)

    async def _keep(self, name: str, work: Work) -> None:
        pause_s = 0.0
        while True:
            began = time.monotonic()
            try:
                await asyncio.sleep(pause_s)
                await work()
                logger.error("%s %s ended, and is started again", self._owner, name)
            except EngineDead as death:
                self._die(name, death)
                return
            except Exception:
                logger.exception("%s %s failed, and is started again", self._owner, name)
            has_lasted = time.monotonic() - began > pause_s + LONGEST_PAUSE_S
            pause_s = FIRST_PAUSE_S if has_lasted or not pause_s else min(LONGEST_PAUSE_S, 2 * pause_s)

    async def _need(self, name: str, work: Work) -> None:
        try:
            await work()
        except EngineDead as death:
            self._die(name, death)
        except Exception as error:
            logger.exception("%s cannot go on without %s", self._owner, name)
            self._die(name, EngineDead(f"{name} failed: {error!r}"))
        else:
            self._die(name, EngineDead(f"{name} ended"))

    def _die(self, name: str, death: EngineDead) -> None:
        logger.error("%s %s: %s", self._owner, name, death)
        self._on_death(death)

    async def stop(self, *names: str) -> None:
        """End the tasks with these names, or all.  It may be called twice."""
        tasks = {task for task in self._tasks if not names or task.get_name() in names}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._tasks -= tasks
