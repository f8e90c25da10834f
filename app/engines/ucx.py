"""What UCX, the library under NIXL, really uses to move KV, read from UCX's own log.

NIXL has no call that tells the chosen transport, and UCX falls back to TCP without a word.  At log level
``info`` UCX writes one line for each kind of peer it connects to, e.g.
``src intra-node cfg#1 rma(cuda_ipc/cuda) am(tcp/lo)``: that line is the truth.
"""

from __future__ import annotations

import logging
import os
import pty
import re
import threading

logger = logging.getLogger("baton.ucx")

TLS_BY_REQUIREMENT: dict[str, str | None] = {
    "any": None,
    # `sm` (shared memory) is needed beside RDMA and NVLink for connections within one process and for control.
    "rdma": "rc,dc,ud,srd,sm,self,cuda_copy,cuda_ipc,gdr_copy",
    "nvlink": "cuda_ipc,cuda_copy,sm,self",
    "shm": "sm,self",
    "tcp": "tcp,self",
}
"""``UCX_TLS`` for each value of ``transfer.required_transport``: what is not listed cannot be fallen back to.

Names as in UCX's documentation of UCX_TLS; ``srd`` is EFA's transport.
"""

_PEER_LINE = re.compile(r"(?P<reach>intra-node|inter-node) cfg#\d+ (?P<lanes>.+)$")


class UcxLog:
    """The UCX log of an engine's processes, read while they run.

    UCX writes through C's stdio, which holds back a file's or a pipe's lines until some 4 KiB have gathered;
    a terminal's it writes line by line.  So the log goes to a pseudo-terminal that a thread reads.
    """

    def __init__(self) -> None:
        self._reader, self._writer = pty.openpty()
        self._transport = ""
        self._lanes: set[str] = set()
        threading.Thread(target=self._read, name="ucx-log", daemon=True).start()

    def environment(self, tls: str | None) -> dict[str, str]:
        """Variables that an engine's processes must start with."""
        environment = {"UCX_LOG_LEVEL": "info", "UCX_LOG_FILE": os.ttyname(self._writer)}
        if tls is not None:
            environment["UCX_TLS"] = tls
        return environment

    @property
    def transport(self) -> str:
        """The lanes to the newest other process, e.g. ``intra-node rma_am(tcp/lo)``; "" before any."""
        return self._transport

    def _read(self) -> None:
        with open(self._reader, errors="replace") as log:
            for line in log:
                if match := _PEER_LINE.search(line.rstrip()):
                    logger.info("UCX connects %s by %s", match["reach"], match["lanes"])
                    self._lanes.update(match["lanes"].split())
                    self._transport = f"{match['reach']} {' '.join(match['lanes'].split())}"
