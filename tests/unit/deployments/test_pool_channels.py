"""Which replicas a pool's state has and when, with replicas behind real sockets and Serve's word played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.channel.client import Channel
from app.channel.protocol import PROTOCOL_VERSION, Backlog, Submit
from app.channel.server import ChannelServer, FrontendChannel
from app.channel.silence import MAX_LOOKS, MIN_LOOKS
from app.errors import ReplicaLost
from app.messages import GenerateRequest, KvUpdate, ReplicaInfo, ReplicaLoad, TokenDelta
from app.routing.pool_state import PoolState
from app.routing.prefix_index import PrefixIndex
from app.routing.role_pools import RolePools
from deployments.frontend import pool_channels
from deployments.frontend.pool_channels import PoolChannels, share_backlog
from deployments.ready_replicas import ReadyReplicas
from tests.unit.waiting import until

LAST = TokenDelta([1], finish_reason="stop")


class Replica:
    """A replica with two cached blocks and as much to do as `load` says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.channels: list[FrontendChannel] = []
        self.server = ChannelServer(name, self._run)
        self.server.snapshot = lambda: KvUpdate([1, 2], [], is_reset=True)
        self.server.publish_load(ReplicaLoad(sequences=3, used_blocks=4))
        self.address: dict[str, str] = {}

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        self.channels.append(channel)
        await asyncio.Event().wait()

    async def start(self) -> None:
        self.address = await self.server.start("127.0.0.1")

    def as_serve_reports_it(self) -> Any:
        info = ReplicaInfo(
            replica_id=self.name,
            role="decode",
            model="m",
            engine="sim",
            engine_version="1",
            node_ip="127.0.0.1",
            pid=1,
            num_blocks=8,
            block_size_tokens=16,
            max_model_len=64,
            prefix_cache="published",
        )
        metadata = {"info": msgspec.to_builtins(info), "channel": self.address}
        return SimpleNamespace(replica_id=SimpleNamespace(unique_id=self.name), replica_metadata=metadata)


HANDLE = SimpleNamespace(deployment_name="decode-tiny", app_name="baton")


