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
import hmac
import itertools
import logging
import secrets
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

import msgspec

from app.errors import BatonError, EngineDead, EngineFailed, InvalidRequest, PrefillFailed, ReplicaLost
from app.messages import GenerateRequest, KvUpdate, ReplicaLoad, TokenDelta, merge_deltas
from app.routing.kv_mirror import merge_updates

logger = logging.getLogger("baton.channel")

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
READ_BYTES = 256 * 1024
MAX_HELLO_BYTES = 1024
"""Before a peer has shown its token, nothing longer is read from it."""
MAX_FRAME_BYTES = 1 << 30
KEEPALIVE_S = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""A peer whose machine is gone without a word is noticed after 5 + 3 * 2 seconds."""
UNANSWERED_MS = 10_000
"""So is one that does not acknowledge what it was sent, for which keep-alive does not ask, or that reads nothing for so
long while its buffers are full."""
TELL_PERIOD_S = 0.005
"""Load and cache updates that no delta takes along are sent at most this often; the first one goes at once."""
MAX_WAITING_BLOCKS = 16_384
"""Changes of the prefix cache that may wait for a frontend; when there are more it gets a snapshot instead."""

_LENGTH = struct.Struct("<I")


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A new connection's name; `token` is known to those that Serve tells the replica's metadata."""

    token: str
    link_id: str


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
    """What ended a sequence early: the name of an error that `_ERRORS` knows, and its text."""

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


_ERRORS: dict[str, type[BatonError]] = {
    kind.__name__: kind for kind in (InvalidRequest, EngineDead, EngineFailed, PrefillFailed)
}

_encode = msgspec.msgpack.Encoder().encode
_decode_hello = msgspec.msgpack.Decoder(Hello).decode
_decode_welcome = msgspec.msgpack.Decoder(Welcome).decode
_decode_call = msgspec.msgpack.Decoder(Submit | Cancel).decode
_decode_batch = msgspec.msgpack.Decoder(Batch).decode


def _frame(message: msgspec.Struct) -> bytes:
    content = _encode(message)
    return _LENGTH.pack(len(content)) + content


async def _read_one(reader: asyncio.StreamReader, longest: int) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > longest:
        raise ConnectionError(f"a frame of {length} bytes")
    return await reader.readexactly(length)


async def _read_frames(reader: asyncio.StreamReader) -> AsyncIterator[list[memoryview]]:
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


