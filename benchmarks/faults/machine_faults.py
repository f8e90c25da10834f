"""Faults of the machine, where it is made small for that: scripts/small_machine.sh bounds the disk and the memory.

A machine that is not bounded has none of these kinds: its real disk is never filled, nor its real memory.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
import psutil

from benchmarks.faults.fault import Fault
from benchmarks.faults.fleet import Fleet, Target
from benchmarks.faults.process_faults import ProcessFault

FULL_S = 15.0
"""How long the disk stays full."""
MOST_BYTES = 4 * 2**30
"""A larger file system is not filled."""
CHUNK_BYTES = 2**20
PRESSURE_S = 60.0
"""How long it may take until Ray has killed a worker because memory is short."""
POLL_S = 0.2
WORKERS: tuple[Target, ...] = ("prefill replica", "decode replica", "frontend", "controller")
CGROUP = Path("/sys/fs/cgroup/memory")

_BALLAST = """
import pathlib, time
pathlib.Path("/proc/self/oom_score_adj").write_text("1000")  # if the kernel has to kill somebody, then this
cgroup, kept = pathlib.Path("{cgroup}"), []
read = lambda name: int((cgroup / name).read_text())
while True:
    if read("memory.usage_in_bytes") < 0.98 * read("memory.limit_in_bytes"):
        kept.append(b"x" * 2**24)
    else:
        time.sleep(0.05)
"""


class DiskFull(msgspec.Struct, frozen=True):
    """The file system on which Ray and the application write everything is full for some time."""

    folder: str
    """Where Ray's files are, on a file system of their own."""
    kills: Target | None = None
    """What is killed meanwhile, so that it has to start on a full disk."""

    @property
    def name(self) -> str:
        return "disk full" + (f", and a {self.kills} starts" if self.kills else "")

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if there is nothing to kill."""
        path = Path(self.folder, "ballast")
        try:
            await asyncio.to_thread(_fill, path)
            if self.kills is not None:
                await ProcessFault(self.kills, "kill").strike(fleet, random)
            await asyncio.sleep(FULL_S)
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)


def _fill(path: Path) -> None:
    """Write a file until its file system is full.  Raises OSError for anything else."""
    chunk = bytes(CHUNK_BYTES)
    with path.open("wb", buffering=0) as file:
        while file.write(chunk) == CHUNK_BYTES and os.statvfs(path.parent).f_bavail:
            pass


class MemoryPressure(msgspec.Struct, frozen=True):
    """Memory is nearly used up, until Ray's memory monitor has killed one of its workers."""

    name: str = "memory pressure"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if no worker was killed."""
        workers = [process for target in WORKERS for (process,) in await fleet.processes(target)]
        deadline = time.monotonic() + PRESSURE_S
        async with _ballast():
            while all(worker.is_running() for worker in workers):
                if time.monotonic() > deadline:
                    raise LookupError(f"with memory used up nobody was killed within {PRESSURE_S:.0f} s")
                await asyncio.sleep(POLL_S)


@asynccontextmanager
async def _ballast() -> AsyncIterator[None]:
    """Use up the memory that is left in this cgroup."""
    ballast = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", _BALLAST.format(cgroup=CGROUP)])
    try:
        yield
    finally:
        ballast.kill()
        await asyncio.to_thread(ballast.wait)


def machine_faults(folder: str | None, cgroup: Path = CGROUP) -> list[Fault]:
    """Return the kinds that this machine is bounded for; `folder` is RAY_TMPDIR."""
    found: list[Fault] = []
    if folder is not None and _is_small_disk(folder):
        found += [DiskFull(folder), DiskFull(folder, "decode replica")]
    limit = cgroup / "memory.limit_in_bytes"
    if limit.is_file() and int(limit.read_text()) < psutil.virtual_memory().total / 2:
        found.append(MemoryPressure())
    return found


def _is_small_disk(folder: str) -> bool:
    """Whether a folder is the root of a small file system in memory."""
    kinds = {partition.mountpoint: partition.fstype for partition in psutil.disk_partitions(all=True)}
    is_tmpfs = kinds.get(os.path.realpath(folder)) == "tmpfs"
    return is_tmpfs and psutil.disk_usage(folder).total <= MOST_BYTES
