"""Clients that are slow on purpose: those that hardly read what they asked for, and those that hardly send it."""

from __future__ import annotations

import asyncio
import socket
import time
from random import Random
from urllib.parse import SplitResult, urlsplit

import httpx
import msgspec

from app.bench.client import new_async_client
from benchmarks.faults.client_faults import completion_body
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fleet import Fleet, Target

SLOW_S = 20.0
"""How long they are slow before they leave."""
READERS, SENDERS = 40, 100
OUTPUT_TOKENS = 3000
"""What each of the readers asks for: some 250 bytes for each token."""
RECEIVE_BYTES = 4096
"""The kernel takes no more for a client that reads nothing."""
MOST_GROWTH_BYTES = 300_000_000
"""By how much a frontend may grow.  What it keeps for a reader is bounded by the length of the answer."""
SERVED_WITHIN_S = 5.0
SERVERS: tuple[Target, ...] = ("frontend", "HAProxy")


class SlowReaders(msgspec.Struct, frozen=True):
    """Clients of long streams that read a byte a second."""

    name: str = "clients that read slowly"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises BadAnswer if a frontend or HAProxy grows without bounds, or if others are not served meanwhile."""
        body = completion_body(fleet.model, max_tokens=OUTPUT_TOKENS, ignore_eos=True, stream=True, temperature=0)
        before = await _memory(fleet)
        readers = [asyncio.create_task(_read_slowly(urlsplit(fleet.url), body)) for _ in range(READERS)]
        try:
            await _serve_others(fleet)
            grown = {pid: used - before.get(pid, used) for pid, used in (await _memory(fleet)).items()}
        finally:
            await _end(readers)
        if (most := max(grown.values())) > MOST_GROWTH_BYTES:
            raise BadAnswer(f"a frontend or HAProxy grew by {most / 1e6:.0f} MB beside {READERS} slow readers")


class SlowSenders(msgspec.Struct, frozen=True):
    """Clients that announce a body and send a byte of it a second."""

    name: str = "clients that send slowly"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises BadAnswer if others are not served meanwhile."""
        body = completion_body(fleet.model)
        senders = [asyncio.create_task(_send_slowly(urlsplit(fleet.url), body)) for _ in range(SENDERS)]
        try:
            await _serve_others(fleet)
        finally:
            await _end(senders)


async def _memory(fleet: Fleet) -> dict[int, int]:
    """Return the bytes that each process uses through which answers go, by its id."""
    processes = [process for target in SERVERS for (process,) in await fleet.processes(target)]
    return {process.pid: process.memory_info().rss for process in processes if process.is_running()}


async def _serve_others(fleet: Fleet) -> None:
    """Ask for short answers as long as the slow clients are there.  Raises BadAnswer if one does not come in time."""
    async with new_async_client(fleet.url, SERVED_WITHIN_S) as client:
        until = time.monotonic() + SLOW_S
        while time.monotonic() < until:
            try:
                answer = await client.get("/health")
            except httpx.HTTPError as problem:
                raise BadAnswer(f"/health beside slow clients: {problem!r}") from problem
            if not answer.is_success:
                raise BadAnswer(f"/health beside slow clients: {answer.status_code}")
            await asyncio.sleep(0.2)


async def _end(clients: list[asyncio.Task[None]]) -> None:
    for client in clients:
        client.cancel()
    _, _ = await asyncio.wait(clients)
    failed = [error for client in clients if not client.cancelled() and (error := client.exception()) is not None]
    if failed:
        raise BadAnswer(f"{len(failed)} slow clients were refused: {failed[0]!r}")


def _head(url: SplitResult, body: bytes) -> bytes:
    return (
        f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()


async def _read_slowly(url: SplitResult, body: bytes) -> None:
    """Raises BadAnswer if the status is none that a client can have deserved."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        connection.setblocking(False)
        await loop.sock_connect(connection, (url.hostname, url.port))
        await loop.sock_sendall(connection, _head(url, body) + body)
        status = await loop.sock_recv(connection, len("HTTP/1.1 200"))
        if not status.endswith((b" 200", b" 429", b" 503")):
            raise BadAnswer(f"a slow reader got {status!r}")
        while await loop.sock_recv(connection, 1):  # noqa: ASYNC110  it is what it waits for
            await asyncio.sleep(1)


async def _send_slowly(url: SplitResult, body: bytes) -> None:
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    try:
        writer.write(_head(url, body))
        for place in range(len(body)):
            writer.write(body[place : place + 1])
            await writer.drain()
            await asyncio.sleep(1)
        await reader.read(1)
    finally:
        writer.close()


SLOW_CLIENTS = (SlowReaders(), SlowSenders())