def _tune(writer: asyncio.StreamWriter) -> None:
    """No waiting for more to send, and no waiting forever for a machine that is gone."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_S.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNANSWERED_MS)


class Link:
    """A frontend, as a replica sees it: its sequences, and what waits to be sent to it."""

    def __init__(self, link_id: str, load: ReplicaLoad | None, snapshot: Callable[[], KvUpdate | None]) -> None:
        """`load` is the present one; `snapshot` tells the whole prefix cache, or None if the replica does not know."""
        self.id = link_id
        self.last_number = -1
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._deltas: dict[int, TokenDelta] = {}
        self._failures: list[tuple[int, Failure]] = []
        self._load = load
        self._kv: list[KvUpdate] = []
        self._num_waiting_blocks = 0
        self._snapshot = snapshot
        self._needs_snapshot = True
        self._has_some = asyncio.Event()
        self._has_some.set()
        self._loop = asyncio.get_running_loop()
        self._told_at = -TELL_PERIOD_S
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many sequences run."""
        return len(self._tasks)

    def is_running(self, number: int) -> bool:
        return number in self._tasks

    def put(self, number: int, delta: TokenDelta) -> None:
        """Send a delta of a sequence, with what else there is in this turn of the event loop."""
        waiting = self._deltas.get(number)
        self._deltas[number] = delta if waiting is None else merge_deltas(waiting, delta)
        self._has_some.set()

    def put_load(self, load: ReplicaLoad) -> None:
        """Send the replica's load; a newer one replaces it while it waits."""
        self._load = load
        self._send_soon()

    def put_kv(self, update: KvUpdate) -> None:
        """Send a change of the prefix cache; changes are merged when they are sent."""
        if self._needs_snapshot:  # which is made when it is sent, and has this in it
            return
        self._kv.append(update)
        self._num_waiting_blocks += len(update.stored) + len(update.removed)
        if self._num_waiting_blocks > MAX_WAITING_BLOCKS and len(self._kv) > 1:
            self._forget_waiting_kv()
            self._needs_snapshot = True
        self._send_soon()

    def _forget_waiting_kv(self) -> None:
        self._kv.clear()
        self._num_waiting_blocks = 0

    def _send_soon(self) -> None:
        """Send what waits with the next delta, but no later than TELL_PERIOD_S after what was told last."""
        if self._timer is None:
            self._timer = self._loop.call_at(self._told_at + TELL_PERIOD_S, self._has_some.set)

    def start(self, number: int, sequence: Coroutine[Any, Any, None]) -> None:
        """Run `sequence`; a BatonError that it raises is sent to the frontend."""
        self.last_number = number
        self._tasks[number] = asyncio.create_task(self._run(number, sequence), name=f"sequence-{number}")

    async def _run(self, number: int, sequence: Coroutine[Any, Any, None]) -> None:
        try:
            await sequence
        except asyncio.CancelledError:
            self._deltas.pop(number, None)
            raise
        except BatonError as error:
            self._fail(number, error)
        except Exception as error:
            logger.exception("a sequence of link_id=%s failed", self.id)
            self._fail(number, EngineFailed(type(error).__name__))
        finally:
            del self._tasks[number]

    def _fail(self, number: int, error: BatonError) -> None:
        kind = type(error).__name__
        self._failures.append((number, Failure(kind if kind in _ERRORS else "EngineFailed", str(error))))
        self._has_some.set()

    def cancel(self, number: int) -> None:
        if task := self._tasks.get(number):
            task.cancel()

    def cancel_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._tasks.values())

    async def take(self) -> Batch:
        """Everything that waits, as soon as there is something."""
        await self._has_some.wait()
        return self.take_now()

    def take_now(self) -> Batch:
        """Everything that waits, be it nothing."""
        self._has_some.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._told_at = None, self._loop.time()
        kv = self._snapshot() if self._needs_snapshot else _merge_kv(self._kv)
        batch = Batch(list(self._deltas.items()), self._failures, self._load, kv)
        self._deltas, self._failures, self._load = {}, [], None
        self._forget_waiting_kv()
        self._needs_snapshot = False
        return batch

    def close(self) -> None:
        """Nothing is sent any more, and no sequence runs."""
        self.cancel_all()
        if self._timer is not None:
            self._timer.cancel()


def _merge_kv(updates: list[KvUpdate]) -> KvUpdate | None:
    if len(updates) < 2:
        return updates[0] if updates else None
    return merge_updates(*updates)


