"""The connection between a frontend and a replica, over real sockets."""

import asyncio
import itertools
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.channel import client, server
from app.channel.client import Channel, _merge
from app.channel.protocol import PROTOCOL_VERSION, Backlog, Batch, Hello, Submit, to_frame
from app.channel.server import ChannelServer, FrontendChannel
from app.errors import BatonError, EngineDead, EngineFailed, InvalidRequest, ReplicaLost, TakenElsewhere
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaLoad, Role, TokenDelta
from tests.unit.waiting import PATIENCE_S, until

LAST = TokenDelta([3], finish_reason="stop")


def request(request_id: str = "r", tokens: int = 3) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_token_ids=list(range(tokens)), sampling={"max_tokens": 4})


class Replica:
    """A replica whose sequences do what the test puts."""

    def __init__(self) -> None:
        self.calls: list[Submit] = []
        self.cancelled: list[str] = []
        self.closed: list[FrontendChannel] = []
        self.started = asyncio.Event()
        self.error: Exception | None = None
        self.script: list[TokenDelta] = []
        self.hangs = False
        self.channels: list[FrontendChannel] = []
        self.server = ChannelServer("d", self.run)
        self.server.on_close = self.closed.append
        self.address: dict[str, str] = {}

    async def run(self, channel: FrontendChannel, call: Submit) -> None:
        self.calls.append(call)
        self.channels.append(channel)
        self.started.set()
        try:
            for delta in self.script:
                channel.put(call.number, delta)
            if self.error is not None:
                raise self.error
            if self.hangs:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(call.request.request_id)
            raise


class Told:
    """What a frontend was told of its replicas, and what it has got by the updates: those say what changes."""

    def __init__(self) -> None:
        self.loads: list[ReplicaLoad] = []
        self.updates: list[KvUpdate] = []
        self.links: list[list[Link]] = []
        self.blocks: set[int] = set()

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        assert replica == "d"
        self.loads.append(load)

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        assert replica == "d"
        self.updates.append(update)
        if update.is_reset:
            self.blocks.clear()
        self.blocks -= set(update.removed)
        self.blocks |= set(update.stored)

    def on_role(self, replica: str, role: Role) -> None: ...

    def on_links(self, replica: str, links: list[Link]) -> None:
        assert replica == "d"
        self.links.append(links)


@asynccontextmanager
async def connected(told: Told | None = None) -> AsyncGenerator[tuple[Replica, Channel], None]:
    replica = Replica()
    replica.address = await replica.server.start("127.0.0.1")
    channel = await Channel.connect("d", replica.address, told or Told())
    try:
        yield replica, channel
    finally:
        channel.close()
        await replica.server.stop()


async def served(
    channel: Channel,
    into: list[TokenDelta],
    on_leaving: Callable[[int], object] = lambda number: None,
    **options: bool | str,
) -> None:
    arguments = {"has_handoff": False, "local_reason": "", **options}
    sequence = channel.submit(request(), into.append, **arguments)  # type: ignore[arg-type]
    sequence.on_leaving = partial(on_leaving, sequence.number)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await sequence.ended
    finally:
        channel.finish(sequence)


async def test_a_sequence_gets_its_deltas_in_order() -> None:
    async with connected() as (replica, channel):
        replica.script = [LAST]
        received: list[TokenDelta] = []
        await served(channel, received, has_handoff=True, local_reason="why")
        assert received == [LAST]
        assert replica.calls == [Submit(0, request(), True, "why")]


async def test_what_waits_is_merged_and_nothing_is_lost() -> None:
    async with connected() as (replica, channel):
        replica.script = [TokenDelta([1]), TokenDelta([2]), LAST]
        received: list[TokenDelta] = []
        await served(channel, received)
        assert received == [TokenDelta([1, 2, 3], finish_reason="stop")]


