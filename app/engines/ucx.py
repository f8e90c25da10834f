"""Finds out from the log of UCX, the library under NIXL, by which transport KV really moves to and from each peer.

NIXL has no call that tells it, and UCX falls back to TCP silently.  UCX says three things, each once:

1. For each new *configuration* of endpoints the lanes, by name, e.g. ``intra-node cfg#1 rma_am(tcp/lo) am(tcp/lo
   cma/memory)``.  These are what UCX could use, and they are no proof: with this line KV moved by cma.
2. For each configuration and kind of memory a *table* of what carries an operation, by size (``UCX_PROTO_INFO``)::

       | me intra-node cfg#1                                              |
       | remote memory read by ucp_get*(multi) into host memory from host |
       | 0..inf | zero-copy   | cma/memory                                |

   That is the proof.  The last row counts, the one for large sizes.
3. For each *endpoint*, which is a connection to one process, its lanes by number (level ``debug``).  They tell to which
   configuration a peer belongs for which no new table is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pty
import re
import threading
from typing import Literal

import msgspec

from app.messages import TransportEvidence

logger = logging.getLogger("baton.ucx")

LANES_BY_REQUIREMENT: dict[str, tuple[str, ...]] = {
    "any": (),
    "rdma": ("rc", "dc", "ud", "srd"),
    "nvlink": ("cuda_ipc",),
    "shm": ("cma", "sysv", "posix", "xpmem", "knem"),
    "tcp": ("tcp",),
}
"""Beginnings of UCX's transport names that satisfy each value of ``transfer.required_transport`` (``srd`` is EFA's)."""

TLS_BY_REQUIREMENT: dict[str, str | None] = {
    "any": None,
    "rdma": "rc,dc,ud,srd,cuda_copy,gdr_copy,tcp,self",
    "nvlink": "cuda_ipc,cuda_copy,tcp,self",
    "shm": "sm,tcp,self",
    "tcp": "tcp,self",
}
"""``UCX_TLS`` for each of them.  NIXL's UCX backend does not start without ``tcp``, over which it finds its peers.  So
leaving the other transports out is not enough, and `UcxLog.since` tells whether the required one is used."""

LOG_ENVIRONMENT = {
    "UCX_LOG_LEVEL": "debug",
    # Patterns match a source file's path.  This one leaves wireup/* and ucp_worker.c, some 20 lines for each endpoint.
    "UCX_LOG_FILE_FILTER": "*w[io]r*.c",
    "UCX_PROTO_INFO": "y",
}

READ_TIMEOUT_S = 5.0
"""How long the log may take to be read to its end."""

MARKER = "baton-mark"

_PROCESS = re.compile(r"\[\d+\.\d+\] \[(?P<host>[^\]]*?):(?P<pid>\d+) *:\d+\]")
_CONFIGURATION = re.compile(r"(?P<name>(?P<reach>self|intra-node|inter-node) cfg#\d+)\b *(?P<lanes>\w+\(.+)?")
_OPERATION = re.compile(r"ucp_(?P<operation>get|put)\S* (?P<memory>[^|]+)")
_LARGEST = re.compile(r"\.\.inf *\| *(?P<method>[^|]*?) *\| *(?P<carriers>[^|]*?) *\|")
_LANE = re.compile(r"ep 0x[0-9a-f]+: (?P<lane>lane\[\d+\]: .+)$")
_LAST_LANE = re.compile(r"ep 0x[0-9a-f]+: err mode ")
_TRANSPORT = re.compile(r"(?<![\w/:])([a-z]\w*)/")


class _Table(msgspec.Struct, frozen=True):
    """What carries large sizes between one configuration's endpoints, as UCX said at `line`."""

    line: int
    configuration: tuple[str, str]
    carriers: str
    method: str

    def __str__(self) -> str:
        return f"{self.configuration[1].split()[0]} {self.carriers} ({self.method})"

    def satisfies(self, required_transport: str) -> bool:
        names = _TRANSPORT.findall(self.carriers)
        return bool(names) and all(name.startswith(LANES_BY_REQUIREMENT[required_transport]) for name in names)


class _Process(msgspec.Struct):
    """How far the lines of one process have been understood."""

    configuration: str = ""
    is_wanted: bool = False
    """Whether the table that is being printed is about KV."""
    announced: str = ""
    """A configuration whose lanes by number are still to come."""
    lanes: list[str] = []


