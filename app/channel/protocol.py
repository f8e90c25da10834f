"""The connection between a frontend and a replica: it carries sequences, their token deltas and the replica's state.

Each frontend has one TCP connection to each replica.  What an engine step adds to all of a frontend's sequences travels
as one frame.  If the frontend or the network falls behind, the waiting deltas are merged; otherwise nothing waits.  The
replica's load and the changes of its prefix cache travel in the same frames, or in frames of their own if there are no
deltas.  So do the links of a decode replica.  A new connection begins with the present load, the whole prefix cache and
all links.

Ray Serve's own calls cost more than the work they carry (docs/decisions/0002-channel.md).  So they are used only for
what needs Ray: finding replicas, checking their health, and passing references to transfer descriptors.

A frame is its length (4 bytes, little-endian) followed by msgpack.  The first frames are `Hello` from the frontend and
`Welcome` from the replica.  After that the frontend sends `Submit`, `Cancel` and `Backlog`, and the replica sends
`Batch`.  Prefill replicas get the prompts whose KV is to move through Ray; submitted to them are whole sequences.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import msgspec

from app.errors import BatonError, EngineDead, EngineFailed, InvalidRequest, PrefillFailed
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaLoad, TokenDelta

CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 256 * 1024
MAX_HELLO_BYTES = 1024
"""The longest frame that is read from a peer before it has shown its token."""
MAX_FRAME_BYTES = 1 << 30
KEEPALIVE_S = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""If a peer's machine disappears without closing the connection, this is noticed after 5 + 3 * 2 seconds."""
UNANSWERED_MS = 10_000
"""The connection also ends if the peer does not acknowledge data for so long (keep-alive does not notice this), or if
it reads nothing for so long while its buffers are full."""
_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Opens a connection and names it.  `token` is known to whoever gets the replica's metadata from Serve."""

    token: str
    channel_id: str


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The replica's answer to a good `Hello`."""

    replica_id: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run a sequence.  `number` rises by one with each sequence on this connection."""

    number: int
    request: GenerateRequest
    has_handoff: bool
    """Whether Ray will bring a reference to a transfer descriptor.  If not, decode prefills."""
    local_reason: str
    """Why decode prefills; it goes into the report."""


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Abort a sequence.  The replica sends nothing more for it."""

    number: int


class Backlog(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A replica's share of what waits in the frontend's own line, where the replica cannot see it.

    It replaces the last one, and is gone with the connection.  Autoscaling counts it as if it waited on the replica.
    """

    queued_tokens: int = 0
    """Prompt tokens that wait to be computed in this pool."""
    sequences: int = 0
    """Sequences that wait for room to decode in this pool."""


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The error that ended a sequence early: its name, which is in `ERRORS`, and its text."""

    error: str
    detail: str


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """The deltas and failures since the last frame, by the sequences' numbers, and news of the replica's state.

    A failure comes after the deltas of its sequence.
    """

    deltas: list[tuple[int, TokenDelta]]
    failures: list[tuple[int, Failure]]
    load: ReplicaLoad | None = None
    kv: KvUpdate | None = None
    links: list[Link] | None = None
    """All links of a decode replica, if they have changed."""


ERRORS: dict[str, type[BatonError]] = {
    kind.__name__: kind for kind in (InvalidRequest, EngineDead, EngineFailed, PrefillFailed)
}

_encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_welcome = msgspec.msgpack.Decoder(Welcome).decode
decode_call = msgspec.msgpack.Decoder(Submit | Cancel | Backlog).decode
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
    """Yield all whole frames that have arrived, as soon as there is one.  Ends with the connection."""
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
    """Set the socket to send at once, without waiting for more, and to notice a machine that is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_S.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
