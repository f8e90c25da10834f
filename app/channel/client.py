"""A frontend's end of the channel to one replica: sequences go out, their deltas and the replica's state come in."""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable
from itertools import islice
from typing import Protocol

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
    Hello,
    Submit,
    Welcome,
    decode_batch,
    decode_welcome,
    length_of,
    read_frames,
    read_one,
    to_frame,
    tune,
)
from app.errors import BatonError, DeltaNotTaken, EngineDead, EngineFailed, InvalidRequest, ReplicaLost
from app.kv_cache.updates import merge_waiting
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaLoad, Role, TokenDelta, merge_deltas
from app.observers import tell

logger = logging.getLogger("baton.channel")

MAX_OFFERED = 16
"""How many sequences are offered to others each time that a replica which is being removed asks.  To find a place for
one takes some half a millisecond, for which all others of the frontend wait."""


class SubmittedSequence:
    """One sequence on a channel, as its frontend sees it."""

    def __init__(self, number: int, emit: Callable[[TokenDelta], None]) -> None:
        self.number = number
        self.emit = emit
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.on_leaving: Callable[[], object] = lambda: None
        """Called when the replica, which is being removed, asks to have the sequence taken elsewhere."""

    def fail(self, error: BatonError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class Listener(Protocol):
    """Who is told what a replica tells of itself; a frontend's state of the replica's pool."""

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        """Take the replica's present load."""

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        """Take a change of the replica's prefix cache.  The first update of a connection holds the whole cache."""

    def on_links(self, replica: str, links: list[Link]) -> None:
        """Take all links of a decode replica."""

    def on_role(self, replica: str, role: Role) -> None:
        """Take what the replica does from now on."""


class Channel:
    """A frontend's end of the connection to one replica."""

    def __init__(
        self,
        replica_id: str,
        channel_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        listener: Listener,
    ) -> None:
        self.channel_id = channel_id
        self.is_closed = False
        self.num_heard = 0
        """How often anything has come from the replica."""
        self.lost: asyncio.Future[EngineDead | ReplicaLost] = asyncio.get_running_loop().create_future()
        """Why the connection ended, once it has before the replica had drained."""
        self.on_close: Callable[[], object] = lambda: None
        self.replica_id = replica_id
        self._writer = writer
        self._listener = listener
        self._is_retired = False
        self._death, self._has_drained = "", False
        self._backlog = Backlog()
        self._numbers = itertools.count()
        self._sequences: dict[int, SubmittedSequence] = {}
        self._task = asyncio.create_task(self._receive(reader), name=f"channel-{replica_id}")
        watch(self._task, lambda error: self._end(type(error).__name__))
        self._task.add_done_callback(lambda _: self._end("its connection ended"))  # even if it was cancelled

    @classmethod
    async def connect(cls, replica_id: str, address: dict[str, str], listener: Listener) -> Channel:
        """Connect to the `address` that `ChannelServer.start` returned.  Raises ReplicaLost.

        `listener` is not called before the next turn of the event loop.
        """
        channel_id = uuid.uuid4().hex
        writer = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address["host"], int(address["port"]), limit=READ_BYTES)
                tune(writer)
                writer.write(to_frame(Hello(address["token"], channel_id, PROTOCOL_VERSION)))
                welcome = decode_welcome(await read_one(reader, MAX_HELLO_BYTES))
            _check(welcome, replica_id)
        except BaseException as error:  # among them a cancellation, when Serve has removed the replica
            if writer is not None:
                writer.close()
            if isinstance(error, OSError | asyncio.IncompleteReadError | msgspec.DecodeError):
                # Without the error's own text, which has the address: /health says this to everybody.
                raise ReplicaLost(replica_id, f"cannot be reached: {type(error).__name__}") from error
            raise
        return cls(replica_id, channel_id, reader, writer, listener)

    def submit(
        self, request: GenerateRequest, emit: Callable[[TokenDelta], None], *, has_handoff: bool, local_reason: str
    ) -> SubmittedSequence:
        """Start a sequence.  Raises ReplicaLost, and InvalidRequest if the request cannot be sent.

        The caller awaits the sequence's `ended`, and passes it to `finish` whatever happens.
        """
        if self.is_closed:
            raise ReplicaLost(self.replica_id)
        number = next(self._numbers)
        frame = _frame_of(Submit(number, request, has_handoff, local_reason))
        sequence = self._sequences[number] = SubmittedSequence(number, emit)
        self._writer.write(frame)
        return sequence

    def finish(self, sequence: SubmittedSequence) -> None:
        """Forget a sequence, and cancel it if it has not ended."""
        if self._sequences.pop(sequence.number, None) is not None and not self.is_closed:
            self._writer.write(to_frame(Cancel(sequence.number)))

    def tell_backlog(self, backlog: Backlog) -> None:
        """Tell the replica its share of what waits in this process, if that has changed."""
        if backlog != self._backlog and not self.is_closed:
            self._backlog = backlog
            self._writer.write(to_frame(backlog))

    def retire(self) -> None:
        """Do not call the listener any more.  The replica ends the connection when it has drained."""
        self._is_retired = True
        self.tell_backlog(Backlog())

    def close(self, detail: str = "its connection was closed") -> None:
        """End the connection, and with it every sequence, because of `detail`."""
        self._task.cancel()
        self._end(detail)

    def _end(self, detail: str) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self._writer.close()
        if not self._has_drained:
            self.lost.set_result(EngineDead(self._death) if self._death else ReplicaLost(self.replica_id, detail))
        tell(self.on_close)  # before sequences fail, so that none of them is started here again
        for sequence in self._sequences.values():
            sequence.fail(ReplicaLost(self.replica_id, detail))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        try:
            async for frames in read_frames(reader, MAX_BATCH_BYTES):
                self.num_heard += 1
                self._hand_out(_merge([decode_batch(frame) for frame in frames]))
        except (OSError, msgspec.DecodeError) as error:
            logger.warning("replica_id=%s connection broke: %r", self.replica_id, error)
            self._end(type(error).__name__)

    def _hand_out(self, batch: Batch) -> None:
        self._death, self._has_drained = batch.death, batch.has_drained
        for number, delta in batch.deltas:
            # A frame that was on its way may still hold deltas of a sequence that was cancelled or has failed.
            if (sequence := self._sequences.get(number)) is not None and not sequence.ended.done():
                self._give(sequence, delta)
        for number, failure in batch.failures:
            if (sequence := self._sequences.pop(number, None)) is not None:
                sequence.fail(ERRORS.get(failure.error, EngineFailed)(failure.detail))
        if batch.is_leaving:
            self._offer_sequences()
        if any(news is not None for news in (batch.load, batch.kv, batch.links, batch.role)):
            # This load no longer counts the sequences that ended just now.  Whoever waits for them has to uncount them
            # first, so the listener is called in the next turn of the event loop.
            asyncio.get_running_loop().call_soon(self._notify, batch)

    def _offer_sequences(self) -> None:
        """Offer some sequences to other replicas.  Those that stay come last the next time."""
        for number in list(islice(self._sequences, MAX_OFFERED)):
            sequence = self._sequences[number] = self._sequences.pop(number)
            if not sequence.ended.done():
                tell(sequence.on_leaving)

    def _give(self, sequence: SubmittedSequence, delta: TokenDelta) -> None:
        """Give a delta to its sequence.  If it cannot be taken, that sequence fails, and no other."""
        try:
            sequence.emit(delta)
        except Exception as error:
            logger.exception("replica_id=%s a token was not taken", self.replica_id)
            sequence.fail(DeltaNotTaken(f"a token was not taken: {type(error).__name__}"))
            self.finish(sequence)
            return
        if delta.finish_reason is not None:
            self._sequences.pop(sequence.number, None)
            if not sequence.ended.done():
                sequence.ended.set_result(None)

    def _notify(self, news: Batch) -> None:
        if self.is_closed or self._is_retired:
            return
        if news.role is not None:
            tell(self._listener.on_role, self.replica_id, news.role)
        if news.links is not None:
            tell(self._listener.on_links, self.replica_id, news.links)
        if news.kv is not None and not tell(self._listener.on_kv, self.replica_id, news.kv):
            # Later changes would be made to a cache that is not the replica's: better nothing is known of it.
            tell(self._listener.on_kv, self.replica_id, KvUpdate([], [], is_reset=True))
        if news.load is not None:
            tell(self._listener.on_load, self.replica_id, news.load)


