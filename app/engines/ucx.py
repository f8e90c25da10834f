"""Finds out from the log of UCX, the library under NIXL, by which transport KV really moves.

NIXL has no call that tells the chosen transport, and UCX falls back to TCP silently.  At log level ``info`` UCX
writes one line for each kind of peer it connects to, e.g.
``src intra-node cfg#1 rma(cuda_ipc/cuda) am(tcp/lo)``.  That line can be relied on.
"""

from __future__ import annotations

import logging
import os
import pty
import re
import threading

logger = logging.getLogger("baton.ucx")

LANES_BY_REQUIREMENT: dict[str, tuple[str, ...]] = {
    "any": (),
    "rdma": ("rc", "dc", "ud", "srd"),
    "nvlink": ("cuda_ipc",),
    "shm": ("cma", "sysv", "posix", "xpmem", "knem"),
    "tcp": ("tcp",),
}
"""Beginnings of UCX's lane names that satisfy each value of ``transfer.required_transport`` (``srd`` is EFA's)."""

TLS_BY_REQUIREMENT: dict[str, str | None] = {
    "any": None,
    "rdma": "rc,dc,ud,srd,cuda_copy,cuda_ipc,gdr_copy,tcp,self",
    "nvlink": "cuda_ipc,cuda_copy,tcp,self",
    "shm": "sm,tcp,self",
    "tcp": "tcp,self",
}
"""``UCX_TLS`` for each of them.  NIXL's UCX backend does not start without ``tcp``, over which it finds its peers.  So
leaving the other transports out is not enough, and `UcxLog.falls_short` tells whether the required one is used."""

_PEER_LINE = re.compile(r"(?P<reach>intra-node|inter-node) cfg#\d+ (?P<lanes>.+)$")


class UcxLog:
    """The UCX log of an engine's processes, read while they run.

    UCX writes through C's stdio, which buffers some 4 KiB before it writes to a file or a pipe, but writes to a
    terminal line by line.  So the log goes to a pseudo-terminal that a thread reads.
    """

    def __init__(self) -> None:
        self._reader, self._writer = pty.openpty()
        self._transport = ""
        self._lanes: set[str] = set()
        threading.Thread(target=self._read, name="ucx-log", daemon=True).start()

    def environment(self, required_transport: str) -> dict[str, str]:
        """Return the environment variables that an engine's processes must start with."""
        environment = {"UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": os.ttyname(self._writer)}
        tls = TLS_BY_REQUIREMENT[required_transport]
        return environment if tls is None else {**environment, "UCX_TLS": tls}

    def falls_short(self, required_transport: str) -> bool:
        """Return whether a peer was reached, but by no transport that satisfies `required_transport`."""
        wanted = LANES_BY_REQUIREMENT[required_transport]
        names = re.findall(r"(\w+)/", " ".join(self._lanes))
        return bool(wanted) and bool(names) and not any(name.startswith(wanted) for name in names)

    @property
    def transport(self) -> str:
        """The lanes to the latest peer process, e.g. ``intra-node rma_am(tcp/lo)``; "" before there is any."""
        return self._transport

    def _read(self) -> None:
        with open(self._reader, errors="replace") as log:
            for line in log:
                if match := _PEER_LINE.search(line.rstrip()):
                    logger.info("UCX connects %s by %s", match["reach"], match["lanes"])
                    self._lanes.update(match["lanes"].split())
                    self._transport = f"{match['reach']} {' '.join(match['lanes'].split())}"
