"""Slow clients, against a server that counts what comes: they are slow, and whoever suffers from them is noticed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from random import Random
from typing import Any

import psutil
import pytest

from benchmarks.faults import slow_clients
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.slow_clients import SlowReaders, SlowSenders
from tests.unit.waiting import until


class Server:
    """Answers /health, and completions with a status and a long stream once their body is there."""

    def __init__(self) -> None:
        self.model = "m"
        self.url = ""
        self.health = self.status = b"200 OK"
        self.num_bodies = self.num_waiting = 0
        self.wanted = slow_clients.READERS
        """/health waits for so many slow clients."""

    async def processes(self, target: str) -> list[list[psutil.Process]]:
        return [[psutil.Process(os.getpid())]]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/health" in head:
            await until(lambda: self.num_waiting >= self.wanted)
            writer.write(b"HTTP/1.1 " + self.health + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            self.num_waiting += 1
            length = next(int(line.split()[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
            await reader.readexactly(length)
            self.num_bodies += 1
            writer.write(b"HTTP/1.1 " + self.status + b"\r\n\r\n" + bytes(100_000))
            await reader.read()


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.setattr(slow_clients, "SLOW_S", 0.5)
    monkeypatch.setattr(slow_clients, "SERVED_WITHIN_S", 30.0)
    made = Server()
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as listening:
        made.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        yield made


async def test_readers_ask_for_everything_and_senders_never_finish(server: Any) -> None:
    await SlowReaders().strike(server, Random(1))
    assert server.num_bodies == slow_clients.READERS
    server.wanted += slow_clients.SENDERS
    await SlowSenders().strike(server, Random(1))
    assert server.num_bodies == slow_clients.READERS
    assert server.num_waiting == slow_clients.READERS + slow_clients.SENDERS


@pytest.mark.parametrize("fault", [SlowReaders(), SlowSenders()])
async def test_others_that_are_not_served_are_noticed(server: Any, fault: SlowReaders | SlowSenders) -> None:
    server.health = b"503 No"
    with pytest.raises(BadAnswer, match="/health beside slow clients: 503"):
        await fault.strike(server, Random(1))


async def test_memory_that_grows_is_noticed(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_clients, "MOST_GROWTH_BYTES", -1)
    with pytest.raises(BadAnswer, match="grew by"):
        await SlowReaders().strike(server, Random(1))


async def test_a_status_that_nobody_deserves_is_noticed(server: Any) -> None:
    server.status = b"500 No"
    with pytest.raises(BadAnswer, match="40 slow clients were refused"):
        await SlowReaders().strike(server, Random(1))
