"""Strikes with one fault after another under load, and waits each time until all is whole again."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from random import Random

from rich.console import Console

from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fault import Fault
from benchmarks.faults.fleet import Fleet, NotWhole
from benchmarks.faults.load import Load
from benchmarks.faults.report import Struck

RECOVERY_TIMEOUT_S = 240.0
BEFORE_S, AFTER_S = 1.0, 1.0
"""How long the load runs before and after each fault.  Answers that were under way then count for it."""
LEAK_CHECK_EVERY = 10
"""After so many faults the load pauses, to see whether KV blocks are held for nobody."""
RELEASE_TIMEOUT_S = 90.0
"""Blocks may be held for so long: until leases of 30 s have ended, and answers to clients that left."""


class Campaign:
    """Some faults on one application."""

    def __init__(self, fleet: Fleet, load: Load, console: Console) -> None:
        self._fleet = fleet
        self._load = load
        self._console = console
        self.struck: list[Struck] = []
        self.num_leaked = 0
        """KV blocks that were still held when nothing ran."""

    async def run(self, faults: Iterable[Fault], random: Random, longest_s: float = math.inf) -> str:
        """Strike with each fault that can begin within `longest_s`.

        Returns why that ended early, if the application did not come back; "" otherwise.

        Raises UnsteadyAnswer.
        """
        try:
            await self._fleet.learn()
            await self._load.ask_undisturbed()
            self._load.start()
            try:
                await self._strike_all(faults, random, time.monotonic() + longest_s)
            finally:
                await self._load.stop()
        except NotWhole as problem:
            return str(problem)
        finally:
            await self._fleet.close()
        return ""

    async def _strike_all(self, faults: Iterable[Fault], random: Random, until: float) -> None:
        for number, fault in enumerate(faults, start=1):
            if time.monotonic() > until:
                break
            await self._strike(fault, random)
            if number % LEAK_CHECK_EVERY == 0:
                await self._count_leaked()
        await self._count_leaked()

    async def _strike(self, fault: Fault, random: Random) -> None:
        self._console.print(f"{len(self.struck) + 1:4d}  {fault.name}", markup=False, end="")
        await asyncio.sleep(BEFORE_S)
        began_at, seen, problem, recovery_s = time.monotonic(), "", "", 0.0
        try:
            seen = await fault.strike(self._fleet, random) or ""
        except (BadAnswer, LookupError) as error:
            problem = str(error)
        try:
            await self._fleet.until_whole(RECOVERY_TIMEOUT_S)
            recovery_s = time.monotonic() - began_at
        except NotWhole:
            self.struck.append(Struck(fault.name, began_at, time.monotonic(), None, problem or "did not come back"))
            raise
        await asyncio.sleep(AFTER_S)
        self.struck.append(Struck(fault.name, began_at, time.monotonic(), recovery_s, problem, seen))
        said = "".join(f"  {text}" for text in (seen, problem) if text)
        self._console.print(f": whole after {recovery_s:.1f} s{said}", markup=False)

    async def _count_leaked(self) -> None:
        await self._load.pause()
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        while (held := await self._fleet.held_blocks()) != 0 and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        if held != 0:
            self.num_leaked += held or 0
            self._console.print(f"      {held} KV blocks are held for nobody")
        self._load.resume()
