"""What goes wrong with one sequence, or in who is told of a replica, ends nothing else on the connection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.channel import client, server
from app.channel.client import Channel
from app.channel.protocol import Batch, Failure
from app.errors import DeltaNotTaken, EngineFailed, InvalidRequest, ReplicaLost
from app.messages import KvUpdate, Link, Logprobs, ReplicaLoad, TokenDelta
from tests.unit.channel.test_channel import LAST, Replica, Told, connected, request, served
from tests.unit.waiting import PATIENCE_S, until


async def test_a_delta_that_one_sequence_cannot_take_ends_that_one_alone() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        others = [asyncio.create_task(served(channel, received)) for _ in range(49)]
        await until(lambda: len(replica.calls) == 49)

        def fail(delta: TokenDelta) -> None:
            raise ValueError("secret")

        sequence = channel.submit(request("failing"), fail, has_handoff=False, local_reason="")
        await until(lambda: len(replica.calls) == 50)
        for call in replica.calls:
            replica.channels[0].put(call.number, TokenDelta([1]))
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(DeltaNotTaken, match=r"^a token was not taken: ValueError$"):
                await sequence.ended
        await until(lambda: replica.cancelled == ["failing"])
        for call in replica.calls:
            replica.channels[0].put(call.number, LAST)
        await asyncio.gather(*others)
        assert len(received) >= 49
        assert not channel.is_closed


async def test_a_sequence_whose_end_cannot_be_taken_has_ended() -> None:
    async with connected() as (replica, channel):
        replica.script = [LAST]
        sequence = channel.submit(request(), lambda delta: 1 / 0, has_handoff=False, local_reason="")  # type: ignore[arg-type]
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(DeltaNotTaken):
                await sequence.ended
        channel.finish(sequence)
        await served(channel, [])


async def test_a_sequence_that_fails_itself_as_it_takes_its_last_delta_ends_that_one_alone() -> None:
    async with connected() as (replica, channel):
        replica.script = [LAST]
        lost = ReplicaLost("p")
        sequence = channel.submit(request(), lambda _: sequence.fail(lost), has_handoff=False, local_reason="")
        with pytest.raises(ReplicaLost):
            await sequence.ended
        await served(channel, [])


async def test_an_error_that_only_a_newer_replica_knows_is_an_error_of_that_sequence() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        sequence = channel.submit(request(), lambda _: None, has_handoff=False, local_reason="")
        channel._hand_out(Batch([], [(sequence.number, Failure("NewError", "something new"))]))
        with pytest.raises(EngineFailed, match="something new"):
            await sequence.ended
        assert not channel.is_closed


class FailingListener(Told):
    """Fails to take one piece of news of each kind, the second, and takes all others."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls: dict[str, int] = {}

    def _count(self, kind: str) -> None:
        self.num_calls[kind] = self.num_calls.get(kind, 0) + 1
        if self.num_calls[kind] == 2:
            raise ValueError(kind)

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        self._count("load")
        super().on_load(replica, load)

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        self._count("kv")
        super().on_kv(replica, update)

    def on_links(self, replica: str, links: list[Link]) -> None:
        self._count("links")
        super().on_links(replica, links)


async def test_a_listener_that_fails_misses_that_news_and_no_other() -> None:
    """The cache is taken as unknown from there on: the changes that follow are to one that the listener has not got."""
    told = FailingListener()
    async with connected(told) as (replica, channel):
        for number in (1, 2, 3):
            replica.server.publish_load(ReplicaLoad(number))
            replica.server.publish_links([Link(f"p{number}")])
            channel._notify(Batch([], [], kv=KvUpdate([number], [], is_reset=number == 1)))
            await until(lambda number=number: told.num_calls.get("links") == number)  # type: ignore[misc]
        await until(lambda: told.num_calls["load"] == 3)
        assert told.loads == [ReplicaLoad(1), ReplicaLoad(3)]
        assert told.links == [[Link("p1")], [Link("p3")]]
        assert told.blocks == {3}
        replica.script = [LAST]
        await served(channel, [])


