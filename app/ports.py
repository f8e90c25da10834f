"""Reserves ports, so that two replicas on a node never get the same one.

The files that say so lie in a folder of the machine's shared temporary directory under a name that anybody can guess.
So nothing that lies there is trusted: another user may have made the folder first, or have put links into it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import tempfile
from pathlib import Path

from app.errors import ConfigError


class ReservedPort:
    """A port that no other replica on this node takes while this object exists."""

    def __init__(self, number: int, lock: int) -> None:
        """`lock` is the file descriptor of a locked file."""
        self.number = number
        self._lock = lock

    def close(self) -> None:
        """Give up the port before the process ends.  To be called once."""
        os.close(self._lock)


def reserve_port(port_min: int, port_max: int) -> ReservedPort:
    """Reserve the first free port of the range on this node, across replicas, applications and clusters.

    An engine binds its port long after it was chosen, so it is not enough that a port is free.  The lock on a file
    named after the port reserves it, and the kernel drops the lock when the process ends.  Raises ConfigError if all
    ports are taken, and RuntimeError if the files' folder may be in other hands than this user's.
    """
    folder = _open_own_folder(Path(tempfile.gettempdir()) / f"baton-ports-{os.getuid()}")
    try:
        for number in range(port_min, port_max + 1):
            if (lock := _lock(folder, str(number))) is None:
                continue
            if _is_free(number):
                return ReservedPort(number, lock)
            os.close(lock)
    finally:
        os.close(folder)
    raise ConfigError("transfer.port_max", f"no free port from {port_min} to {port_max} on this node")


def _open_own_folder(path: Path) -> int:
    """Make the folder if it is not there, and return its file descriptor.

    Raises RuntimeError unless it is a folder, not a link to one, of this user, in which nobody else can write.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise RuntimeError(f"cannot reserve ports in {path}, which is to be a folder of this user: {error}") from error
    found = os.fstat(folder)
    if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return folder
    os.close(folder)
    raise RuntimeError(
        f"cannot reserve ports in {path}: user {found.st_uid} made it, with mode {stat.S_IMODE(found.st_mode):o}, and "
        f"only user {os.getuid()} should be able to write there; remove it, or set TMPDIR"
    )


def _lock(folder: int, name: str) -> int | None:
    """Lock a file in the folder, without writing to it.  Returns its file descriptor; None if another process has it.

    A link counts as locked.  One that is there from before the folder was this user's own may lead anywhere.
    """
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode=0o600, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


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
