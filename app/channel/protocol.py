"""The connection between a frontend and a replica: sequences in, token deltas out, and what the replica tells.

One TCP connection for each pair.  What an engine step adds to all of a frontend's sequences travels as one frame;
what waits while the frontend or the network is behind is merged, and nothing waits otherwise.  The replica's load and
what changed in its prefix cache travel along, or by themselves if no sequence has anything; a new connection begins
with all of both.

Ray Serve's own calls cost more than the work they carry (docs/decisions/0002-channel.md), so they stay for what
needs Ray: finding replicas, their health, and passing references to transfer descriptors.

A frame is its length (4 bytes, little-endian) and msgpack.  The first frame each way is `Hello` and `Welcome`;
after that the frontend sends `Submit` and `Cancel`, and the replica sends `Batch`.  Prefill replicas get their prompts
by Ray: on their connections nothing is submitted.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import msgspec

from app.errors import BatonError, EngineDead, EngineFailed, InvalidRequest, PrefillFailed
from app.kv_cache.updates import merge_updates
from app.messages import GenerateRequest, KvUpdate, ReplicaLoad, TokenDelta

CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 256 * 1024
MAX_HELLO_BYTES = 1024
"""Before a peer has shown its token, nothing longer is read from it."""
MAX_FRAME_BYTES = 1 << 30
KEEPALIVE_S = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""A peer whose machine is gone without a word is noticed after 5 + 3 * 2 seconds."""
UNANSWERED_MS = 10_000
"""So is one that does not acknowledge what it was sent, for which keep-alive does not ask, or that reads nothing for so
long while its buffers are full."""
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A new connection's name; `token` is known to those that Serve tells the replica's metadata."""

    token: str
    channel_id: str


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The replica's answer to a good `Hello`."""

    replica_id: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run a sequence; `number` rises by one with each on this connection."""

    number: int
    request: GenerateRequest
    has_handoff: bool
    """Whether a reference to a transfer descriptor comes by Ray; if not, decode prefills."""
    local_reason: str
    """Why decode prefills, for its report."""


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort a sequence; nothing comes for it afterwards."""

    number: int


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """What ended a sequence early: the name of an error that `ERRORS` knows, and its text."""

    error: str
    detail: str


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """What sequences got since the last frame, by number, and what the replica tells of itself.

    Failures come after their sequence's deltas.
    """

    deltas: list[tuple[int, TokenDelta]]
    failures: list[tuple[int, Failure]]
    load: ReplicaLoad | None = None
    kv: KvUpdate | None = None


ERRORS: dict[str, type[BatonError]] = {
    kind.__name__: kind for kind in (InvalidRequest, EngineDead, EngineFailed, PrefillFailed)
}

_encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_welcome = msgspec.msgpack.Decoder(Welcome).decode
decode_call = msgspec.msgpack.Decoder(Submit | Cancel).decode
decode_batch = msgspec.msgpack.Decoder(Batch).decode


def to_frame(message: msgspec.Struct) -> bytes:
    content = _encode(message)
    return _LENGTH.pack(len(content)) + content


async def read_one(reader: asyncio.StreamReader, longest: int) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > longest:
        raise ConnectionError(f"a frame of {length} bytes")
    return await reader.readexactly(length)


async def read_frames(reader: asyncio.StreamReader) -> AsyncIterator[list[memoryview]]:
    """All whole frames that have arrived, as soon as there is one; ends with the connection."""
    waiting = bytearray()
    while data := await reader.read(READ_BYTES):
        waiting += data
        frames, start = [], 0
        content = memoryview(bytes(waiting))
        while len(content) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(content, start)
            if length > MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {length} bytes")
            end = start + _LENGTH.size + length
            if end > len(content):
                break
            frames.append(content[start + _LENGTH.size : end])
            start = end
        if start:
            del waiting[:start]
            yield frames


def tune(writer: asyncio.StreamWriter) -> None:
    """No waiting for more to send, and no waiting forever for a machine that is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_S.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)


def merge_kv(updates: list[KvUpdate]) -> KvUpdate | None:
    if len(updates) < 2:
        return updates[0] if updates else None
    return merge_updates(*updates)
