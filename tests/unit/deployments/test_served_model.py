"""One model as a frontend serves it: what it says of replicas that do not answer, and who watches its tasks.

The replicas are the real other ends of the channels, and Ray is played by the test.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, Literal

import msgspec
import pytest

from app.background import is_watched
from app.channel.protocol import Backlog, Submit
from app.channel.server import ChannelServer, FrontendChannel
from app.config import parse
from app.errors import ReplicaLost
from app.frontend.sequence_progress import SequenceProgress
from app.messages import EngineStats, GenerateRequest, ReplicaInfo, ReplicaLoad, Role, TokenDelta
from app.routing.decision import RoutingHints
from app.routing.ejection import STRONG
from deployments.frontend import pool_channels, pools, served_model
from deployments.frontend.served_model import ServedModel
from deployments.ready_replicas import ReadyReplicas
from tests.unit.routing.fleet import PACE
from tests.unit.waiting import PATIENCE_S, until

ROLES: tuple[Role, ...] = ("prefill", "decode")
LAST = TokenDelta([1], finish_reason="stop")


class Handle:
    """A Serve handle of one pool, whose replicas answer what `answers` says for a method, or never."""

    def __init__(self, role: Role, answers: dict[str, Callable[[], Any]]) -> None:
        self.deployment_name, self.app_name = role, "baton"
        self._answers = answers
        self.stats = SimpleNamespace(remote=self._stats)
        self.calls: list[str] = []
        """The methods that were called by reference."""

    def options(self) -> Any:
        return self

    async def _stats(self, *, replica_id: str) -> Any:
        if "stats" not in self._answers:
            await asyncio.Event().wait()
        return self._answers["stats"]()


class Cluster:
    """A model with one replica in each pool, none of which answers by Ray at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ready = {role: ReadyReplicas() for role in ROLES}
        self.answers: dict[Role, dict[str, Callable[[], Any]]] = {role: {} for role in ROLES}
        self.handles = {role: Handle(role, self.answers[role]) for role in ROLES}
        self.servers = {role: ChannelServer(f"{role}-1", self._run) for role in ROLES}
        self.addresses: dict[Role, dict[str, str]] = {}
        self.runs: list[tuple[FrontendChannel, Submit]] = []
        for module in (pool_channels, pools, served_model):
            monkeypatch.setattr(module, "deployment_id_of", lambda handle: handle.deployment_name)
            monkeypatch.setattr(module, "ready_replicas_of", self.ready.__getitem__)
        monkeypatch.setattr(pools, "call_by_reference", self._call)
        engine = {"engine": "vllm"}
        config = parse(
            {"models": [{"name": "m", "source": "owner/m", "prefill": engine, "decode": engine}], "transfer": {}}
        )
        self.model = ServedModel(config.models[0], self.handles, config.limits)

    def _call(self, replica: Any, method: str, *_: Any) -> Any:
        role = next(role for role, ready in self.ready.items() if ready.find(replica.replica_id.unique_id) is replica)
        self.handles[role].calls.append(method)
        return asyncio.get_running_loop().create_future()

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        self.runs.append((channel, call))
        await asyncio.Event().wait()

    async def start(self) -> None:
        for role in ROLES:
            self.addresses[role] = await self.servers[role].start("127.0.0.1")
            self.consists_of(role, self.addresses[role])

    def consists_of(self, role: Role, address: dict[str, str]) -> None:
        info = ReplicaInfo(
            replica_id=f"{role}-1",
            role=role,
            model="m",
            engine="sim",
            engine_version="1",
            node_ip="127.0.0.1",
            pid=1,
            num_blocks=8,
            block_size_tokens=16,
            max_model_len=64,
        )
        metadata = {"info": msgspec.to_builtins(info), "channel": address}
        replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"{role}-1"), replica_metadata=metadata)
        self.ready[role].update([replica])

    def reachable(self) -> dict[str, int]:
        return {role: pool["reachable"] for role, pool in self.model.health()["pools"].items()}

    async def stop(self) -> None:
        for role in ROLES:
            self.ready[role].update([])
            await self.servers[role].stop()


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    cluster = Cluster(monkeypatch)
    await cluster.start()
    await until(lambda: cluster.reachable() == {"prefill": 1, "decode": 1})
    yield cluster
    await cluster.stop()


# What it says of replicas


async def test_a_replica_that_hangs_does_not_hang_the_stats(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "STATS_TIMEOUT_S", 0.05)
    cluster.answers["prefill"]["stats"] = lambda: EngineStats(num_running=7)
    stats = {each["role"]: each for each in await asyncio.wait_for(cluster.model.stats(), PATIENCE_S)}
    assert stats["decode"]["error"] == "no answer"
    assert stats["decode"]["view"]["sequences"] == 0
    assert stats["prefill"]["num_running"] == 7
    assert "error" not in stats["prefill"]


async def test_a_replica_that_is_gone_is_said_to_be(cluster: Cluster) -> None:
    def gone() -> None:
        raise ReplicaLost("gone")

    for role in ROLES:
        cluster.answers[role]["stats"] = gone
    assert [each["error"] for each in await cluster.model.stats()] == ["ReplicaLost"] * 2