async def test_many_sequences_share_the_connection() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[list[TokenDelta]] = [[] for _ in range(50)]
        tasks = [asyncio.create_task(served(channel, into)) for into in received]
        await until(lambda: len(replica.calls) == len(tasks))
        for call in replica.calls:
            replica.channels[0].put(call.number, TokenDelta([call.number], finish_reason="length"))
        await asyncio.gather(*tasks)
        assert [deltas[0].token_ids for deltas in received] == [[number] for number in range(50)]


@pytest.mark.parametrize("error", [InvalidRequest("no such thing"), EngineDead("gone"), EngineFailed("broke")])
async def test_an_error_ends_the_sequence_after_its_deltas(error: BatonError) -> None:
    async with connected() as (replica, channel):
        replica.script, replica.error = [TokenDelta([1])], error
        received: list[TokenDelta] = []
        with pytest.raises(type(error), match=str(error)):
            await served(channel, received)
        assert received == [TokenDelta([1])]


async def test_an_error_that_nobody_foresaw_is_told_without_its_text() -> None:
    async with connected() as (replica, channel):
        replica.error = RuntimeError("secret")
        with pytest.raises(EngineFailed, match=r"^RuntimeError$"):
            await served(channel, [])
        replica.error, replica.script = None, [LAST]
        await served(channel, [])


async def test_cancelling_reaches_the_replica() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        task.cancel()
        await until(lambda: replica.cancelled == ["r"])
        assert replica.server.num_sequences() == 0


@pytest.mark.parametrize("closes", [False, True], ids=["cancelled", "closed"])
async def test_a_sequence_that_is_cancelled_as_it_comes_has_begun_and_is_not_left_behind(closes: bool) -> None:
    """Both frames arrive together; a task that is cancelled before its first step would not run at all."""
    async with connected() as (replica, channel):
        replica.hangs = True
        sequence = channel.submit(request(), lambda delta: None, has_handoff=True, local_reason="")
        servers_end = replica.server.channels[channel.channel_id]
        channel.close() if closes else channel.finish(sequence)
        await until(lambda: replica.cancelled == ["r"])
        await until(lambda: len(servers_end) == 0)
        if closes:
            await until(lambda: replica.closed == [servers_end])
            with pytest.raises(ReplicaLost):
                await sequence.ended


async def test_a_frontend_that_goes_away_takes_its_sequences_along() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        channel.close()
        await until(lambda: replica.cancelled == ["r"])
        await until(lambda: [channel.id for channel in replica.closed] == [channel.channel_id])
        with pytest.raises(ReplicaLost):
            await task


async def test_a_replica_that_goes_away_fails_its_sequences_and_every_later_one() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        await replica.server.stop()
        with pytest.raises(ReplicaLost):
            await task
        assert channel.is_closed
        assert channel.lost.done()
        with pytest.raises(ReplicaLost):
            await served(channel, [])
        with pytest.raises(ReplicaLost):
            await Channel.connect("d", replica.address, Told())


async def test_a_replica_whose_engine_died_says_so_with_its_last_word() -> None:
    async with connected() as (replica, channel):
        await until(lambda: replica.server.channels)
        await replica.server.stop(death="it hangs")
        assert isinstance(error := await channel.lost, EngineDead)
        assert str(error) == "it hangs"


async def test_a_sequence_that_has_failed_here_gets_nothing_more() -> None:
    """Its first token may be on the way just then, and whoever tries again elsewhere must not have it too."""
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        sequence = channel.submit(request(), received.append, has_handoff=True, local_reason="")
        await replica.started.wait()
        replica.channels[0].put(0, TokenDelta([1]))
        other = asyncio.create_task(served(channel, []))
        sequence.fail(ReplicaLost("p"))
        await until(lambda: len(replica.calls) == 2)
        replica.channels[0].put(1, LAST)
        await other
        assert received == []
        channel.finish(sequence)
        with pytest.raises(ReplicaLost):
            await sequence.ended


async def test_stopping_sends_what_waits() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        task = asyncio.create_task(served(channel, received))
        await replica.started.wait()
        replica.channels[0].put(0, LAST)
        await replica.server.stop()
        await task
        assert received == [LAST]