class ChannelServer:
    """A replica's end of all its channels."""

    def __init__(self, replica_id: str, run: Callable[[Link, Submit], Coroutine[Any, Any, None]]) -> None:
        """`run` serves one sequence; it is cancelled when the frontend cancels it or goes away."""
        self.links: dict[str, Link] = {}
        self.on_close: Callable[[Link], object] = lambda link: None
        self.snapshot: Callable[[], KvUpdate | None] = lambda: None
        """The whole prefix cache, for a frontend that has heard nothing so far; None if nobody knows."""
        self._replica_id = replica_id
        self._run = run
        self._load: ReplicaLoad | None = None
        self._token = secrets.token_urlsafe()
        self._server: asyncio.Server | None = None
        self._writers: dict[Link, asyncio.StreamWriter] = {}
        self._attending: set[asyncio.Task[Any]] = set()

    async def start(self, host: str) -> dict[str, str]:
        """Listen on a free port; returns what a `Channel` needs to know, which is a secret of the cluster."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=READ_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return {"host": host, "port": str(port), "token": self._token}

    def num_sequences(self) -> int:
        return sum(len(link) for link in self.links.values())

    def tell_load(self, load: ReplicaLoad) -> None:
        """Tell all frontends, also those that connect later."""
        self._load = load
        for link in self.links.values():
            link.put_load(load)

    def tell_kv(self, update: KvUpdate) -> None:
        """Tell all frontends of a change, which `snapshot` has in it from now on."""
        for link in self.links.values():
            link.put_kv(update)

    async def drain(self) -> None:
        """Return once no sequence runs."""
        while tasks := [task for link in self.links.values() for task in link.tasks]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Send what waits, end every connection and thereby every sequence, and stop listening."""
        if self._server is not None:
            self._server.close()
        for link, writer in self._writers.items():
            writer.write(_frame(link.take_now()))
            writer.close()
        if self._attending:
            await asyncio.wait(self._attending, timeout=CLOSE_TIMEOUT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)
        try:
            if (link := await self._greet(reader, writer)) is not None:
                await self._attend(link, reader, writer)
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            logger.warning("a frontend's connection broke: %r", error)
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Link | None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            hello = _decode_hello(await _read_one(reader, MAX_HELLO_BYTES))
        if not hmac.compare_digest(hello.token, self._token):
            logger.warning("a connection without the right token was refused")
            return None
        _tune(writer)
        writer.write(_frame(Welcome(self._replica_id)))
        return Link(hello.link_id, self._load, self.snapshot)

    async def _attend(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links[link.id] = link
        self._writers[link] = writer
        sender = asyncio.create_task(_send(link, writer), name=f"send-{link.id}")
        try:
            async for frames in _read_frames(reader):
                for frame in frames:
                    call = _decode_call(frame)
                    if isinstance(call, Submit):
                        link.start(call.number, self._run(link, call))
                    else:
                        link.cancel(call.number)
        finally:
            sender.cancel()
            link.close()
            del self.links[link.id], self._writers[link]
            self.on_close(link)


async def _send(link: Link, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(_frame(await link.take()))
        await writer.drain()  # waits only if the peer does not keep up; meanwhile deltas merge


def _merge(batches: list[Batch]) -> Batch:
    """One batch of those that arrived together, which happens when this process was behind."""
    if len(batches) == 1:
        return batches[0]
    deltas: dict[int, TokenDelta] = {}
    for batch in batches:
        for number, delta in batch.deltas:
            deltas[number] = merge_deltas(deltas[number], delta) if number in deltas else delta
    failures = [failure for batch in batches for failure in batch.failures]
    loads = [batch.load for batch in batches if batch.load is not None]
    kv = [batch.kv for batch in batches if batch.kv is not None]
    return Batch(list(deltas.items()), failures, loads[-1] if loads else None, _merge_kv(kv))


class Sequence:
    """One sequence on a channel, as its frontend sees it."""

    def __init__(self, number: int, emit: Callable[[TokenDelta], None]) -> None:
        self.number = number
        self.emit = emit
        self.has_started = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: BatonError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class Listener(Protocol):
    """Who is told what a replica tells of itself; a frontend's view of the replica's pool."""

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        """What the replica has to do now."""

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        """What changed in its prefix cache; the first update of a connection is the whole of it."""


class Channel:
    """A frontend's end of the connection to one replica."""

    def __init__(
        self,
        replica_id: str,
        link_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        listener: Listener,
    ) -> None:
        self.link_id = link_id
        self.is_closed = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended by itself."""
        self.on_close: Callable[[], object] = lambda: None
        self._replica_id = replica_id
        self._writer = writer
        self._listener = listener
        self._is_retired = False
        self._numbers = itertools.count()
        self._sequences: dict[int, Sequence] = {}
        self._task = asyncio.create_task(self._receive(reader), name=f"channel-{replica_id}")

    @classmethod
    async def connect(cls, replica_id: str, address: dict[str, str], listener: Listener) -> Channel:
        """Connect to what `ChannelServer.start` returned.  Raises ReplicaLost.

        `listener` is told nothing before the event loop's next turn.
        """
        link_id = uuid.uuid4().hex
        writer = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address["host"], int(address["port"]), limit=READ_BYTES)
                _tune(writer)
                writer.write(_frame(Hello(address["token"], link_id)))
                welcome = _decode_welcome(await _read_one(reader, MAX_HELLO_BYTES))
            if welcome.replica_id != replica_id:
                raise ConnectionError(f"{welcome.replica_id} is there instead")
        except (OSError, TimeoutError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            if writer is not None:
                writer.close()
            raise ReplicaLost(replica_id, f"cannot be reached: {error!r}") from error
        except asyncio.CancelledError:  # the replica is no longer wanted
            if writer is not None:
                writer.close()
            raise
        return cls(replica_id, link_id, reader, writer, listener)

    def submit(
        self, request: GenerateRequest, emit: Callable[[TokenDelta], None], *, has_handoff: bool, local_reason: str
    ) -> Sequence:
        """Start a sequence; await its `ended`, and give it to `finish` in any case.  Raises ReplicaLost."""
        if self.is_closed:
            raise ReplicaLost(self._replica_id)
        sequence = Sequence(next(self._numbers), emit)
        self._sequences[sequence.number] = sequence
        self._writer.write(_frame(Submit(sequence.number, request, has_handoff, local_reason)))
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence; one that has not ended is cancelled."""
        if self._sequences.pop(sequence.number, None) is not None and not self.is_closed:
            self._writer.write(_frame(Cancel(sequence.number)))
        if self._is_retired and not self._sequences:
            self.close()

    def retire(self) -> None:
        """Close as soon as no sequence runs; its listener is told nothing more."""
        self._is_retired = True
        if not self._sequences:
            self.close()

    def close(self) -> None:
        """End the connection and thereby every sequence."""
        self._task.cancel()
        self._end("its connection was closed")

    def _end(self, detail: str) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self._writer.close()
        self.on_close()  # first, so that no sequence that fails now is begun here again
        for sequence in self._sequences.values():
            sequence.fail(ReplicaLost(self._replica_id, detail))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        detail = "its connection ended"
        try:
            async for frames in _read_frames(reader):
                self._hand_out(_merge([_decode_batch(frame) for frame in frames]))
        except (OSError, msgspec.DecodeError) as error:
            detail = type(error).__name__
            logger.warning("replica_id=%s connection broke: %r", self._replica_id, error)
        finally:
            if not self._is_retired:
                self.lost.set_result(None)
            self._end(detail)

    def _hand_out(self, batch: Batch) -> None:
        for number, delta in batch.deltas:
            # One that was cancelled or has failed may still be in a frame that was on its way.
            if (sequence := self._sequences.get(number)) is None or sequence.ended.done():
                continue
            sequence.has_started = True
            sequence.emit(delta)
            if delta.finish_reason is not None:
                del self._sequences[number]
                sequence.ended.set_result(None)
        for number, failure in batch.failures:
            if (sequence := self._sequences.pop(number, None)) is not None:
                sequence.fail(_ERRORS[failure.error](failure.detail))
        if batch.load is not None or batch.kv is not None:
            # Once whoever waits for a sequence that ended just now has counted it out, as this load does.
            asyncio.get_running_loop().call_soon(self._tell, batch.load, batch.kv)

    def _tell(self, load: ReplicaLoad | None, kv: KvUpdate | None) -> None:
        if self.is_closed or self._is_retired:
            return
        if kv is not None:
            self._listener.on_kv(self._replica_id, kv)
        if load is not None:
            self._listener.on_load(self._replica_id, load)
