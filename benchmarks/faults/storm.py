"""Losses one after another, without a pause in which all would be whole again."""

from __future__ import annotations

import asyncio
import signal
import time
from random import Random
from typing import Literal

import msgspec
import psutil

from benchmarks.faults.fleet import Fleet, NotWhole, Target
from benchmarks.faults.process_faults import send_signal

LONGEST_PAUSE_S = 1.0
"""Between two losses, so that they come at any moment of the sequences that run."""
READY_TIMEOUT_S = 240.0
POLL_S = 0.1


class Storm(msgspec.Struct, frozen=True):
    """Takes `num` victims, each as soon as another one is there that could go on with its sequences, if the pool has
    more than one."""

    target: Target
    act: Literal["kill", "stop"]
    num: int

    @property
    def name(self) -> str:
        return f"{self.num} times in a row: {'kill -9' if self.act == 'kill' else 'stop'} {self.target}"

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Return how many were taken, when all are gone: those that are stopped until they are replaced.

        Raises NotWhole.
        """
        number = signal.SIGKILL if self.act == "kill" else signal.SIGSTOP
        began = time.monotonic()
        taken: list[psutil.Process] = []
        for _ in range(self.num):
            await asyncio.sleep(random.uniform(0, LONGEST_PAUSE_S))
            victim = random.choice(await self._willing(fleet))
            send_signal(victim, number)
            taken += victim
        _, left = await asyncio.to_thread(psutil.wait_procs, taken, READY_TIMEOUT_S)
        if left:
            raise NotWhole(f"after {READY_TIMEOUT_S:.0f} s some of those that were taken are still there: {left}")
        return f"{self.num} in {time.monotonic() - began:.0f} s"

    async def _willing(self, fleet: Fleet) -> list[list[psutil.Process]]:
        """Wait until enough of them run, and return them.  Raises NotWhole."""
        least = min(2, fleet.pools[self.target.split()[0]])
        deadline = time.monotonic() + READY_TIMEOUT_S
        while len(running := [each for each in await fleet.processes(self.target) if all(map(_runs, each))]) < least:
            if time.monotonic() > deadline:
                raise NotWhole(f"after {READY_TIMEOUT_S:.0f} s there are not {least} of: {self.target}")
            await asyncio.sleep(POLL_S)
        return running


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def storms(num: int | None, *, has_engines: bool) -> list[Storm]:
    """Return all kinds, of `num` losses; by default of many on simulated engines, which are replaced in seconds."""
    num = num or (4 if has_engines else 25)
    roles: tuple[Target, ...] = (
        ("decode engine", "prefill engine") if has_engines else ("decode replica", "prefill replica")
    )
    return [Storm(target, act, num) for target in roles for act in ("kill", "stop")]
