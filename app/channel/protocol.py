"""The connection between a frontend and a replica: it carries sequences, their token deltas and the replica's state.

Each frontend has one TCP connection to each replica.  What an engine step adds to all of a frontend's sequences travels
as one frame.  If the frontend or the network falls behind, the waiting deltas are merged; otherwise nothing waits.  The
replica's load and the changes of its prefix cache travel in the same frames, or in frames of their own if there are no
deltas.  So do the links of a decode replica, and the role of one that changes it.  A new connection begins with the
present load, the whole prefix cache, all links and the role.

Ray Serve's own calls cost more than the work they carry (docs/decisions/0002-channel.md).  So they are used only for
what needs Ray: finding replicas, checking their health, and passing references to transfer descriptors.

A frame is its length (4 bytes, little-endian) followed by msgpack.  The first frames are `Hello` from the frontend and
`Welcome` from the replica.  After that the frontend sends `Submit`, `Cancel` and `Backlog`, and the replica sends
`Batch`.  Prefill replicas get the prompts whose KV is to move through Ray; submitted to them are whole sequences.

Frontends and replicas of two releases meet during a rolling update.  A field may be added at the end of a message, with
a default that means what its absence meant: who does not know it skips it.  Any other change needs another
PROTOCOL_VERSION, and peers with different ones refuse each other (docs/decisions/0027-protocol-version.md).
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import msgspec

from app.errors import BatonError, CannotResume, EngineDead, EngineFailed, InvalidRequest, PrefillFailed
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaLoad, Role, TokenDelta

PROTOCOL_VERSION = 2
"""Which messages this process understands."""
VERSION_OF_OLD_PEERS = 1
"""The version of the peers that tell none, because they are older than the field."""
CONNECT_TIMEOUT_S = 5.0
READ_BYTES = 256 * 1024
MAX_HELLO_BYTES = 1024
"""The longest frame that is read from a peer before it has shown its token."""
MAX_SUBMIT_BYTES = 16 << 20
"""The longest frame to a replica.  A token takes at most 5 bytes, so there is room for a prompt of two million tokens
and 6 MiB of sampling parameters.  While a replica decodes a frame it moves no tokens."""
MAX_BATCH_BYTES = 64 << 20
"""The longest frame to a frontend.  The largest thing that one sequence brings are the log probabilities of its prompt:
20 candidates for each of 128 Ki tokens, with 14 bytes for each, are 35 MiB."""
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
    version: int = VERSION_OF_OLD_PEERS


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The replica's answer to a `Hello` with the right token."""

    replica_id: str
    """Empty if the replica refuses the frontend.  One that does not know the other fields then takes it for another
    replica, and does not connect either."""
    version: int = VERSION_OF_OLD_PEERS
    problem: str = ""
    """Why the replica refuses the frontend; empty if it does not."""


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
    death: str = ""
    """In the last frame of a replica whose engine died: why."""
    has_drained: bool = False
    """In the last frame of one that stops: that nobody needs it any more."""
    is_leaving: bool = False
    """From a replica that is being removed: that the frontend take its sequences elsewhere, as far as it can.  The
    replica goes on with each until it is cancelled, and asks again; a frontend that skips this lets them end there."""
    role: Role | None = None
    """The replica's role, once that is another one than its deployment's or has changed.  A frontend that does not know
    the field goes on by the deployment's, which the engine can do as well."""


ERRORS: dict[str, type[BatonError]] = {
    kind.__name__: kind for kind in (InvalidRequest, EngineDead, EngineFailed, PrefillFailed, CannotResume)
}

_encode = msgspec.msgpack.Encoder().encode
decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_welcome = msgspec.msgpack.Decoder(Welcome).decode
decode_call = msgspec.msgpack.Decoder(Submit | Cancel | Backlog).decode
decode_batch = msgspec.msgpack.Decoder(Batch).decode


def to_frame(message: msgspec.Struct) -> bytes:
    content = _encode(message)
    return _LENGTH.pack(len(content)) + content


def length_of(frame: bytes) -> int:
    """Return how long a frame of `to_frame` is for the bounds above, which do not count the length in front of it."""
    return len(frame) - _LENGTH.size


async def read_one(reader: asyncio.StreamReader, longest: int) -> bytes:
    """Read the first frame of a connection.  Raises ConnectionError if it is longer than `longest` bytes."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    _check(length, longest)
    return await reader.readexactly(length)


async def read_frames(reader: asyncio.StreamReader, longest: int) -> AsyncIterator[list[memoryview]]:
    """Yield all whole frames that have arrived, as soon as there is one.  Ends with the connection.

    Raises ConnectionError if a frame is longer than `longest` bytes.
    """
    waiting = bytearray()
    end_of_first = _LENGTH.size
    while data := await reader.read(READ_BYTES):
        waiting += data
        if len(waiting) < end_of_first:  # a long frame comes in many parts, none of which is copied again
            continue
        ends, end_of_first = _ends_of_frames(waiting, longest)
        if ends:
            content = memoryview(waiting)
            waiting = bytearray(content[ends[-1] :])  # less than one read
            starts = [0, *ends[:-1]]
            yield [content[start + _LENGTH.size : end] for start, end in zip(starts, ends, strict=True)]


def _ends_of_frames(waiting: bytearray, longest: int) -> tuple[list[int], int]:
    """Return where each whole frame in `waiting` ends.

    The second result says how many of the bytes behind them are needed to know more: the next frame, or its length.
    """
    ends: list[int] = []
    start = 0
    while len(waiting) - start >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(waiting, start)
        _check(length, longest)
        end = start + _LENGTH.size + length
        if end > len(waiting):
            return ends, end - start
        ends.append(end)
        start = end
    return ends, _LENGTH.size


def _check(length: int, longest: int) -> None:
    if length > longest:
        raise ConnectionError(f"a frame of {length} bytes, where {longest} are the most")


def tune(writer: asyncio.StreamWriter) -> None:
    """Set the socket to send at once, without waiting for more, and to notice a machine that is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_S.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)
