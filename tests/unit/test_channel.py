"""The connection between a frontend and a decode replica, over real sockets."""

import asyncio
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from app.channel import Channel, ChannelServer, Hello, Link, Submit, _frame
from app.errors import BatonError, EngineDead, EngineFailed, InvalidRequest, ReplicaLost
from app.messages import GenerateRequest, TokenDelta

PATIENCE_S = 5.0
LAST = TokenDelta([3], finish_reason="stop")


def request(request_id: str = "r", tokens: int = 3) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_token_ids=list(range(tokens)), sampling={"max_tokens": 4})


class Replica:
    """A decode replica whose sequences do what the test puts."""

    def __init__(self) -> None:
        self.calls: list[Submit] = []
        self.cancelled: list[str] = []
        self.closed: list[Link] = []
        self.started = asyncio.Event()
        self.error: Exception | None = None
        self.script: list[TokenDelta] = []
        self.hangs = False
        self.links: list[Link] = []
        self.server = ChannelServer("d", self.run)
        self.server.on_close = self.closed.append
        self.address: dict[str, str] = {}

    async def run(self, link: Link, call: Submit) -> None:
        self.calls.append(call)
        self.links.append(link)
        self.started.set()
        try:
            for delta in self.script:
                link.put(call.number, delta)
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(call.request.request_id)
            raise


@asynccontextmanager
async def connected() -> AsyncGenerator[tuple[Replica, Channel], None]:
    replica = Replica()
    replica.address = await replica.server.start("127.0.0.1")
    channel = await Channel.connect("d", replica.address)
    try:
        yield replica, channel
    finally:
        channel.close()
        await replica.server.stop()


async def served(channel: Channel, into: list[TokenDelta], **options: bool | str) -> None:
    arguments = {"has_handoff": False, "local_reason": "", **options}
    sequence = channel.submit(request(), into.append, **arguments)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(PATIENCE_S):
            await sequence.ended
    finally:
        channel.finish(sequence)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_sequence_gets_its_deltas_in_order():
    async with connected() as (replica, channel):
        replica.script = [LAST]
        received: list[TokenDelta] = []
        await served(channel, received, has_handoff=True, local_reason="why")
        assert received == [LAST]
        assert replica.calls == [Submit(0, request(), True, "why")]
        assert channel.is_idle


async def test_what_waits_is_merged_and_nothing_is_lost():
    async with connected() as (replica, channel):
        replica.script = [TokenDelta([1]), TokenDelta([2]), LAST]
        received: list[TokenDelta] = []
        await served(channel, received)
        assert received == [TokenDelta([1, 2, 3], finish_reason="stop")]


async def test_many_sequences_share_the_connection():
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[list[TokenDelta]] = [[] for _ in range(50)]
        tasks = [asyncio.create_task(served(channel, into)) for into in received]
        await until(lambda: len(replica.calls) == len(tasks))
        for call in replica.calls:
            replica.links[0].put(call.number, TokenDelta([call.number], finish_reason="length"))
        await asyncio.gather(*tasks)
        assert [deltas[0].token_ids for deltas in received] == [[number] for number in range(50)]


@pytest.mark.parametrize("error", [InvalidRequest("no such thing"), EngineDead("gone"), EngineFailed("broke")])
async def test_an_error_ends_the_sequence_after_its_deltas(error: BatonError):
    async with connected() as (replica, channel):
        replica.script, replica.error = [TokenDelta([1])], error
        received: list[TokenDelta] = []
        with pytest.raises(type(error), match=str(error)):
            await served(channel, received)
        assert received == [TokenDelta([1])]


async def test_an_error_that_nobody_foresaw_is_told_without_its_text():
    async with connected() as (replica, channel):
        replica.error = RuntimeError("secret")
        with pytest.raises(EngineFailed, match=r"^RuntimeError$"):
            await served(channel, [])
        replica.error, replica.script = None, [LAST]
        await served(channel, [])


async def test_cancelling_reaches_the_replica():
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        task.cancel()
        await until(lambda: replica.cancelled == ["r"])
        assert channel.is_idle
        assert replica.server.num_sequences() == 0


async def test_a_frontend_that_goes_away_takes_its_sequences_along():
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        channel.close()
        await until(lambda: replica.cancelled == ["r"])
        await until(lambda: [link.id for link in replica.closed] == [channel.link_id])
        with pytest.raises(ReplicaLost):
            await task


async def test_a_replica_that_goes_away_fails_its_sequences_and_every_later_one():
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        await replica.server.stop()
        with pytest.raises(ReplicaLost):
            await task
        assert channel.is_closed
        with pytest.raises(ReplicaLost):
            await served(channel, [])
        with pytest.raises(ReplicaLost):
            await Channel.connect("d", replica.address)


async def test_stopping_sends_what_waits():
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        task = asyncio.create_task(served(channel, received))
        await replica.started.wait()
        replica.links[0].put(0, LAST)
        await replica.server.stop()
        await task
        assert received == [LAST]


async def test_draining_waits_for_the_sequences():
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        drain = asyncio.create_task(replica.server.drain())
        await asyncio.wait([drain], timeout=0.05)
        assert not drain.done()
        task.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await drain


async def test_a_wrong_token_gets_nothing():
    async with connected() as (replica, _):
        with pytest.raises(ReplicaLost):
            await Channel.connect("d", {**replica.address, "token": "guessed"})


async def test_another_replica_behind_the_address_is_noticed():
    async with connected() as (replica, _):
        with pytest.raises(ReplicaLost, match="d is there instead"):
            await Channel.connect("e", replica.address)


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 3) + b"abc", b""])
async def test_a_stranger_is_sent_away_and_the_others_go_on(noise: bytes):
    async with connected() as (replica, channel):
        reader, writer = await asyncio.open_connection(replica.address["host"], int(replica.address["port"]))
        writer.write(noise)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
        replica.script = [LAST]
        await served(channel, [])


async def test_a_long_prompt_arrives_whole():
    async with connected() as (replica, channel):
        replica.script = [LAST]
        long = request(tokens=300_000)
        sequence = channel.submit(long, lambda delta: None, has_handoff=False, local_reason="")
        async with asyncio.timeout(PATIENCE_S):
            await sequence.ended
        assert replica.calls[0].request == long


async def test_a_frontend_that_does_not_read_holds_up_nobody_else_and_its_tokens_merge():
    async with connected() as (replica, channel):
        replica.hangs = True
        reader, writer = await asyncio.open_connection(replica.address["host"], int(replica.address["port"]))
        writer.write(_frame(Hello(replica.address["token"], "slow")))
        writer.write(_frame(Submit(0, request("slow"), False, "")))
        await replica.started.wait()
        slow = replica.links[0]
        chunk = list(range(10_000))
        for _ in range(300):
            slow.put(0, TokenDelta(chunk))
            await asyncio.sleep(0)
        (waiting,) = slow.take_now().deltas
        assert len(waiting[1].token_ids) > 2 * len(chunk)
        replica.script = [LAST]
        replica.hangs = False
        await served(channel, [])
        del reader
        writer.close()
