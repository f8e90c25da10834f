"""Ports of which two replicas on a node never get the same."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

from app.errors import ConfigError


class ReservedPort:
    """A port that no other replica on this node takes while this object lives."""

    def __init__(self, number: int, lock: IO[str]) -> None:
        self.number = number
        self._lock = lock

    def close(self) -> None:
        """Give the port up before the process ends."""
        self._lock.close()


def reserve_port(port_min: int, port_max: int) -> ReservedPort:
    """Reserve the first free port of the range on this node, across replicas, applications and clusters.

    An engine binds its port long after it was chosen, so a free port alone proves nothing: the lock on a file
    named after the port does, and the kernel drops it with the process.  Raises ConfigError if all are taken.
    """
    folder = Path(tempfile.gettempdir()) / f"baton-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for number in range(port_min, port_max + 1):
        lock = open(folder / str(number), "w")  # noqa: SIM115  held open for as long as the port is
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
    """A TCP port of this machine that nobody used a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