async def test_a_channel_whose_task_dies_fails_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        closed: list[bool] = []
        channel.on_close = lambda: closed.append(True)
        sequence = channel.submit(request(), lambda _: None, has_handoff=False, local_reason="")
        monkeypatch.setattr(client, "_merge", lambda batches: 1 / 0)
        replica.server.publish_load(ReplicaLoad(1))
        with pytest.raises(ReplicaLost, match="ZeroDivisionError"):
            await asyncio.wait_for(sequence.ended, PATIENCE_S)
        assert closed == [True]
        assert channel.lost.done()


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_a_channel_that_ends_before_its_task_has_begun_is_lost_too(how: str) -> None:
    replica = Replica()
    replica.address = await replica.server.start("127.0.0.1")
    channel = await Channel.connect("d", replica.address, Told())
    sequence = channel.submit(request(), lambda _: None, has_handoff=False, local_reason="")
    channel.close() if how == "closed" else channel._task.cancel()
    with pytest.raises(ReplicaLost):
        await asyncio.wait_for(sequence.ended, PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):
        await channel.lost
    await replica.server.stop()


async def test_a_listener_to_the_end_of_a_channel_that_fails_keeps_no_sequence_from_ending() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        sequence = channel.submit(request(), lambda _: None, has_handoff=False, local_reason="")
        channel.on_close = lambda: 1 / 0
        channel.close()
        with pytest.raises(ReplicaLost):
            await asyncio.wait_for(sequence.ended, PATIENCE_S)


# What cannot be sent


async def test_a_request_that_is_too_large_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_SUBMIT_BYTES", 10_000)
    async with connected() as (replica, channel):
        replica.script = [LAST]
        with pytest.raises(InvalidRequest, match=r"the request is too large for an engine: \d+ bytes of at most 10000"):
            await served_tokens(channel, 20_000)
        assert not channel._sequences
        await served_tokens(channel, 1_000)
        assert len(replica.calls) == 1


async def served_tokens(channel: Channel, num_tokens: int) -> None:
    sequence = channel.submit(request(tokens=num_tokens), lambda _: None, has_handoff=False, local_reason="")
    await asyncio.wait_for(sequence.ended, PATIENCE_S)


@pytest.mark.parametrize("value", [1 << 70, object()], ids=["too large a number", "no plain value"])
async def test_a_request_with_a_value_that_cannot_be_sent_is_refused(value: Any) -> None:
    async with connected() as (replica, channel):
        replica.script = [LAST]
        bad = request()
        bad.sampling["seed"] = value
        with pytest.raises(InvalidRequest, match="the request cannot be sent to an engine"):
            channel.submit(bad, lambda _: None, has_handoff=False, local_reason="")
        await served(channel, [])


@pytest.mark.parametrize("kind", ["too large", "cannot be encoded"])
async def test_a_delta_that_cannot_be_sent_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(server, "MAX_BATCH_BYTES", 10_000)
    rows = 1_000
    large = TokenDelta([1], prompt_logprobs=Logprobs([[1]] * rows, [[0.5]] * rows, [1] * rows))
    bad = large if kind == "too large" else TokenDelta([1 << 70])
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        other = asyncio.create_task(served(channel, received))
        await until(lambda: len(replica.calls) == 1)
        sequence = channel.submit(request("large"), lambda _: None, has_handoff=False, local_reason="")
        await until(lambda: len(replica.calls) == 2)
        replica.channels[0].put(0, LAST)
        replica.channels[0].put(1, bad)
        replica.server.publish_load(ReplicaLoad(7))
        with pytest.raises(InvalidRequest, match="ask for fewer logprobs"):
            await asyncio.wait_for(sequence.ended, PATIENCE_S)
        await other
        assert received == [LAST]
        await until(lambda: replica.cancelled[:1] == ["large"])


async def test_a_replica_that_cannot_send_any_more_ends_the_connection() -> None:
    """Otherwise its sequences would wait for tokens that never come."""
    async with connected() as (replica, channel):
        replica.hangs = True
        sequence = channel.submit(request(), lambda _: None, has_handoff=False, local_reason="")
        await replica.started.wait()
        replica.server.publish_load(ReplicaLoad(1 << 70))
        with pytest.raises(ReplicaLost):
            await asyncio.wait_for(sequence.ended, PATIENCE_S)
        await until(lambda: not replica.server.channels)