class UcxLog:
    """The UCX log of an engine's processes, read while they run.

    UCX writes through C's stdio, which buffers some 4 KiB before it writes to a file or a pipe, but writes to a
    terminal line by line.  So the log goes to a pseudo-terminal that a thread reads.
    """

    def __init__(
        self, required_transport: str, operation: Literal["get", "put"] | None, memory: Literal["host", "cuda"]
    ) -> None:
        """`operation` is what moves KV, or None if other engines' processes do that.  KV lies in `memory`."""
        self._required = required_transport
        self._operation = operation
        self._foreign_memory = "host" if memory == "cuda" else "cuda"
        self._reader, self._writer = pty.openpty()
        os.set_blocking(self._writer, False)  # a log that nobody reads must not stop this process
        self._transport = ""
        self._num_lines = 0
        self._tables: list[_Table] = []
        self._endpoints: list[tuple[int, tuple[str, str]]] = []
        """The line at which an endpoint was made, and its process and configuration."""
        self._configurations: dict[tuple[str, str], str] = {}
        """Configurations by process and lanes."""
        self._processes: dict[str, _Process] = {}
        self._numbers = itertools.count()
        self._awaited: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[int]]] = {}
        threading.Thread(target=self._read, name="ucx-log", daemon=True).start()

    def environment(self) -> dict[str, str]:
        environment = {**LOG_ENVIRONMENT, "UCX_LOG_FILE": os.ttyname(self._writer)}
        tls = TLS_BY_REQUIREMENT[self._required]
        return environment if tls is None else {**environment, "UCX_TLS": tls}

    @property
    def transport(self) -> str:
        """What carries KV to the latest kind of peer, e.g. ``intra-node cma/memory (zero-copy)``.

        Before any is known to move, or where other engines move it, the lanes: ``intra-node rma_am(tcp/lo)``.
        """
        return self._transport

    async def mark(self) -> int:
        """Return the number of lines so far; see `TransportWatch.mark`."""
        line = await self._read_all()
        return self._num_lines if line is None else line

    async def since(self, mark: int) -> TransportEvidence | None:
        """Judge a peer by what was printed since `mark`; see `TransportWatch.since`.

        The new tables count and those of the peer's configurations, or else all.  They must all satisfy what is
        required: what cannot be told apart fails.
        """
        if self._operation is None:
            return None
        is_readable = await self._read_all() is not None
        tables, is_new = self._tables_since(mark)
        transport = ", ".join(dict.fromkeys(map(str, tables)))
        if self._required == "any":
            return TransportEvidence(transport)
        if not is_readable:
            return TransportEvidence(transport, "UCX's log cannot be read, so nothing tells how KV moves")
        if not tables:
            return TransportEvidence(transport, "UCX's log does not say how KV moves")
        num_good = sum(table.satisfies(self._required) for table in tables)
        if num_good == len(tables):
            return TransportEvidence(transport)
        if num_good and not is_new:
            return TransportEvidence(transport, f"UCX's log does not say by which of these KV moves: {transport}")
        return TransportEvidence(transport, f"KV moves by {transport}")

    def _tables_since(self, mark: int) -> tuple[list[_Table], bool]:
        """Return the tables that a peer is judged by, and whether they were printed since `mark`."""
        new = {table.configuration for table in self._tables if table.line > mark}
        of_peer = new | {configuration for line, configuration in self._endpoints if line > mark}
        return [table for table in self._tables if not of_peer or table.configuration in of_peer], bool(new)

    async def _read_all(self) -> int | None:
        """Wait until all that was written has been read, and return its number of lines.  None if nobody reads."""
        number, loop = next(self._numbers), asyncio.get_running_loop()
        read: asyncio.Future[int] = loop.create_future()
        self._awaited[number] = loop, read
        try:
            os.write(self._writer, f"\n{MARKER} {number}\n".encode())
            async with asyncio.timeout(READ_TIMEOUT_S):
                return await read
        except (BlockingIOError, TimeoutError):
            logger.error("UCX's log cannot be read")
            return None
        finally:
            del self._awaited[number]

    def _read(self) -> None:
        with open(self._reader, errors="replace") as log:
            for line in log:
                self._num_lines += 1
                if line.startswith(MARKER):
                    self._answer(int(line.split()[1]))
                elif match := _PROCESS.match(line):
                    of_process = f"{match['host']}:{match['pid']}"
                    self._take(of_process, self._processes.setdefault(of_process, _Process()), line.rstrip())

    def _answer(self, number: int) -> None:
        awaited = self._awaited.get(number)
        if awaited is not None:
            loop, read = awaited
            loop.call_soon_threadsafe(_resolve, read, self._num_lines)

    def _take(self, name: str, process: _Process, line: str) -> None:
        """Understand one line of a process."""
        if match := _LANE.search(line):
            process.lanes.append(match["lane"])
        elif _LAST_LANE.search(line):
            self._take_endpoint(name, process)
        else:
            self._take_table(name, process, line)

    def _take_endpoint(self, name: str, process: _Process) -> None:
        lanes = name, "\n".join(process.lanes)
        if process.announced:
            self._configurations[lanes] = process.announced
        configuration = self._configurations.get(lanes)
        if configuration is not None and not configuration.startswith("self"):
            self._endpoints.append((self._num_lines, (name, configuration)))
        process.lanes, process.announced = [], ""

    def _take_table(self, name: str, process: _Process, line: str) -> None:
        if match := _CONFIGURATION.search(line):
            process.configuration, process.is_wanted = match["name"], False
            if match["lanes"]:
                process.announced = match["name"]
                self._announce(match["reach"], " ".join(match["lanes"].split()))
        if match := _OPERATION.search(line):
            is_kv = match["operation"] == self._operation and self._foreign_memory not in match["memory"]
            process.is_wanted = is_kv and not process.configuration.startswith("self")
        if process.is_wanted and (match := _LARGEST.search(line)):
            table = _Table(self._num_lines, (name, process.configuration), match["carriers"], match["method"])
            self._tables.append(table)
            self._transport = str(table)
            logger.info("UCX moves KV by %s", table)

    def _announce(self, reach: str, lanes: str) -> None:
        if reach == "self":
            return
        logger.info("UCX connects %s by %s", reach, lanes)
        if not self._tables:
            self._transport = f"{reach} {lanes}"


def _resolve(read: asyncio.Future[int], line: int) -> None:
    if not read.done():  # whoever asked may have given up
        read.set_result(line)
