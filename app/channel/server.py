"""A replica's end of its channels: it runs the sequences that frontends submit, and sends deltas and its state."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from app.background import watch
from app.channel.protocol import (
    CONNECT_TIMEOUT_S,
    ERRORS,
    MAX_BATCH_BYTES,
    MAX_HELLO_BYTES,
    MAX_SUBMIT_BYTES,
    PROTOCOL_VERSION,
    READ_BYTES,
    Backlog,
    Batch,
    Cancel,
    Failure,
    Submit,
    Welcome,
    decode_call,
    decode_hello,
    length_of,
    read_frames,
    read_one,
    to_frame,
    tune,
)
from app.errors import BatonError, EngineFailed, InvalidRequest
from app.kv_cache.updates import merge_waiting
from app.messages import KvUpdate, Link, ReplicaLoad, Role, TokenDelta, merge_deltas
from app.observers import tell

logger = logging.getLogger("baton.channel")

CLOSE_TIMEOUT_S = 1.0
PUBLISH_PERIOD_S = 0.005
"""If there are no deltas, load and cache updates are sent at most this often; the first one is sent at once."""
CANNOT_BE_SENT = (
    f"one step of the engine brought more than the {MAX_BATCH_BYTES} bytes that can be sent; ask for fewer logprobs"
)
ASK_AGAIN_S = 0.2
"""How often a replica that is being removed asks to have its sequences taken elsewhere."""
MAX_WAITING_BLOCKS = 16_384
"""How many changed blocks of the prefix cache may wait for a frontend.  If there are more, it gets a snapshot."""


class FrontendChannel:
    """A frontend, as a replica sees it: its sequences, and what waits to be sent to it."""

    def __init__(
        self,
        channel_id: str,
        load: ReplicaLoad | None,
        snapshot: Callable[[], KvUpdate | None],
        links: list[Link] | None = None,
        role: Role | None = None,
    ) -> None:
        """`load`, `links` and `role` are the present ones, None if there are none to tell.

        `snapshot` tells the whole prefix cache, or None if the replica does not know.
        """
        self.id = channel_id
        self.backlog = Backlog()
        """What the frontend said last."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._beginning: dict[int, bool] = {}
        """Those of `_tasks` that have not begun, and whether each is to be cancelled as soon as it has."""
        self._once_begun: Callable[[], object] | None = None
        self._deltas: dict[int, TokenDelta] = {}
        self._failures: list[tuple[int, Failure]] = []
        self._load = load
        self._links = links
        self._is_leaving = False
        self._role = role
        self._kv: list[KvUpdate] = []
        self._num_waiting_blocks = 0
        self._snapshot = snapshot
        self._needs_snapshot = True
        self._has_some = asyncio.Event()
        self._has_some.set()
        self._loop = asyncio.get_running_loop()
        self._published_at = -PUBLISH_PERIOD_S
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return the number of running sequences."""
        return len(self._tasks)

    def put(self, number: int, delta: TokenDelta) -> None:
        """Send a delta, together with everything else from this turn of the event loop."""
        waiting = self._deltas.get(number)
        self._deltas[number] = delta if waiting is None else merge_deltas(waiting, delta)
        self._has_some.set()

    def put_load(self, load: ReplicaLoad) -> None:
        """Send the replica's load.  If a newer load comes while it waits, that one is sent instead."""
        self._load = load
        self._send_soon()

    def put_links(self, links: list[Link]) -> None:
        """Send the replica's links.  If they change while they wait, only the newest are sent."""
        self._links = links
        self._send_soon()

    def ask_to_leave(self) -> None:
        """Ask the frontend to take the sequences elsewhere."""
        self._is_leaving = True
        self._has_some.set()

    def put_role(self, role: Role) -> None:
        """Send the replica's role, with whatever else waits."""
        self._role = role
        self._send_soon()

    def put_kv(self, update: KvUpdate) -> None:
        """Send a change of the prefix cache.  Changes are merged when they are sent."""
        if self._needs_snapshot:  # the snapshot is made when it is sent, so it will include this change
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
        """Send what waits with the next delta, but no later than PUBLISH_PERIOD_S after the last frame."""
        if self._timer is None:
            self._timer = self._loop.call_at(self._published_at + PUBLISH_PERIOD_S, self._has_some.set)

    def start(self, number: int, sequence: Coroutine[Any, Any, None]) -> None:
        """Run `sequence`.  If it raises a BatonError, the frontend gets that error.

        However it ends, even if its task is cancelled before it has begun, it counts no longer.
        """
        task = asyncio.create_task(self._run(number, sequence), name=f"sequence-{number}")
        self._tasks[number], self._beginning[number] = task, False

        def on_end(_: object) -> None:
            self._forget(number)
            sequence.close()

        task.add_done_callback(on_end)
        watch(task, lambda error: self._fail(number, EngineFailed(type(error).__name__)))

    async def _run(self, number: int, sequence: Coroutine[Any, Any, None]) -> None:
        try:
            # They begin in the order in which they came.  Where the loop keeps that order, nothing waits here.
            while next(iter(self._beginning)) != number:  # noqa: ASYNC110
                await asyncio.sleep(0)
            self._begin(number)
            await sequence
        except asyncio.CancelledError:
            self._deltas.pop(number, None)
            raise
        except BatonError as error:
            self._fail(number, error)
        except Exception as error:
            logger.exception("a sequence of channel_id=%s failed", self.id)
            self._fail(number, EngineFailed(type(error).__name__))
        finally:
            self._forget(number)  # before any other callback runs, so that the load which is told next has it right

    def _begin(self, number: int) -> None:
        """Note that a sequence begins: from here on its code runs up to where it waits for the first time."""
        if self._beginning.pop(number):
            self._tasks[number].cancel()
        self._tell_that_all_have_begun()

    def _forget(self, number: int) -> None:
        self._tasks.pop(number, None)
        if self._beginning.pop(number, None) is not None:
            self._tell_that_all_have_begun()

    def _fail(self, number: int, error: BatonError) -> None:
        kind = type(error).__name__
        self._failures.append((number, Failure(kind if kind in ERRORS else "EngineFailed", str(error))))
        self._has_some.set()

    def cancel(self, number: int) -> None:
        """Cancel a sequence, but not before it has begun.

        If a task is cancelled before its first step, none of its code runs, not even its cleanup; the reference to a
        prefill would then wait for a sequence that never comes.
        """
        if number in self._beginning:
            self._beginning[number] = True
        elif task := self._tasks.get(number):
            task.cancel()

    def cancel_all(self) -> None:
        for number in list(self._tasks):
            self.cancel(number)

    def once_all_have_begun(self, callback: Callable[[], object]) -> None:
        """Call `callback` once each sequence has run up to where it waits for the first time, or has ended."""
        self._once_begun = callback
        self._tell_that_all_have_begun()

    def _tell_that_all_have_begun(self) -> None:
        if self._once_begun is not None and not self._beginning:
            self._loop.call_soon(self._once_begun)
            self._once_begun = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        return list(self._tasks.values())

    async def take(self) -> Batch:
        """Wait until there is something to send, and return all of it."""
        await self._has_some.wait()
        return self.take_now()

    def take_now(self) -> Batch:
        """Return everything that waits to be sent, even if that is nothing."""
        self._has_some.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._published_at = None, self._loop.time()
        kv = self._snapshot() if self._needs_snapshot else merge_waiting(self._kv)
        batch = Batch(
            list(self._deltas.items()),
            self._failures,
            self._load,
            kv,
            self._links,
            is_leaving=self._is_leaving,
            role=self._role,
        )
        self._deltas, self._failures, self._load, self._links, self._role = {}, [], None, None, None
        self._is_leaving = False
        self._forget_waiting_kv()
        self._needs_snapshot = False
        return batch

    def frames(self, batch: Batch) -> list[bytes]:
        """Return the frames for `batch`, which is one unless it cannot be sent as a whole.

        If a sequence's delta alone is too long or cannot be encoded, that sequence fails, and no other.
        """
        if (frame := _frame_of(batch)) is not None:
            return [frame]
        frames, failures = [], batch.failures
        for number, delta in batch.deltas:
            if (frame := _frame_of(Batch([(number, delta)], []))) is not None:
                frames.append(frame)
                continue
            logger.error("channel_id=%s the delta of sequence %d cannot be sent", self.id, number)
            self.cancel(number)
            failures = [*failures, (number, Failure(InvalidRequest.__name__, CANNOT_BE_SENT))]
        return [*frames, to_frame(msgspec.structs.replace(batch, deltas=[], failures=failures))]

    def close(self) -> None:
        """Cancel all sequences and send nothing more."""
        self.cancel_all()
        if self._timer is not None:
            self._timer.cancel()