class Pool:
    """A pool as a frontend sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = ReadyReplicas()
        index = PrefixIndex()
        self.state, self.prefill = PoolState(index), PoolState(index)
        self.by_role = RolePools({"prefill": self.prefill, "decode": self.state})
        monkeypatch.setattr(pool_channels, "ready_replicas_of", lambda deployment_id: self.ready)
        monkeypatch.setattr(pool_channels, "RECONNECT_S", 0.01)
        self.channels = PoolChannels(HANDLE, self.by_role, "decode")

    def consist_of(self, *replicas: Replica) -> None:
        """What Serve says."""
        self.ready.update([replica.as_serve_reports_it() for replica in replicas])

    def knows(self, replica: Replica) -> bool:
        """Whether the state has all that the replica tells at first."""
        known = self.state.replicas.get(replica.name)
        return known is not None and known.sequences.value == 3 and self.state.index.num_blocks(replica.name) == 2


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica("r")
    await replica.start()
    yield replica
    await replica.server.stop()


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    pool = Pool(monkeypatch)
    yield pool
    pool.consist_of()
    await asyncio.sleep(0)


def submit(pool: Pool, replica: Replica, into: list[TokenDelta]) -> Any:
    request = GenerateRequest(request_id="q", prompt_token_ids=[1], sampling={})
    return pool.channels.channel(replica.name).submit(request, into.append, has_handoff=False, local_reason="")


async def test_a_replica_joins_with_what_it_knows(pool: Pool, replica: Replica) -> None:
    pool.consist_of(replica)
    assert not pool.state.replicas
    await until(lambda: pool.knows(replica))
    assert pool.state.replicas["r"].info.num_blocks == 8


async def test_a_replica_is_joining_until_it_has_joined_or_failed(pool: Pool, replica: Replica) -> None:
    pool.consist_of(replica)
    await asyncio.sleep(0)
    await asyncio.wait(pool.state.joining.values())
    assert (pool.knows(replica), pool.state.joining) == (True, {})
    pool.consist_of()
    replica.address = {**replica.address, "port": "1"}
    await until(lambda: not pool.state.replicas)
    pool.consist_of(replica)
    await until(lambda: pool.channels.unreachable)
    assert not pool.state.joining


async def test_replicas_that_serve_knew_before_are_connected_too(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(monkeypatch)
    pool.consist_of(replica)
    state = PoolState(PrefixIndex())
    later = PoolChannels(HANDLE, RolePools({"decode": state}), "decode")
    await until(lambda: "r" in state.replicas)
    pool.ready.update([])
    await until(lambda: not state.replicas)
    with pytest.raises(ReplicaLost):
        later.channel("r")


async def test_a_replica_that_cannot_be_reached_is_not_in_the_pool_state_until_it_can(
    pool: Pool, replica: Replica
) -> None:
    good, replica.address = replica.address, {**replica.address, "port": "1"}
    pool.consist_of(replica)
    await until(lambda: pool.channels.unreachable)
    assert pool.channels.unreachable == {"r": "cannot be reached: ConnectionRefusedError"}  # and not where it is
    assert not pool.state.replicas
    with pytest.raises(ReplicaLost):
        pool.channels.channel("r")
    replica.address["port"] = good["port"]
    await until(lambda: pool.knows(replica))


async def test_a_broken_connection_takes_the_replica_out_at_once_and_a_new_one_starts_afresh(
    pool: Pool, replica: Replica
) -> None:
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    replica.server.publish_kv(KvUpdate([3], []))
    await until(lambda: pool.state.index.num_blocks("r") == 3)
    sequence = submit(pool, replica, [])
    await until(lambda: replica.channels)
    left_first: list[bool] = []
    sequence.ended.add_done_callback(lambda _: left_first.append("r" not in pool.state.replicas))
    (writer,) = replica.server._writers.values()
    writer.transport.abort()
    with pytest.raises(ReplicaLost):
        await sequence.ended
    assert left_first == [True]
    assert pool.channels.unreachable == {"r": "its connection ended"}
    await until(lambda: pool.knows(replica))  # two blocks again: the third was not in the snapshot
    assert len(replica.server.channels) == 1


async def test_a_replica_that_serve_removes_leaves_at_once_but_ends_its_sequences(pool: Pool, replica: Replica) -> None:
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    received: list[TokenDelta] = []
    channel = pool.channels.channel("r")
    sequence = submit(pool, replica, received)
    await until(lambda: replica.channels)
    pool.consist_of()
    await until(lambda: not pool.state.replicas)
    with pytest.raises(ReplicaLost):
        pool.channels.channel("r")
    assert not channel.is_closed
    replica.channels[0].put(sequence.number, LAST)
    await sequence.ended
    channel.finish(sequence)
    assert received == [LAST]
    await replica.server.stop(has_drained=True)
    await until(lambda: channel.is_closed)
    assert not channel.lost.done()


async def test_a_replica_that_serve_has_removed_is_given_up_if_it_says_nothing_as_it_drains(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_channels, "LOOK_S", 0.005)
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    channel = pool.channels.channel("r")
    pool.channels._look_for_silence()
    sequence = submit(pool, replica, [])
    pool.consist_of()
    with pytest.raises(ReplicaLost, match="says nothing"):
        await asyncio.wait_for(sequence.ended, 5)
    assert channel.lost.done()
    assert not pool.channels._silences


@pytest.mark.parametrize(
    "happens", ["its connection breaks", "its engine dies", "Serve removes it", "Serve removes it once it is lost"]
)
async def test_a_replica_has_ended_if_it_says_so_or_serve_does(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    ended: list[tuple[str, str | None]] = []
    pool.state.on_end = lambda replica, node: ended.append((replica, node))
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    if happens == "its engine dies":
        await replica.server.stop(death="the engine hangs")
    elif happens == "Serve removes it":
        pool.consist_of()
    else:
        monkeypatch.setattr(pool_channels, "RECONNECT_S", 60)
        (writer,) = replica.server._writers.values()
        writer.transport.abort()
    await until(lambda: not pool.state.replicas)
    if happens == "Serve removes it once it is lost":
        assert not ended
        pool.consist_of()
    await asyncio.sleep(0.01)
    node = None if happens == "its engine dies" else "127.0.0.1"
    assert ended == ([] if happens == "its connection breaks" else [("r", node)])


async def test_a_replica_that_serve_brings_back_joins_on_another_connection(pool: Pool, replica: Replica) -> None:
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    old = pool.channels.channel("r")
    submit(pool, replica, [])
    pool.consist_of()
    await until(lambda: not pool.state.replicas)
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    assert pool.channels.channel("r") is not old
    assert not old.is_closed
    old.close()
    assert pool.knows(replica)


async def test_replicas_do_not_disturb_each_other(pool: Pool, replica: Replica) -> None:
    other = Replica("other")
    await other.start()
    pool.consist_of(replica, other)
    await until(lambda: pool.knows(replica) and pool.knows(other))
    await other.server.stop()
    await until(lambda: not pool.knows(other))
    assert pool.knows(replica)
    pool.consist_of(replica)
    await asyncio.sleep(0)
    assert pool.knows(replica)
    assert not pool.channels._connecting


async def test_what_waits_for_the_pool_is_shared_out(pool: Pool, replica: Replica) -> None:
    other = Replica("other")
    await other.start()

    def told() -> list[Backlog]:
        return [one.server.backlog() for one in (replica, other)]

    def tell(backlog: Backlog) -> None:
        share_backlog([pool.channels.channel(name) for name in pool.state.replicas], backlog)

    tell(Backlog(1, 1))  # nobody is there to be told
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    tell(Backlog(101, 3))
    await until(lambda: told() == [Backlog(101, 3), Backlog()])
    pool.consist_of(replica, other)
    await until(lambda: pool.knows(other))
    tell(Backlog(101, 3))
    await until(lambda: told() == [Backlog(51, 2), Backlog(50, 1)])
    pool.consist_of(other)
    await until(lambda: told()[0] == Backlog())
    await other.server.stop()


async def test_a_replica_that_changes_its_role_changes_the_pool_and_loses_nothing(pool: Pool, replica: Replica) -> None:
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    received: list[TokenDelta] = []
    sequence = submit(pool, replica, received)
    await until(lambda: replica.channels)
    state = pool.state.replicas["r"]
    with state.sequences.counting(1):
        replica.server.publish_role("prefill")
        await until(lambda: "r" in pool.prefill.replicas)
        assert not pool.state.replicas
        assert pool.prefill.replicas["r"] is state
        assert (state.info.role, state.sequences.own, pool.prefill.index.num_blocks("r")) == ("prefill", 1, 2)
        assert pool.prefill.own_replica("session") == "r"
        assert pool.state.own_replica("session") is None
        replica.server.publish_load(ReplicaLoad(sequences=7))
        await until(lambda: state.sequences.value == 7)
    replica.channels[0].put(sequence.number, LAST)
    await sequence.ended
    assert received == [LAST]
    replica.server.publish_role("decode")
    await until(lambda: "r" in pool.state.replicas)
    assert (pool.state.replicas["r"], state.info.role) == (state, "decode")


async def test_who_connects_later_is_told_the_role_before_the_links(pool: Pool, replica: Replica) -> None:
    replica.server.publish_role("prefill")
    pool.consist_of(replica)
    await until(lambda: "r" in pool.prefill.replicas)
    (writer,) = replica.server._writers.values()
    replica.server.publish_role("decode")
    replica.server.publish_links([])
    writer.transport.abort()
    await until(lambda: "r" in pool.state.replicas and not pool.state.replicas["r"].can_get_kv_from("p"))


# What goes wrong with connecting


class Waits:
    """The back-off of one replica's attempts, which take no time here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: list[float] = []
        sleep = asyncio.sleep

        async def note(delay_s: float) -> None:
            self.seconds.append(delay_s)
            await sleep(0.001 if delay_s else 0)

        monkeypatch.setattr(pool_channels, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": note}))


@pytest.mark.parametrize("broken", ["connect", "info", "join"])
async def test_whatever_goes_wrong_with_connecting_it_is_tried_again_ever_more_rarely(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    waits = Waits(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        if broken == "connect":
            patch.setattr(Channel, "connect", lambda *_: 1 / 0)
        elif broken == "info":
            patch.setattr("msgspec.convert", lambda *_: 1 / 0)
        else:
            patch.setattr(pool.state, "on_change", lambda: 1 / 0)
        patch.setattr(pool_channels, "RECONNECT_S", 0.5)
        pool.consist_of(replica)
        await until(lambda: len(waits.seconds) > 6)
        assert pool.channels.unreachable == {"r": "ZeroDivisionError"}
        assert not pool.state.replicas
    assert waits.seconds[:7] == [0, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert "replica_id=r cannot be connected to" in caplog.text
    await until(lambda: pool.knows(replica))
    assert not pool.channels.unreachable
    await until(lambda: len(replica.server.channels) == 1)


async def test_a_task_that_connects_and_dies_is_started_again(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_channels, "MAX_RECONNECT_S", 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_channels.logger, "warning", lambda *_: 1 / 0)
        good, replica.address = replica.address, {**replica.address, "port": "1"}
        pool.consist_of(replica)
        await until(lambda: pool.channels._connecting)
        task = pool.channels._connecting["r"]
        await until(task.done)
    replica.address["port"] = good["port"]
    await until(lambda: pool.knows(replica))


@pytest.mark.parametrize("newer", ["client", "server"])
async def test_a_replica_of_another_protocol_is_unreachable_with_the_reason_until_it_is_replaced(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch, newer: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"app.channel.{newer}.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        pool.consist_of(replica)
        await until(lambda: "version" in pool.channels.unreachable.get("r", ""))
        assert not pool.state.replicas
        pool.consist_of()
        await until(lambda: not pool.channels.unreachable)
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))


@pytest.mark.parametrize("newer", ["client", "server"], ids=["frontends first", "replicas first"])
async def test_an_update_to_another_protocol_loses_nothing_that_runs(pool: Pool, replica: Replica, newer: str) -> None:
    """While both releases are there, requests go to the replicas of this frontend's own, whichever is updated first."""
    other = Replica("other")
    await other.start()
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    received: list[TokenDelta] = []
    sequence = submit(pool, replica, received)
    await until(lambda: replica.channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"app.channel.{newer}.PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        pool.consist_of(replica, other)
        await until(lambda: "version" in pool.channels.unreachable.get("other", ""))
        assert set(pool.state.replicas) == {"r"}
        assert pool.knows(replica)
    await until(lambda: pool.knows(other))  # now both are of the newer release
    pool.consist_of(other)
    await until(lambda: set(pool.state.replicas) == {"other"})
    replica.channels[0].put(sequence.number, LAST)
    await sequence.ended
    assert received == [LAST]
    await other.server.stop()


async def test_a_replica_that_has_work_and_says_nothing_counts_as_gone_until_it_answers(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does whose process was stopped: its connections stand, and nothing comes."""
    monkeypatch.setattr(pool_channels, "LOOK_S", 0.005)
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    before = pool.channels.channel("r")
    pool.channels._look_for_silence()
    await asyncio.sleep(0.2)
    assert pool.channels.channel("r") is before, "it has no work of this frontend"
    sequence = submit(pool, replica, [])
    with pool.state.replicas["r"].sequences.counting(1):
        with pytest.raises(ReplicaLost, match="says nothing"):
            await asyncio.wait_for(sequence.ended, 5)
        await until(lambda: "r" in pool.state.replicas)
    assert pool.channels.channel("r") is not before


@pytest.mark.parametrize(("other_has_work", "num_looks"), [(False, MIN_LOOKS), (True, MAX_LOOKS)])
async def test_a_silent_replica_is_left_sooner_if_another_speaks(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch, other_has_work: bool, num_looks: int
) -> None:
    monkeypatch.setattr(pool_channels, "LOOK_S", 600)
    other = Replica("other")
    await other.start()
    pool.consist_of(replica, other)
    await until(lambda: pool.knows(replica) and pool.knows(other))
    channel = pool.channels.channel("r")
    with ExitStack() as working:
        for each in (replica, other) if other_has_work else (replica,):
            working.enter_context(pool.state.replicas[each.name].sequences.counting(1))
        for _ in range(num_looks):  # the first one finds what came at the beginning
            pool.channels._look_for_silence()
        assert not channel.is_closed
        pool.channels._look_for_silence()
        assert channel.is_closed
    await other.server.stop()


async def test_a_replica_that_tells_its_load_is_not_silent(
    pool: Pool, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_channels, "LOOK_S", 0.005)
    pool.consist_of(replica)
    await until(lambda: pool.knows(replica))
    before = pool.channels.channel("r")
    pool.channels._look_for_silence()
    sequence = submit(pool, replica, [])
    with pool.state.replicas["r"].sequences.counting(1):
        for number in range(40):
            replica.server.publish_load(ReplicaLoad(sequences=3, used_blocks=number))
            await asyncio.sleep(0.01)
    assert pool.channels.channel("r") is before
    before.finish(sequence)
