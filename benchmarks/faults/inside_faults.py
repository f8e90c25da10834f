"""Faults inside processes, by the agent (agent_calls.py): in transfer descriptors, in tasks, and of the wall clock."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import msgspec
import psutil

from benchmarks.faults.agent_calls import call
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fleet import Fleet, Target
from benchmarks.faults.inside import CHANGES

INSIDE = "benchmarks.faults.inside"
SPOILT_S, AGED_S = 3.0, 16.0
"""How long descriptors are changed, and how long they are only remembered before that, to hand in expired ones."""
COMES_S = 90.0
"""How long the first descriptor that is changed may take to come: prefill may be left out after an earlier fault."""
RESTART_S, REPLACED_S = 5.0, 90.0
"""How long a task may take to be where it was before it failed, or a process to be replaced that has lost one."""
SKEW_S, SKEWED_S = 60, 10.0
"""By how many seconds a wall clock is wrong, and for how long."""
POLL_S = 0.1

OF_REPLICAS = (
    *("engine-health", "follow-cache", "guard", "record-links", "send-", "sequence-"),
    *("watch-load", "worker-metrics"),
)
OF_DECODE = ("links",)
OF_FRONTENDS = ("guard", "keys", "tenants", "channel-")
"""How the names of all tasks with an owner begin (tests/unit/deployments/test_background_tasks.py lists them)."""
OF_ENGINES = {
    "sim": ("sim-progress", "sim-steps", "follow-role"),
    "vllm": ("vllm-progress", "vllm-pump", "follow-role"),
    "sglang": ("sglang-progress",),
}


async def inside(process: psutil.Process, function: str, **arguments: Any) -> Any:
    """Call a function of inside.py in a process of the application.  Raises LookupError, and RuntimeError."""
    return await asyncio.to_thread(partial(call, process.pid, f"{INSIDE}:{function}", **arguments))


async def _victims(fleet: Fleet, target: Target) -> list[psutil.Process]:
    return [process for (process,) in await fleet.victims(target)]


class DescriptorFault(msgspec.Struct, frozen=True):
    """All transfer descriptors that decode replicas take for some time are changed in one way."""

    change: str

    @property
    def name(self) -> str:
        return f"descriptor: {self.change}"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if no descriptor came meanwhile."""
        replicas = await _victims(fleet, "decode replica")
        if self.change == "expired":
            await self._spoil(replicas, "")
            await asyncio.sleep(AGED_S)
        await self._spoil(replicas, self.change)
        has_come = await self._has_one_come(replicas)
        await asyncio.sleep(SPOILT_S)
        await self._spoil(replicas, "")
        if not has_come:
            raise LookupError("no descriptor came")

    async def _has_one_come(self, replicas: list[psutil.Process]) -> bool:
        deadline = time.monotonic() + COMES_S
        while not any([await inside(replica, "num_spoilt") for replica in replicas]):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _spoil(self, replicas: list[psutil.Process], change: str) -> None:
        for replica in replicas:
            await inside(replica, "spoil", change=change)


class TaskFault(msgspec.Struct, frozen=True):
    """An exception in one task of one process."""

    target: Target
    task: str

    @property
    def name(self) -> str:
        return f"exception in {self.target}'s {self.task.rstrip('-')}"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises BadAnswer if the process goes on without what the task does."""
        victim = random.choice(await _victims(fleet, self.target))
        before = await inside(victim, "tasks")
        task = await inside(victim, "throw", task=self.task)
        if task == self.task:  # the others belong to one connection or sequence
            await self._until_again(victim, before[task].split()[:2])

    async def _until_again(self, victim: psutil.Process, position: list[str]) -> None:
        """Wait until the task waits where it did, or until the process has ended as it cannot go on without it."""
        restart_by, replaced_by = time.monotonic() + RESTART_S, time.monotonic() + REPLACED_S
        while victim.is_running():
            try:
                now = await inside(victim, "tasks")
            except LookupError:
                now = {}
            if now.get(self.task, "").split()[:2] == position:
                return
            if time.monotonic() > (restart_by if self.task in now else replaced_by):
                raise BadAnswer(f"{self.task} has not begun anew, and the process goes on without it")
            await asyncio.sleep(POLL_S)


class ClockFault(msgspec.Struct, frozen=True):
    """The wall clock of one replica and of its engine's processes is wrong for some time, as Python shows it."""

    target: Target
    skew_s: int

    @property
    def name(self) -> str:
        return f"clock of {self.target} {abs(self.skew_s)} s {'ahead' if self.skew_s > 0 else 'behind'}"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if the replica has no agent, or goes meanwhile."""
        victim = random.choice(await _victims(fleet, self.target))
        await self._skew(victim, self.skew_s)
        await asyncio.sleep(SKEWED_S)
        await self._skew(victim, 0)

    async def _skew(self, victim: psutil.Process, skew_s: int) -> None:
        for child in victim.children(recursive=True):
            with suppress(LookupError):  # its guard has no agent, nor have tools that its engine has started
                await inside(child, "skew_clock", skew_s=skew_s)
        await inside(victim, "skew_clock", skew_s=skew_s)


def inside_faults(engine: str) -> list[DescriptorFault | TaskFault | ClockFault]:
    """Return all kinds for an application on `engine`."""
    of_replicas = (*OF_REPLICAS, *OF_ENGINES[engine])
    return [
        *(DescriptorFault(change) for change in CHANGES),
        *(TaskFault("prefill replica", task) for task in of_replicas if task != "sequence-"),
        *(TaskFault("decode replica", task) for task in (*of_replicas, *OF_DECODE)),
        *(TaskFault("frontend", task) for task in OF_FRONTENDS),
        *(
            ClockFault(target, skew_s)
            for target in ("prefill replica", "decode replica", "frontend")
            for skew_s in (SKEW_S, -SKEW_S)
        ),
    ]