class ChannelServer:
    """A replica's end of all its channels."""

    def __init__(self, replica_id: str, run: Callable[[FrontendChannel, Submit], Coroutine[Any, Any, None]]) -> None:
        """`run` serves one sequence; it is cancelled when the frontend cancels it or goes away."""
        self.channels: dict[str, FrontendChannel] = {}
        self.on_open: Callable[[FrontendChannel], object] = lambda channel: None
        self.on_close: Callable[[FrontendChannel], object] = lambda channel: None
        """Called once each of the channel's sequences has been cancelled."""
        self.on_backlog: Callable[[], object] = lambda: None
        """Called when `backlog` may have changed."""
        self.snapshot: Callable[[], KvUpdate | None] = lambda: None
        """Returns the whole prefix cache, for a frontend that has just connected or fallen behind; None if it is not
        known."""
        self._replica_id = replica_id
        self._run = run
        self._load: ReplicaLoad | None = None
        self._links: list[Link] | None = None
        self._role: Role | None = None
        self._token = secrets.token_urlsafe()
        self._server: asyncio.Server | None = None
        self._writers: dict[FrontendChannel, asyncio.StreamWriter] = {}
        self._attending: set[asyncio.Task[Any]] = set()

    async def start(self, host: str) -> dict[str, str]:
        """Listen on a free port.  Returns the address for `Channel.connect`, which must not leave the cluster."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=READ_BYTES)
        port = self._server.sockets[0].getsockname()[1]
        return {"host": host, "port": str(port), "token": self._token}

    def num_sequences(self) -> int:
        return sum(len(channel) for channel in self.channels.values())

    def backlog(self) -> Backlog:
        """Return what waits for this replica in all frontends together."""
        told = [channel.backlog for channel in self.channels.values()]
        return Backlog(sum(one.queued_tokens for one in told), sum(one.sequences for one in told))

    def publish_load(self, load: ReplicaLoad) -> None:
        """Send the load to all frontends, including those that connect later."""
        self._load = load
        for channel in self.channels.values():
            channel.put_load(load)

    def publish_links(self, links: list[Link]) -> None:
        """Send a decode replica's links to all frontends, including those that connect later."""
        self._links = links
        for channel in self.channels.values():
            channel.put_links(links)

    def publish_role(self, role: Role) -> None:
        """Tell all frontends what this replica does from now on, including those that connect later."""
        self._role = role
        for channel in self.channels.values():
            channel.put_role(role)

    def publish_kv(self, update: KvUpdate) -> None:
        """Tell all frontends of a change, which `snapshot` has in it from now on."""
        for channel in self.channels.values():
            channel.put_kv(update)

    async def drain(self, drain_s: float) -> None:
        """Return once no sequence runs.  After `drain_s` seconds the frontends are asked to take them elsewhere.

        They are asked again and again, as they do so only while other replicas have room.
        """
        wait_s = drain_s
        while tasks := [task for channel in self.channels.values() for task in channel.tasks]:
            if (await asyncio.wait(tasks, timeout=wait_s))[1]:
                for channel in self.channels.values():
                    channel.ask_to_leave()
                wait_s = ASK_AGAIN_S

    async def stop(self, *, death: str = "", has_drained: bool = False) -> None:
        """Send what waits, end every connection and with it every sequence, and stop listening.

        The frontends are told the reason: `death`, which is why the engine died, or that the replica `has_drained`.
        """
        if self._server is not None:
            self._server.close()
        for channel, writer in self._writers.items():
            last = msgspec.structs.replace(channel.take_now(), death=death, has_drained=has_drained)
            _write(channel.frames(last), writer)
            writer.close()
        if self._attending:
            await asyncio.wait(self._attending, timeout=CLOSE_TIMEOUT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._attending.add(task)
        task.add_done_callback(self._attending.discard)
        watch(task, lambda _: None)  # its connection has ended with it, and the frontend connects again
        try:
            if (channel := await self._greet(reader, writer)) is not None:
                await self._attend(channel, reader, writer)
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            logger.warning("a frontend's connection broke: %r", error)
        finally:
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> FrontendChannel | None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            hello = decode_hello(await read_one(reader, MAX_HELLO_BYTES))
        if not hmac.compare_digest(hello.token, self._token):
            logger.warning("a connection without the right token was refused")
            return None
        if hello.version != PROTOCOL_VERSION:
            problem = f"the replica speaks version {PROTOCOL_VERSION} of the channel's protocol, not {hello.version}"
            logger.warning("a frontend was refused: %s", problem)
            writer.write(to_frame(Welcome("", PROTOCOL_VERSION, problem)))
            return None
        tune(writer)
        writer.write(to_frame(Welcome(self._replica_id, PROTOCOL_VERSION)))
        return FrontendChannel(hello.channel_id, self._load, self.snapshot, self._links, self._role)

    async def _attend(
        self, channel: FrontendChannel, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.channels[channel.id] = channel
        self._writers[channel] = writer
        sender = asyncio.create_task(_send(channel, writer), name=f"send-{channel.id}")
        watch(sender, lambda _: writer.transport.abort())  # which ends the reading below
        try:
            self.on_open(channel)
            async for frames in read_frames(reader, MAX_SUBMIT_BYTES):
                for frame in frames:
                    call = decode_call(frame)
                    self._take(channel, call)
        finally:
            sender.cancel()
            channel.close()
            del self.channels[channel.id], self._writers[channel]
            tell(self.on_backlog)
            channel.once_all_have_begun(partial(self.on_close, channel))

    def _take(self, channel: FrontendChannel, call: Submit | Cancel | Backlog) -> None:
        if isinstance(call, Submit):
            channel.start(call.number, self._run(channel, call))
        elif isinstance(call, Cancel):
            channel.cancel(call.number)
        else:
            channel.backlog = call
            tell(self.on_backlog)


async def _send(channel: FrontendChannel, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # a connection that breaks is noticed by whoever reads from it
        while True:
            _write(channel.frames(await channel.take()), writer)
            await writer.drain()  # waits only if the peer does not keep up; meanwhile deltas merge


def _write(frames: list[bytes], writer: asyncio.StreamWriter) -> None:
    for frame in frames:
        writer.write(frame)


def _frame_of(batch: Batch) -> bytes | None:
    """Return a batch as a frame; None if it cannot be encoded or is too long."""
    try:
        frame = to_frame(batch)
    except (TypeError, ValueError, OverflowError):
        return None
    return frame if length_of(frame) <= MAX_BATCH_BYTES else None
