"""Frontends and replicas of two releases meet during a rolling update.

The old side is played with the messages as they were before they had a version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest

from app.channel import client, server
from app.channel.client import Channel
from app.channel.protocol import (
    MAX_HELLO_BYTES,
    PROTOCOL_VERSION,
    Batch,
    Submit,
    read_one,
    to_frame,
)
from app.errors import ReplicaLost
from tests.unit.channel.test_channel import LAST, Replica, Told, connected, served
from tests.unit.waiting import PATIENCE_S, until

OTHER_VERSION = PROTOCOL_VERSION + 1


class OldHello(msgspec.Struct, frozen=True, array_like=True):
    token: str
    channel_id: str


class OldWelcome(msgspec.Struct, frozen=True, array_like=True):
    replica_id: str


@asynccontextmanager
async def old_frontend(replica: Replica) -> AsyncIterator[tuple[str, asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield what an old frontend reads as the replica's id, and the connection."""
    reader, writer = await asyncio.open_connection(replica.address["host"], int(replica.address["port"]))
    writer.write(to_frame(OldHello(replica.address["token"], "old")))
    async with asyncio.timeout(PATIENCE_S):
        welcome = msgspec.msgpack.decode(await read_one(reader, MAX_HELLO_BYTES), type=OldWelcome)
    yield welcome.replica_id, reader, writer
    writer.close()


@asynccontextmanager
async def old_replica() -> AsyncIterator[dict[str, str]]:
    """Yield the address of a replica that answers each sequence with one token, without ever having told a version."""

    serving: list[asyncio.Task[Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(cast(Any, asyncio.current_task()))
        hello = msgspec.msgpack.decode(await read_one(reader, MAX_HELLO_BYTES), type=OldHello)
        assert hello.token == "token"
        writer.write(to_frame(OldWelcome("d")))
        try:
            while True:
                submit = msgspec.msgpack.decode(await read_one(reader, 1 << 20), type=Submit)
                writer.write(to_frame(Batch([(submit.number, LAST)], [])))
        except asyncio.IncompleteReadError:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    yield {"host": host, "port": str(port), "token": "token"}
    listening.close()
    await asyncio.wait(serving, timeout=PATIENCE_S)


async def test_a_frontend_from_before_there_were_versions_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """It cannot understand why, but it must not take the refusal for a connection."""
    async with connected() as (replica, channel):
        async with old_frontend(replica) as (replica_id, reader, _):
            assert replica_id != "d"  # "... is there instead", to an old frontend
            async with asyncio.timeout(PATIENCE_S):
                assert await reader.read() == b""
        assert "a frontend was refused: the replica speaks version 2 of the channel's protocol, not 1" in caplog.text
        replica.script = [LAST]
        await served(channel, [])  # the connections that stand are none of this


async def test_a_replica_from_before_there_were_versions_is_refused() -> None:
    async with old_replica() as address:
        with pytest.raises(ReplicaLost, match="it speaks version 1 of the channel's protocol, and this frontend 2"):
            await Channel.connect("d", address, Told())


@pytest.mark.parametrize("newer", [client, server], ids=["newer frontend", "newer replica"])
async def test_peers_of_different_versions_refuse_each_other_with_a_reason_on_both_sides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, newer: Any
) -> None:
    async with connected() as (replica, channel):
        opened: list[Any] = []
        replica.server.on_open = opened.append
        monkeypatch.setattr(newer, "PROTOCOL_VERSION", OTHER_VERSION)
        has, wants = (2, 3) if newer is client else (3, 2)
        reason = f"the replica speaks version {has} of the channel's protocol, not {wants}"
        with pytest.raises(ReplicaLost, match=f"it refuses this frontend: {reason}"):
            await Channel.connect("d", replica.address, Told())
        await until(lambda: f"a frontend was refused: {reason}" in caplog.text)
        assert not opened
        replica.script = [LAST]
        await served(channel, [])


async def test_a_stranger_is_told_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PROTOCOL_VERSION", OTHER_VERSION)
    async with connected_to_another_version() as replica:
        with pytest.raises(ReplicaLost, match="IncompleteReadError"):
            await Channel.connect("d", {**replica.address, "token": "guessed"}, Told())


@asynccontextmanager
async def connected_to_another_version() -> AsyncIterator[Replica]:
    replica = Replica()
    replica.address = await replica.server.start("127.0.0.1")
    yield replica
    await replica.server.stop()
