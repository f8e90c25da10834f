"""The processes of an engine: whether they work, and their end."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


class EngineProcesses:
    """What this process and its descendants have started since this object was made: one engine.

    It knows the processes that it has seen once, even if their parents have ended since.
    """

    def __init__(self) -> None:
        self._others = _descendants([psutil.Process()])
        self._known: set[psutil.Process] = set()

    def look(self) -> None:
        """Take note of processes that have come or gone.  This reads the machine's whole table of processes."""
        found = _descendants([psutil.Process(), *filter(psutil.Process.is_running, self._known)])
        self._others |= set(filter(_is_resource_tracker, found - self._others - self._known))
        self._known = {process for process in (found | self._known) - self._others if process.is_running()}

    def stopped(self) -> list[int]:
        """Return the ids of those that a signal has stopped (SIGSTOP), so that they make no step until another does."""
        stopped = []
        for process in self._known:
            with suppress(psutil.NoSuchProcess):
                if process.status() == psutil.STATUS_STOPPED:
                    stopped.append(process.pid)
        return stopped

    def cpu_s(self) -> float:
        """Return the CPU time that they have used so far, that of their ended children included, or have waited for."""
        seconds = 0.0
        for process in self._known:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
            seconds += _waited_for_cpu_s(process.pid)
        return seconds

    def kill(self) -> None:
        """End them all, also those that are stopped (SIGKILL).  It may be called twice."""
        self.look()
        for process in self._known:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Whether it is Python's, which ends by itself after all who use it, and must outlive them: it removes what shared
    memory they leave."""
    with suppress(psutil.NoSuchProcess):
        return any("multiprocessing.resource_tracker" in argument for argument in process.cmdline())
    return False


def _waited_for_cpu_s(pid: int) -> float:
    """Return how long a process's threads were ready while others had the CPU; 0 where the kernel does not say."""
    nanoseconds = 0
    for statistics in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            nanoseconds += int(statistics.read_text().split()[1])
    return nanoseconds / 1e9


def _descendants(roots: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Return what these have started, and so on, by one reading of the table: that costs far more than the rest."""
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            children.setdefault(process.ppid(), []).append(process.pid)
    found: set[psutil.Process] = set()
    left = [root.pid for root in roots]
    while left:
        parent = left.pop()
        for pid in children.pop(parent, ()):
            left.append(pid)
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.ppid() == parent:  # otherwise it has ended meanwhile, and another has its number
                    found.add(process)
    return found
