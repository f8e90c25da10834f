"""Reserves ports, so that two replicas on a node never get the same one."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

from app.errors import ConfigError


class ReservedPort:
    """A port that no other replica on this node takes while this object exists."""

    def __init__(self, number: int, lock: IO[str]) -> None:
        self.number = number
        self._lock = lock

    def close(self) -> None:
        """Give up the port before the process ends."""
        self._lock.close()


def reserve_port(port_min: int, port_max: int) -> ReservedPort:
    """Reserve the first free port of the range on this node, across replicas, applications and clusters.

    An engine binds its port long after it was chosen, so it is not enough that a port is free.  The lock on a file
    named after the port reserves it, and the kernel drops the lock when the process ends.  Raises ConfigError if all
    ports are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"baton-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for number in range(port_min, port_max + 1):
        lock = open(folder / str(number), "w")  # noqa: SIM115  it stays open as long as the port is reserved
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        if _is_free(number):
            return ReservedPort(number, lock)
        lock.close()
    raise ConfigError("transfer.port_max", f"no free port from {port_min} to {port_max} on this node")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a TCP port of this machine that nobody used a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