async def test_draining_waits_for_the_sequences() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        drain = asyncio.create_task(replica.server.drain(PATIENCE_S))
        await asyncio.wait([drain], timeout=0.05)
        assert not drain.done()
        task.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await drain


async def test_what_still_runs_after_a_while_is_offered_to_its_frontend_until_it_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A few at a time, as each takes a frontend time; those that stay do not keep the others from being asked."""
    monkeypatch.setattr(server, "ASK_AGAIN_S", 0.001)
    monkeypatch.setattr(client, "MAX_OFFERED", 2)
    async with connected() as (replica, channel):
        replica.hangs = True
        asked: list[int] = []
        tasks = [asyncio.create_task(served(channel, [], on_leaving=asked.append)) for _ in range(5)]
        await until(lambda: len(replica.calls) == 5)
        drain = asyncio.create_task(replica.server.drain(0))
        await until(lambda: len(asked) >= 10)
        assert asked[:5] == [0, 1, 2, 3, 4]
        assert {*asked[5:10]} == {0, 1, 2, 3, 4}
        for call in replica.calls:
            replica.channels[0].put(call.number, TokenDelta([call.number]))  # it goes on with all of them
        assert not drain.done()
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(PATIENCE_S):
            await drain
        assert len(replica.cancelled) == 5


def test_of_frames_that_arrive_together_none_is_forgotten_that_asks_to_leave() -> None:
    asks, does_not = Batch([], [], is_leaving=True), Batch([], [])
    assert [_merge(batches).is_leaving for batches in ([asks, does_not], [does_not, does_not])] == [True, False]


async def test_what_a_replica_sends_after_it_was_let_go_does_not_count() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        sequence = channel.submit(request(), received.append, has_handoff=False, local_reason="")
        sequence.on_leaving = lambda: sequence.fail(TakenElsewhere())
        await replica.started.wait()
        (at_replica,) = replica.channels
        at_replica.put(sequence.number, TokenDelta([1]))  # in the same frame: it came before the replica was let go
        at_replica.ask_to_leave()
        with pytest.raises(TakenElsewhere):
            async with asyncio.timeout(PATIENCE_S):
                await sequence.ended
        at_replica.put(sequence.number, LAST)
        at_replica.put_load(ReplicaLoad(sequences=7))
        await until(lambda: channel.num_heard >= 3)
        channel.finish(sequence)
        assert received == [TokenDelta([1])]
        await until(lambda: replica.cancelled == ["r"])


async def test_a_wrong_token_gets_nothing() -> None:
    async with connected() as (replica, _):
        with pytest.raises(ReplicaLost):
            await Channel.connect("d", {**replica.address, "token": "guessed"}, Told())


async def test_another_replica_behind_the_address_is_noticed() -> None:
    async with connected() as (replica, _):
        with pytest.raises(ReplicaLost, match="d is there instead"):
            await Channel.connect("e", replica.address, Told())


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("<I", 3) + b"abc", b""])
async def test_a_stranger_is_sent_away_and_the_others_go_on(noise: bytes) -> None:
    async with connected() as (replica, channel):
        reader, writer = await asyncio.open_connection(replica.address["host"], int(replica.address["port"]))
        writer.write(noise)
        writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
        replica.script = [LAST]
        await served(channel, [])


async def test_a_long_prompt_arrives_whole() -> None:
    async with connected() as (replica, channel):
        replica.script = [LAST]
        long = request(tokens=300_000)
        sequence = channel.submit(long, lambda delta: None, has_handoff=False, local_reason="")
        async with asyncio.timeout(PATIENCE_S):
            await sequence.ended
        assert replica.calls[0].request == long


async def test_a_frontend_that_does_not_read_holds_up_nobody_else_and_its_tokens_merge() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        reader, writer = await asyncio.open_connection(replica.address["host"], int(replica.address["port"]))
        writer.write(to_frame(Hello(replica.address["token"], "slow", PROTOCOL_VERSION)))
        writer.write(to_frame(Submit(0, request("slow"), False, "")))
        await replica.started.wait()
        slow = replica.channels[0]
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


# What a replica tells of itself


class Cache:
    """A replica's prefix cache, each change of which the replica tells."""

    def __init__(self, replica: Replica) -> None:
        self.blocks: set[int] = set()
        self._server = replica.server
        self._server.snapshot = self.snapshot

    def snapshot(self) -> KvUpdate:
        return KvUpdate(sorted(self.blocks), [], is_reset=True)

    def store(self, *blocks: int) -> None:
        self.blocks |= set(blocks)
        self._server.publish_kv(KvUpdate(list(blocks), []))

    def remove(self, *blocks: int) -> None:
        self.blocks -= set(blocks)
        self._server.publish_kv(KvUpdate([], list(blocks)))


