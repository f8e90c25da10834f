"""Faults of processes: signals to what runs on this machine."""

from __future__ import annotations

import asyncio
import signal
from random import Random
from typing import Literal

import msgspec
import psutil

from benchmarks.faults.fleet import Fleet, Target

REPLICAS: tuple[Target, ...] = ("prefill replica", "decode replica")
ENGINES: tuple[Target, ...] = ("prefill engine", "decode engine")
AROUND: tuple[Target, ...] = ("frontend", "HAProxy", "controller")
STOPS_S = (1.0, 10.0, 60.0)
"""How long processes are stopped before they go on."""
FOR_GOOD_S = 300.0
"""The longest time for which processes stay stopped that have to be replaced."""

GONE_S = 60.0
"""The longest time until a killed process is gone, and the replica whose engine was killed."""


class ProcessFault(msgspec.Struct, frozen=True):
    """Signals to the processes of one replica, engine or other part."""

    target: Target
    act: Literal["kill", "stop"]
    hold_s: float = 0.0
    """How long they are stopped; FOR_GOOD_S for processes that nobody lets go on."""

    @property
    def name(self) -> str:
        if self.act == "kill":
            return f"kill -9 {self.target}"
        return f"stop {self.target} " + ("for good" if self.hold_s == FOR_GOOD_S else f"{self.hold_s:g} s")

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Make the fault, and return when it is over.  Stopped processes go on in any case."""
        victim = random.choice(await fleet.victims(self.target))
        if self.act == "kill":
            replica = [fleet.replica_of(victim[0])] if self.target in ENGINES else []
            send_signal(victim, signal.SIGKILL)
            # The kernel takes a while on a busy machine, and replicas too, and until then all seems to be whole.
            await asyncio.to_thread(psutil.wait_procs, [*victim, *replica], GONE_S)
            return ""
        try:
            send_signal(victim, signal.SIGSTOP)
            _, alive = await asyncio.to_thread(psutil.wait_procs, victim, self.hold_s)
        finally:
            send_signal(victim, signal.SIGCONT)
        if self.hold_s == FOR_GOOD_S and alive:
            raise LookupError(f"a stopped {self.target} was not replaced within {FOR_GOOD_S:.0f} s")
        return ""


def send_signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def process_faults(*, has_engines: bool) -> list[ProcessFault]:
    """Return all kinds; engines have processes of their own unless they are simulated."""
    replaced = (*REPLICAS, *(ENGINES if has_engines else ()))
    targets = (*replaced, *AROUND)
    return [
        *(ProcessFault(target, "kill") for target in targets),
        *(ProcessFault(target, "stop", hold_s) for target in targets for hold_s in STOPS_S),
        *(ProcessFault(target, "stop", FOR_GOOD_S) for target in replaced),
    ]