async def test_why_a_replica_cannot_be_reached_is_in_health_and_stats(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_channels, "RECONNECT_S", 0.01)
    assert cluster.model.health()["pools"]["decode"] == {"ready": 1, "reachable": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.channel.server.PROTOCOL_VERSION", 3)
        for writer in cluster.servers["decode"]._writers.values():
            writer.transport.abort()
        await until(lambda: "version 3" in str(cluster.model.health()))
        pool = cluster.model.health()["pools"]["decode"]
        reason = "it refuses this frontend: the replica speaks version 3 of the channel's protocol, not 2"
        assert pool == {"ready": 1, "reachable": 0, "unreachable": {"decode-1": reason}}
        cluster.answers["decode"]["stats"] = cluster.answers["prefill"]["stats"] = EngineStats
        (decode,) = [each for each in await cluster.model.stats() if each["role"] == "decode"]
        assert (decode["unreachable"], decode["view"]) == (reason, None)
    await until(lambda: cluster.reachable() == {"prefill": 1, "decode": 1})


async def test_the_memory_of_a_model_is_that_of_the_replicas_that_decode(cluster: Cluster) -> None:
    assert cluster.model.kv_size() == 8 * 16
    pool = cluster.model.router.pools["decode"]
    pool.join(msgspec.structs.replace(pool.replicas["decode-1"].info, replica_id="other", num_blocks=2))
    assert cluster.model.kv_size() == (8 + 2) * 16


async def test_how_slow_a_replica_is_is_in_health_and_stats_and_what_is_left_out_in_stats(cluster: Cluster) -> None:
    def said() -> list[object]:
        return [endpoint["slowness"] for endpoint in cluster.model.endpoints()]

    assert said() == [None, None]  # they tell no pace
    pool = cluster.model.router.pools["decode"]
    for replica, times in (("decode-1", 3.0), ("other", 1.0)):
        info = msgspec.structs.replace(pool.replicas["decode-1"].info, replica_id=replica, pace=PACE)
        pool.join(info)
        pool.on_load(replica, ReplicaLoad(slowness=times))
    assert said() == [None, 3.0]
    cluster.answers["decode"]["stats"] = cluster.answers["prefill"]["stats"] = EngineStats
    assert [each["view"]["slowness"] for each in await cluster.model.stats()] == [None, 3.0]
    cluster.model.router.ejections.pair_failed("prefill-1", "decode-1", STRONG, time.monotonic())
    told = cluster.model.describe_failures()
    assert [(each["prefill"], each["decode"]) for each in told["left_out"]] == [("prefill-1", "decode-1")]
    assert (told["ejections_so_far"], told["quarantined_prompts"]) == ({"pair": 1}, 0)


# Its tasks


def unwatched(*own: asyncio.Task[Any] | None) -> list[str]:
    """The names of the tasks that nobody watches, without those that the test itself awaits."""
    tasks = asyncio.all_tasks() - {asyncio.current_task(), *own}
    return sorted(task.get_name() for task in tasks if not is_watched(task))


async def test_somebody_watches_every_task(cluster: Cluster) -> None:
    """With an attach that is not answered, a prefill that is being abandoned, and a replica that is unreachable."""
    request = GenerateRequest(request_id="r", prompt_token_ids=[1] * 20, sampling={}, prefill_mode="remote")
    running = asyncio.create_task(cluster.model.orchestrator.run(request, SequenceProgress(lambda _: None)))
    await until(lambda: cluster.runs)
    cluster.consists_of("prefill", {"host": "127.0.0.1", "port": "1", "token": ""})
    for writer in cluster.servers["prefill"]._writers.values():
        writer.transport.abort()
    await until(lambda: "abandon" in cluster.handles["prefill"].calls)
    await until(lambda: cluster.model.health()["pools"]["prefill"].get("unreachable"))
    kinds = {task.get_name().partition("-")[0] for task in asyncio.all_tasks()}
    assert {"channel", "connect", "attach", "abandon", "send", "sequence"} <= kinds
    assert unwatched(running) == []
    running.cancel()
    await asyncio.wait([running])


async def test_a_task_that_nobody_watches_is_found() -> None:
    task = asyncio.create_task(asyncio.sleep(60), name="forgotten")
    assert unwatched() == ["forgotten"]
    task.cancel()


@pytest.mark.parametrize(("lacks", "backlog"), [("decode", Backlog(0, 3)), ("prefill", Backlog(70, 0))])
async def test_prefill_is_told_of_all_that_wait_once_there_is_no_decode_replica(
    cluster: Cluster, lacks: Literal["prefill", "decode"], backlog: Backlog
) -> None:
    line, servers = cluster.model.orchestrator.line, cluster.servers
    line.lacks, line.num_waiting, line.queued_tokens = lacks, 3, 70
    line.on_backlog()
    await until(lambda: servers[lacks].backlog() == backlog)
    await servers["decode"].stop()
    await until(lambda: cluster.reachable()["decode"] == 0)
    line.on_backlog()
    await until(lambda: servers["prefill"].backlog() == backlog)


async def test_who_waits_is_told_by_class_and_by_those_tenants_of_whom_most_wait(cluster: Cluster) -> None:
    line = cluster.model.orchestrator.line
    waiting = [RoutingHints(tenant=str(number)) for number in range(30) for _ in range(number)]
    waiting += [RoutingHints(service_class="flex")] * 33
    line.tickets = lambda: iter([SimpleNamespace(hints=hints) for hints in waiting])  # type: ignore[method-assign,misc]
    told = cluster.model.describe_line()
    assert told["by_class"] == {"priority": 0, "default": 29 * 30 // 2, "flex": 33}
    assert told["by_tenant"] == {str(number): number for number in range(29, 9, -1)}