async def test_a_new_connection_begins_with_the_whole_cache_and_the_load() -> None:
    async with connected() as (replica, _):
        cache = Cache(replica)
        replica.server.publish_load(ReplicaLoad(3, 4, 5))
        cache.store(1, 2)
        told = Told()
        late = await Channel.connect("d", replica.address, told)
        assert not told.updates  # nothing before whoever connects can be ready for it
        await until(lambda: told.loads)
        assert told.loads == [ReplicaLoad(3, 4, 5)]
        assert told.updates == [KvUpdate([1, 2], [], is_reset=True)]
        cache.store(3)
        await until(lambda: told.blocks == {1, 2, 3})
        assert len(told.updates) == 2
        late.close()


async def test_a_change_that_comes_before_the_snapshot_is_sent_is_in_it_once() -> None:
    channel = FrontendChannel("l", None, lambda: KvUpdate([1, 2], [], is_reset=True))
    channel.put_kv(KvUpdate([2], []))
    assert not channel._kv
    assert channel.take_now().kv == KvUpdate([1, 2], [], is_reset=True)
    assert channel.take_now().kv is None


async def test_a_frontend_is_told_of_all_links_when_it_connects_and_when_they_change() -> None:
    told = Told()
    good, bad = Link("p0", "cuda_ipc/cuda", 1e11, 1e-4, 0.02), Link("p1", problem="KV moves by tcp/lo")
    async with connected() as (replica, _):
        replica.server.publish_links([good])
        late = await Channel.connect("d", replica.address, told)
        await until(lambda: told.links)
        assert told.links == [[good]]
        replica.server.publish_load(ReplicaLoad(1))
        await until(lambda: told.loads)
        assert len(told.links) == 1  # they travel only if they have changed
        replica.server.publish_links([good, bad])
        await until(lambda: len(told.links) == 2)
        assert told.links[-1] == [good, bad]
        late.close()


