"""Measures what a tree of processes costs, CPU time and memory, and ends it: from /proc (Linux)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


class Process(msgspec.Struct, frozen=True):
    """One process at one moment."""

    pid: int
    parent: int
    started_at: int
    """The start in clock ticks since boot.  Together with `pid` it identifies a process for good."""
    cpu_s: float
    """CPU time so far, including that of children that have ended."""
    title: str
    """The command line, or what the process has written over it."""

    def is_alive(self) -> bool:
        now = read_process(self.pid)
        return now is not None and now.started_at == self.started_at


class RoleMemory(msgspec.Struct, frozen=True):
    """The memory of all processes in one role."""

    role: str
    num_processes: int
    pss_bytes: int
    """Proportional set size: a page that n processes share counts as one n-th for each."""


def parse_stat(stat: str, title: str) -> Process | None:
    """Parse a line of /proc/<pid>/stat; None for a zombie."""
    head, _, tail = stat.rpartition(")")  # the name in parentheses may hold anything, even spaces
    pid, _, name = head.partition(" (")
    fields = tail.split()
    if fields[0] in "ZX":
        return None
    return Process(
        pid=int(pid),
        parent=int(fields[1]),
        started_at=int(fields[19]),
        cpu_s=sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S,
        title=title.strip() or name,
    )


def read_process(pid: int) -> Process | None:
    """Return the process with that id; None if there is none."""
    try:
        title = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return parse_stat((PROC / str(pid) / "stat").read_text(), title)
    except (FileNotFoundError, ProcessLookupError):
        return None


def read_tree(*roots: int) -> list[Process]:
    """Return the processes with these ids and all their descendants, parents first."""
    children: dict[int, list[Process]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (process := read_process(int(entry.name))):
            children[process.parent].append(process)
    tree = [process for pid in roots if (process := read_process(pid))]
    for process in tree:  # grows while it is walked
        tree.extend(children[process.pid])
    return tree


def cpu_between(before: list[Process], after: list[Process]) -> float:
    """Return the CPU seconds that the tree used from one reading to the next."""
    earlier = {(process.pid, process.started_at): process.cpu_s for process in before}
    return sum(process.cpu_s - earlier.get((process.pid, process.started_at), 0.0) for process in after)


def pss_bytes(pid: int) -> int:
    """Return the proportional set size; 0 for a process that is gone."""
    try:
        rollup = (PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_by_role(tree: list[Process], roots: dict[int, str]) -> list[RoleMemory]:
    """Return the memory, largest first, of a tree whose roots have the roles `roots` (process id to role)."""
    roles: dict[int, str] = {}
    memory: dict[str, list[int]] = defaultdict(list)
    for process in tree:
        roles[process.pid] = role_of(process.title, roots.get(process.pid), roles.get(process.parent, ""))
        memory[roles[process.pid]].append(pss_bytes(process.pid))
    rows = [RoleMemory(role, len(sizes), sum(sizes)) for role, sizes in memory.items()]
    return sorted(rows, key=lambda row: -row.pss_bytes)


TITLES = {
    r"VLLM::EngineCore": "engine core",
    r"VLLM::Worker": "engine worker",
    r"ray::ServeReplica:[^:]+:(?:Prefill|prefill)\b": "prefill replica",
    r"ray::ServeReplica:[^:]+:(?:Decode|decode)\b": "decode replica",
    r"ray::ServeReplica:": "frontend",
    r"ray::ServeController": "controller",
    r"ray::ProxyActor|haproxy": "HTTP proxy",
    r"ray::|default_worker\.py": "other Ray workers",
    r"raylet|gcs_server|/ray/(dashboard|_private)/|runtime_env_agent|log_monitor": "Ray itself",
}
"""What processes call themselves, and the role that this means.  The first one that matches counts."""

OWNERS = {"prefill": "prefill ", "decode": "decode "}


def role_of(title: str, root_role: str | None, parent_role: str) -> str:
    """Return the role of a process: what it was started as, what it calls itself, or else its parent's role."""
    if root_role is not None:
        return root_role
    role = next((role for pattern, role in TITLES.items() if re.search(pattern, title)), None)
    if role is None:
        return parent_role
    if role.startswith("engine"):
        return OWNERS.get(parent_role.partition(" ")[0], "") + role
    return role


def end_all(tree: list[Process]) -> None:
    """Kill the processes that still run."""
    for process in tree:
        if process.is_alive():
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def end_in_order(processes: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Ask the processes to end, in this order, and then kill those that are left, children included.

    They have `timeout_s` seconds together.
    """
    tree = read_tree(*(process.pid for process in processes))
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            tree += read_tree(process.pid)  # with what it has started since
            process.kill()
            process.wait()
    end_all(tree)