def _check(welcome: Welcome, replica_id: str) -> None:
    """Raise ReplicaLost unless `welcome` comes from this replica and both sides speak the same protocol."""
    if welcome.problem:
        raise ReplicaLost(replica_id, f"it refuses this frontend: {welcome.problem}")
    if welcome.version != PROTOCOL_VERSION:
        problem = f"it speaks version {welcome.version} of the channel's protocol, and this frontend {PROTOCOL_VERSION}"
        raise ReplicaLost(replica_id, problem)
    if welcome.replica_id != replica_id:
        raise ReplicaLost(replica_id, f"{welcome.replica_id} is there instead")


def _frame_of(submit: Submit) -> bytes:
    """Raises InvalidRequest if the frame is too long, or if a value in it has no form to be sent in."""
    try:
        frame = to_frame(submit)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"the request cannot be sent to an engine: {error}") from error
    if (length := length_of(frame)) > MAX_SUBMIT_BYTES:
        raise InvalidRequest(f"the request is too large for an engine: {length} bytes of at most {MAX_SUBMIT_BYTES}")
    return frame


def _merge(batches: list[Batch]) -> Batch:
    """Merge the batches that arrived together, which happens when this process was behind."""
    if len(batches) == 1:
        return batches[0]
    deltas: dict[int, TokenDelta] = {}
    for batch in batches:
        for number, delta in batch.deltas:
            deltas[number] = merge_deltas(deltas[number], delta) if number in deltas else delta
    failures = [failure for batch in batches for failure in batch.failures]
    loads = [batch.load for batch in batches if batch.load is not None]
    kv = [batch.kv for batch in batches if batch.kv is not None]
    links = [batch.links for batch in batches if batch.links is not None]
    roles = [batch.role for batch in batches if batch.role is not None]
    return Batch(
        list(deltas.items()),
        failures,
        loads[-1] if loads else None,
        merge_waiting(kv),
        links[-1] if links else None,
        batches[-1].death,
        batches[-1].has_drained,
        any(batch.is_leaving for batch in batches),
        roles[-1] if roles else None,
    )