async def test_changes_reach_all_frontends_in_order() -> None:
    one, two = Told(), Told()
    async with connected(one) as (replica, _):
        cache = Cache(replica)
        second = await Channel.connect("d", replica.address, two)
        for number in range(1, 50):
            cache.store(number)
            if number % 3 == 0:
                cache.remove(number // 3)
            replica.server.publish_load(ReplicaLoad(number))
            await asyncio.sleep(0.001)
        await until(lambda: all(told.loads[-1:] == [ReplicaLoad(49)] for told in (one, two)))
        for told in (one, two):
            assert told.blocks == cache.blocks
            assert told.loads == sorted(told.loads, key=lambda load: load.sequences)
            assert len(told.loads) > 2
        second.close()


async def test_what_nobody_knows_is_not_published() -> None:
    told = Told()
    async with connected(told) as (replica, _):
        replica.server.publish_load(ReplicaLoad())
        await until(lambda: told.loads)
        assert not told.updates


async def test_the_load_arrives_after_whoever_waits_for_a_sequence_has_counted_it_out() -> None:
    """Or the frontend would take off a sequence that this load does not have in it any more."""
    order: list[object] = []
    told = Told()
    async with connected(told) as (replica, channel):
        replica.hangs = True

        async def count_out() -> None:
            await served(channel, [])
            order.append(list(told.loads))

        task = asyncio.create_task(count_out())
        await replica.started.wait()
        replica.server.publish_load(ReplicaLoad(7))
        replica.channels[0].put(0, LAST)
        await task
        await until(lambda: told.loads)
        assert order == [[]]


async def test_what_no_delta_takes_along_goes_at_once_and_then_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PUBLISH_PERIOD_S", 0.3)
    clock = asyncio.get_running_loop().time
    told = Told()
    async with connected(told) as (replica, _):
        cache = Cache(replica)
        await until(lambda: replica.server.channels)
        began = clock()
        replica.server.publish_load(ReplicaLoad(1))
        await until(lambda: told.loads)
        assert clock() - began < 0.2
        for number in range(2, 20):
            replica.server.publish_load(ReplicaLoad(number))
            cache.store(number)
            await asyncio.sleep(0.001)
        await until(lambda: len(told.loads) > 1)
        assert clock() - began > 0.25
        assert told.loads == [ReplicaLoad(1), ReplicaLoad(19)]
        assert told.blocks == cache.blocks


async def test_deltas_take_along_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PUBLISH_PERIOD_S", 60.0)
    told = Told()
    async with connected(told) as (replica, channel):
        cache = Cache(replica)
        replica.server.publish_load(ReplicaLoad(1))
        await until(lambda: told.loads)
        replica.server.publish_load(ReplicaLoad(2))
        cache.store(5)
        replica.script = [LAST]
        await served(channel, [])
        await until(lambda: told.blocks == {5})
        assert told.loads == [ReplicaLoad(1), ReplicaLoad(2)]


async def test_frames_that_arrive_together_are_one() -> None:
    batches = [
        Batch([], [], ReplicaLoad(1), KvUpdate([1, 2], [], is_reset=True)),
        Batch([(0, LAST)], []),
        Batch([], [], ReplicaLoad(2), KvUpdate([3], [1])),
        Batch([], [], None, KvUpdate([], [3])),
    ]
    assert _merge(batches) == Batch([(0, LAST)], [], ReplicaLoad(2), KvUpdate([2], [], is_reset=True))


async def test_what_waits_for_a_frontend_that_does_not_read_is_bounded() -> None:
    snapshots = itertools.count()
    channel = FrontendChannel("slow", None, lambda: KvUpdate([next(snapshots)], [], is_reset=True))
    channel.take_now()
    many = list(range(server.MAX_WAITING_BLOCKS // 100))
    for _ in range(1000):
        for update in (KvUpdate(many, []), KvUpdate([], many)):
            channel.put_kv(update)
            waiting = sum(len(update.stored) + len(update.removed) for update in channel._kv)
            assert waiting <= server.MAX_WAITING_BLOCKS
    assert channel.take_now().kv == KvUpdate([1], [], is_reset=True)


async def test_one_change_of_any_size_goes_as_it_is() -> None:
    channel = FrontendChannel("l", None, lambda: None)
    channel.take_now()
    large = KvUpdate(list(range(server.MAX_WAITING_BLOCKS + 1)), [])
    channel.put_kv(large)
    assert channel.take_now().kv == large


@given(st.lists(st.sampled_from(["take", "connect", "clear", *range(6)]), max_size=60), st.integers(1, 8))
def test_a_frontend_knows_the_cache_whenever_it_has_read_all(steps: list[str | int], max_waiting: int) -> None:
    """Numbers are blocks that come, or go if they are there."""

    async def follow(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(server, "MAX_WAITING_BLOCKS", max_waiting)
        cache: set[int] = set()

        def connect() -> tuple[FrontendChannel, Told]:
            return FrontendChannel("l", None, lambda: KvUpdate(list(cache), [], is_reset=True)), Told()

        channel, told = connect()
        for step in steps:
            if step == "connect":
                channel, told = connect()
            elif step == "clear":
                cache.clear()
                channel.put_kv(KvUpdate([], [], is_reset=True))
            elif isinstance(step, int):
                is_there = step in cache
                cache ^= {step}
                channel.put_kv(KvUpdate([], [step]) if is_there else KvUpdate([step], []))
            else:
                if (update := channel.take_now().kv) is not None:
                    told.on_kv("d", update)
                assert told.blocks == cache
        channel.close()

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(follow(patch))


async def test_a_retired_channel_ends_what_it_has_and_publishes_nothing_more() -> None:
    told = Told()
    async with connected(told) as (replica, channel):
        replica.hangs = True
        received: list[TokenDelta] = []
        channel.tell_backlog(Backlog(3, 1))
        task = asyncio.create_task(served(channel, received))
        await replica.started.wait()
        channel.retire()
        replica.server.publish_load(ReplicaLoad(1))
        replica.channels[0].put(0, TokenDelta([1]))
        await until(lambda: received)
        replica.channels[0].put(0, LAST)
        await task
        assert received == [TokenDelta([1]), LAST]
        assert not told.loads
        await until(lambda: replica.server.backlog() == Backlog())  # what waits here comes to others


@pytest.mark.parametrize("has_drained", [True, False])
async def test_a_retired_channel_stands_until_the_replica_has_drained_or_is_lost(has_drained: bool) -> None:
    """Decode may still pull KV from it, and who waits for that has to know if it dies."""
    async with connected() as (replica, channel):
        await until(lambda: replica.server.channels)
        channel.retire()
        await asyncio.sleep(0.05)
        assert not channel.is_closed
        await replica.server.stop(has_drained=has_drained)
        await until(lambda: channel.is_closed)
        assert channel.lost.done() is not has_drained


async def test_a_channel_can_be_closed_before_it_has_run() -> None:
    replica = Replica()
    replica.address = await replica.server.start("127.0.0.1")
    channel = await Channel.connect("d", replica.address, Told())
    channel.close()
    assert channel.is_closed
    await until(lambda: replica.closed)
    await replica.server.stop()


async def test_no_sequence_fails_before_whoever_routes_knows_that_the_replica_is_lost() -> None:
    async with connected() as (replica, channel):
        replica.hangs = True
        task = asyncio.create_task(served(channel, []))
        await replica.started.wait()
        was_done: list[bool] = []
        sequence = channel._sequences[0]
        channel.on_close = lambda: was_done.append(sequence.ended.done())
        await replica.server.stop()
        with pytest.raises(ReplicaLost):
            await task
        assert was_done == [False]


async def test_what_waits_in_all_frontends_is_added_up_and_forgotten_with_the_connection() -> None:
    async with connected() as (replica, one):
        heard: list[Backlog] = []
        replica.server.on_backlog = lambda: heard.append(replica.server.backlog())
        two = await Channel.connect("d", replica.address, Told())
        one.tell_backlog(Backlog(100, 1))
        two.tell_backlog(Backlog(20, 3))
        await until(lambda: replica.server.backlog() == Backlog(120, 4))
        one.tell_backlog(Backlog(50, 0))
        await until(lambda: replica.server.backlog() == Backlog(70, 3))
        two.close()
        await until(lambda: replica.server.backlog() == Backlog(50, 0))
        assert heard[-1] == Backlog(50, 0)
        one.tell_backlog(Backlog())
        await until(lambda: replica.server.backlog() == Backlog())


async def test_a_backlog_that_did_not_change_is_not_sent() -> None:
    async with connected() as (replica, channel):
        heard: list[Backlog] = []
        replica.server.on_backlog = lambda: heard.append(replica.server.backlog())
        for backlog in (Backlog(), Backlog(5, 1), Backlog(5, 1), Backlog(6, 1)):
            channel.tell_backlog(backlog)
        await until(lambda: heard[-1:] == [Backlog(6, 1)])
        assert heard == [Backlog(5, 1), Backlog(6, 1)]


async def test_a_closed_channel_tells_nothing() -> None:
    async with connected() as (_, channel):
        channel.close()
        channel.tell_backlog(Backlog(5, 1))
