"""A sequence that is cancelled is forgotten and its prefill's KV given back, whatever arrives and runs in which order.

The loop of these tests runs what is ready in an order that Hypothesis draws.  asyncio's own is first in, first out, but
nothing here is to hold only for that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from random import Random
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.channel.protocol import Cancel, Submit, to_frame
from app.channel.server import ChannelServer, FrontendChannel
from app.messages import GenerateRequest, TransferDescriptor
from deployments.replica.handoff_rendezvous import HandoffRendezvous
from tests.unit.waiting import PATIENCE_S, until

TURNS = 30
"""Of the event loop: enough for everything to come to rest."""
EVENTS = ("submit", "cancel", "attach", "prefill ends")
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={})


class ShuffledLoop(asyncio.SelectorEventLoop):
    """Runs what is ready in any order; what becomes ready meanwhile comes after it."""

    def __init__(self, order: Random) -> None:
        super().__init__()
        self._order = order

    def _run_once(self) -> None:
        ready: Any = self._ready  # type: ignore[attr-defined]
        shuffled = list(ready)
        self._order.shuffle(shuffled)
        ready.clear()
        ready.extend(shuffled)
        super()._run_once()  # type: ignore[misc]


class Writer:
    """A connection on which nobody listens."""

    transport = cast(Any, None)

    def write(self, frame: bytes) -> None: ...

    async def drain(self) -> None: ...


class Reference:
    def __init__(self, prefill: asyncio.Future[TransferDescriptor]) -> None:
        self._prefill = prefill

    def __await__(self) -> Generator[Any, None, TransferDescriptor]:
        return asyncio.shield(self._prefill).__await__()


class Replica:
    """A decode replica with one frontend, whose engine runs a sequence until it is cancelled."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.released: list[int] = []
        self.attached: set[int] = set()
        self.prefills: dict[int, asyncio.Future[TransferDescriptor]] = {}
        self.rendezvous = HandoffRendezvous(self._release)
        self.server = ChannelServer("d", self._run)
        self.server.on_open = lambda channel: self.rendezvous.open(channel.id)
        self.server.on_close = lambda channel: self.rendezvous.close(channel.id)
        self.channel = FrontendChannel("channel", None, lambda: None)
        self.reader = asyncio.StreamReader()
        self.attending = asyncio.create_task(self.server._attend(self.channel, self.reader, cast(Any, Writer())))

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        await self.rendezvous.receive(channel.id, call.number, timeout_s=60.0)
        self.taken.append(call.number)
        await asyncio.Event().wait()

    async def _release(self, descriptor: TransferDescriptor) -> None:
        self.released.append(descriptor.prompt_tokens)

    def do(self, event: str, number: int) -> None:
        if event == "submit":
            self._feed(Submit(number, REQUEST, True, ""))
        elif event == "cancel":
            self._feed(Cancel(number))
        elif event == "attach":
            self.attached.add(number)
            self.rendezvous.attach("channel", number, Reference(self._prefill(number)))
        elif event == "close":
            self.reader.feed_eof()
        elif not (prefill := self._prefill(number)).done():
            prefill.set_result(descriptor(number))

    def _feed(self, call: Submit | Cancel) -> None:
        if not self.reader._eof:  # type: ignore[attr-defined]
            self.reader.feed_data(to_frame(call))

    def _prefill(self, number: int) -> asyncio.Future[TransferDescriptor]:
        return self.prefills.setdefault(number, asyncio.get_running_loop().create_future())


def descriptor(number: int) -> TransferDescriptor:
    return TransferDescriptor(
        request_id=str(number),
        engine="e",
        replica_id="p",
        prompt_tokens=number,
        cached_tokens=0,
        ready_at=time.time(),
        lease_s=600.0,
        params={},
    )


async def rest() -> None:
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def drive(steps: list[tuple[str, int, int]]) -> None:
    """Let each step happen, so many turns of the loop after the one before; then all is cancelled and ends."""
    replica = Replica()
    await asyncio.sleep(0)
    await rest()
    numbers: dict[int, int] = {}  # a frontend numbers what it submits
    for event, which, turns in steps:
        if event == "submit" and which not in numbers:
            numbers[which] = len(numbers)
            replica.do("submit", numbers[which])
        elif event == "close" or (which in numbers and event != "submit"):
            replica.do(event, numbers.get(which, 0))
        for _ in range(turns):
            await asyncio.sleep(0)
    for number in numbers.values():
        replica.do("prefill ends", number)
        replica.do("cancel", number)
    await rest()
    assert len(replica.channel) == 0
    async with asyncio.timeout(PATIENCE_S):
        await replica.server.drain(PATIENCE_S)
    replica.do("close", 0)
    await rest()
    assert replica.attending.done()
    assert sorted(replica.taken + replica.released) == sorted(replica.attached)


@example([("submit", 0, 0), ("submit", 2, 3), ("attach", 2, 0)], 0)  # the second may begin before the first
@given(
    st.lists(st.tuples(st.sampled_from([*EVENTS, "close"]), st.integers(0, 2), st.integers(0, 3)), max_size=14),
    st.integers(0, 1 << 16),
)
def test_nothing_is_left_behind(steps: list[tuple[str, int, int]], order: int) -> None:
    loop = ShuffledLoop(Random(order))
    try:
        loop.run_until_complete(drive(steps))
    finally:
        loop.close()


async def test_a_task_that_somebody_else_cancels_before_it_has_begun_is_forgotten() -> None:
    """Then none of its code runs, and what counts it out must be elsewhere."""
    channel = FrontendChannel("channel", None, lambda: None)
    server = ChannelServer("d", lambda *_: asyncio.sleep(60))
    server.channels[channel.id] = channel
    closed: list[str] = []
    channel.start(0, asyncio.sleep(60))
    channel.start(1, asyncio.sleep(60))
    channel.once_all_have_begun(lambda: closed.append(channel.id))
    for task in channel.tasks:
        task.cancel()
    async with asyncio.timeout(PATIENCE_S):
        await server.drain(PATIENCE_S)
    assert server.num_sequences() == 0
    await until(lambda: closed == ["channel"])


@pytest.mark.parametrize("is_twice", [False, True])
async def test_a_sequence_that_never_waits_ends_although_it_was_cancelled(is_twice: bool) -> None:
    channel = FrontendChannel("channel", None, lambda: None)
    ran: list[int] = []

    async def sequence() -> None:
        ran.append(1)

    channel.start(0, sequence())
    for _ in range(1 + is_twice):
        channel.cancel(0)
    await until(lambda: len(channel) == 0)
    assert ran == [1]
