"""How KV gets from one sim engine to another: through a TCP port of the prefill side.  Only a digest of it is sent.

1. The decode engine connects and sends ``take <handle>``.  The answer is the digest of what the KV holds, or ``gone``.
2. It stays connected while the modelled transfer lasts, so that the transfer ends if a peer dies.
3. When it closes the connection, whether the transfer succeeded or not, prefill frees the blocks.  It does so at the
   end of another lease, too, as nobody closes a connection to a machine that is gone.

``release <handle>`` frees the blocks at once.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import suppress

import msgspec

from app.engines.sim.scheduler import ScheduledSequence

logger = logging.getLogger("baton.engines.sim")

ANSWER_TIMEOUT_S = 10.0
"""How long a peer may take to answer before it counts as gone."""


class TransferFailed(Exception):
    """The KV did not arrive; its prompt has to be computed again."""


class _Kept(msgspec.Struct):
    """One handoff's KV on the prefill side."""

    sequence: ScheduledSequence
    expiry: asyncio.TimerHandle
    lease_s: float


class HandoffServer:
    """The KV that a prefill engine keeps, each for a lease, until decode engines have pulled it."""

    def __init__(self, free: Callable[[ScheduledSequence], None]) -> None:
        """`free` is called to free a handoff's blocks."""
        self._free = free
        self._kept: dict[str, _Kept] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self.port = 0
        self.num_expired = 0

    async def start(self, host: str, port: int) -> None:
        """Listen; on any free port if `port` is 0.  Raises OSError."""
        self._server = await asyncio.start_server(self._serve, host, port)
        self.port = self._server.sockets[0].getsockname()[1]

    def keep(self, sequence: ScheduledSequence, lease_s: float) -> str:
        """Keep a handoff for `lease_s` seconds or until it is pulled.  Returns its handle, unique over all engines."""
        handle = uuid.uuid4().hex
        expiry = asyncio.get_running_loop().call_later(lease_s, self._expire, handle)
        self._kept[handle] = _Kept(sequence, expiry, lease_s)
        return handle

    def _expire(self, handle: str) -> None:
        self.num_expired += 1
        self._free(self._kept.pop(handle).sequence)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        sequence, lease_s = None, 0.0
        try:
            command, _, handle = (await reader.readline()).decode().strip().partition(" ")
            if kept := self._kept.pop(handle, None):
                kept.expiry.cancel()
                sequence, lease_s = kept.sequence, kept.lease_s
            if command == "take":
                writer.write(f"{sequence.kv_digest}\n".encode() if sequence else b"gone\n")
                with suppress(TimeoutError):
                    async with asyncio.timeout(lease_s):
                        await reader.read()
        except (ConnectionError, ValueError) as error:
            logger.info("a peer broke off: %r", error)
        finally:
            if sequence is not None:
                self._free(sequence)
            self._connections.discard(writer)
            writer.close()

    def stop(self) -> None:
        """Break off all transfers and keep nothing any more."""
        if self._server is not None:
            self._server.close()
        for writer in self._connections:
            writer.transport.abort()
        for kept in self._kept.values():
            kept.expiry.cancel()
            self._free(kept.sequence)
        self._kept.clear()


async def take(host: str, port: int, handle: str, duration_s: float) -> int:
    """Pull a handoff's KV, which takes `duration_s`, and return the digest of what it holds.  Raises TransferFailed."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
    except OSError as error:  # asyncio's TimeoutError is one
        raise TransferFailed(f"{host}:{port}: {error!r}") from error
    try:
        writer.write(f"take {handle}\n".encode())
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            answer = (await reader.readline()).decode().strip()
        if answer in ("", "gone"):
            raise TransferFailed(f"{host}:{port} no longer has the KV")
        await _last(reader, duration_s)
        return int(answer)
    except (OSError, ValueError) as error:
        raise TransferFailed(f"{host}:{port}: {error!r}") from error
    finally:
        writer.close()


async def _last(reader: asyncio.StreamReader, duration_s: float) -> None:
    """Wait while a transfer lasts.  Raises TransferFailed if the other side closes the connection meanwhile."""
    with suppress(TimeoutError):
        async with asyncio.timeout(duration_s):
            await reader.read()
            raise TransferFailed("the prefill engine broke off the transfer")


async def release(host: str, port: int, handle: str) -> None:
    """Free a handoff's KV.  Does nothing if its engine is gone."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        logger.info("%s:%d cannot be told to release KV: %r", host, port, error)
        return
    writer.write(f"release {handle}\n".encode())
    writer.close()
