"""Whole replicas without Ray, with the sim engine: each of their background tasks has an owner that notices its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Set
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app import background
from app.channel.client import Channel
from app.config import parse
from app.engines import progress
from app.errors import EngineDead, ReplicaLost
from app.handoff_seal import unpack
from app.messages import GenerateRequest, KvUpdate, Link, ReplicaLoad, Role, TokenDelta, TransferDescriptor
from deployments import roles
from deployments.replica import link_record
from deployments.replica import metrics as worker_metrics
from deployments.replica import worker as module
from deployments.replica.worker import DecodeWorker, PrefillWorker, Worker
from tests.unit.waiting import until

OF_BOTH = {
    *("engine-health", "follow-cache", "follow-role", "guard", "record-links"),
    *("sim-progress", "sim-steps", "watch-load", "worker-metrics"),
}
OF_DECODE = {"links"}
ENDS_THE_REPLICA = {"engine-health", "sim-steps"}
"""What cannot begin anew; all others do."""


RESTS = [(module, "TOLD_POLL_S"), (module, "HEALTH_POLL_S"), (worker_metrics, "PERIOD_S"), (progress, "REST_S")]
"""How long tasks rest that have nothing to do."""
AS_SERVED = [(where, name, getattr(where, name)) for where, name in RESTS]

KV: dict[str, Any] = {}
"""Ray's."""


class Gauge:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def set_default_tags(self, tags: dict[str, str]) -> None: ...

    def set(self, value: float, tags: dict[str, str] | None = None) -> None: ...


class Prefill(PrefillWorker):
    def __del__(self) -> None: ...  # type: ignore[override]  # `stop` is called instead


class Decode(DecodeWorker):
    def __del__(self) -> None: ...  # type: ignore[override]


class Peers:
    """The prefill replicas as the decode replica calls them."""

    replicas: dict[str, PrefillWorker]

    def __init__(self, handles: Any, decode_replica: str, roles: Any) -> None:
        self._decode_replica = decode_replica
        self._roles = roles

    def follow(self, on_change: Callable[[], object]) -> None:
        self._roles.on_change["peers"] = on_change
        on_change()

    def ready(self) -> Set[str]:
        role_of = self._roles.role_of
        return {name for name, worker in self.replicas.items() if role_of(name, worker.home) == "prefill"}

    async def begin_probe(self, replica: str) -> None:
        await self.replicas[replica].begin_probe(self._decode_replica, replica_id=replica)

    async def end_probe(self, replica: str) -> Any:
        return await self.replicas[replica].end_probe(self._decode_replica, replica_id=replica)

    async def prefill(self, request: GenerateRequest, replica: str) -> TransferDescriptor:
        descriptor: TransferDescriptor = unpack(await self.replicas[replica].prefill(request, replica_id=replica))
        return descriptor

    def withdraw(self, replica: str) -> None: ...

    def abandon(self, request_id: str, replica: str) -> None: ...


class Frontend:
    """What one frontend hears of a replica."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.kv: list[KvUpdate] = []
        self.roles: list[Role] = []

    def on_load(self, replica: str, load: ReplicaLoad) -> None:
        self.num_loads += 1

    def on_kv(self, replica: str, update: KvUpdate) -> None:
        self.kv.append(update)

    def on_links(self, replica: str, links: list[Link]) -> None: ...

    def on_role(self, replica: str, role: Role) -> None:
        self.roles.append(role)

    async def connect(self, worker: Worker) -> Channel:
        metadata = worker.record_replica_metadata()
        return await Channel.connect(metadata["info"]["replica_id"], metadata["channel"], self)


async def generate(channel: Channel, prompt: list[int]) -> int:
    """Run one sequence and return the number of its tokens."""
    deltas: list[TokenDelta] = []
    sampling = {"max_tokens": 20, "ignore_eos": True}
    request = GenerateRequest(request_id="q", prompt_token_ids=prompt, sampling=sampling)
    sequence = channel.submit(request, deltas.append, has_handoff=False, local_reason="policy")
    try:
        await asyncio.wait_for(sequence.ended, 5)
    finally:
        channel.finish(sequence)
    return sum(len(delta.token_ids) for delta in deltas)


@pytest.fixture
async def replicas(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[dict[str, Worker]]:
    """A prefill and a decode replica, by their roles, and their link."""
    vocab = {f"word{number}": number for number in range(100)}
    config = {"vocab_size": 100, "max_position_embeddings": 1024, "eos_token_id": 2}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode({"added_tokens": [], "model": {"vocab": vocab}}))
    names = iter(("p", "d"))
    context = lambda: SimpleNamespace(app_name="a", replica_id=SimpleNamespace(unique_id=next(names)))  # noqa: E731
    monkeypatch.setattr(module, "serve", SimpleNamespace(get_replica_context=context))
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(module, "local_path", lambda source: str(tmp_path))
    monkeypatch.setattr(module, "reserve_port", lambda low, high: SimpleNamespace(number=0))
    monkeypatch.setattr(module, "adopt_serve_logging", lambda: None)
    monkeypatch.setattr(module, "freeze_heap", lambda: None)
    monkeypatch.setattr(module, "be_guarded", asyncio.Event().wait)  # it would end the tests with the replica
    monkeypatch.setattr(worker_metrics, "Gauge", Gauge)
    monkeypatch.setattr(worker_metrics, "PERIOD_S", 0.05)
    monkeypatch.setattr(module, "RayPrefillPeers", Peers)
    monkeypatch.setattr(module, "DeploymentHandle", lambda *_: None)
    monkeypatch.setattr(module, "TOLD_POLL_S", 0.01)
    monkeypatch.setattr(roles, "get_internal_kv", KV.get)
    monkeypatch.setattr(roles, "put_internal_kv", KV.__setitem__)
    monkeypatch.setattr(roles, "delete_internal_kv", lambda key: KV.pop(key, None))
    KV.clear()
    monkeypatch.setattr(link_record, "put_internal_kv", lambda key, value: None)
    monkeypatch.setattr(link_record, "delete_internal_kv", lambda key: None)
    monkeypatch.setattr(background, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(progress, "REST_S", 0.02)
    pool = {"engine": "sim", "engine_args": {"speed_up": "max"}}
    model = {"name": "m", "source": "owner/m", "prefill": pool, "decode": pool}
    arguments = parse({"models": [model], "transfer": {}})
    made: dict[str, Any] = {"prefill": Prefill.__new__(Prefill), "decode": Decode.__new__(Decode)}
    Peers.replicas = {"p": made["prefill"], "d": made["decode"]}
    await made["prefill"].__init__(arguments, "cpu")
    await made["decode"].__init__(arguments, "cpu")
    yield made
    await DecodeWorker.__del__(made["decode"])
    await PrefillWorker.__del__(made["prefill"])


def is_watched(task: asyncio.Task[Any], worker: Any) -> bool:
    """Whether somebody notices the task's end: an owner of background tasks, or who waits for it."""
    return task in worker._background or task in worker._engine._background or task in worker._server._attending


async def test_each_task_of_a_replica_has_an_owner(replicas: dict[str, Worker]) -> None:
    before = asyncio.all_tasks()
    channels = [await Frontend().connect(worker) for worker in replicas.values()]
    await asyncio.gather(*(generate(channel, [number] * 40) for number, channel in enumerate(channels)))
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    of_frontend = {task for task in tasks if task.get_name().startswith("channel-")}
    of_channel = {task for task in tasks if task.get_name().startswith("send-")}  # tests/unit/channel has them
    unwatched = {
        task
        for task in tasks - of_frontend - of_channel
        if not any(is_watched(task, worker) for worker in replicas.values())
    }
    assert not unwatched
    for role, expected in (("prefill", OF_BOTH), ("decode", OF_BOTH | OF_DECODE)):
        worker: Any = replicas[role]
        owned = {task.get_name() for task in before if is_watched(task, worker)}
        assert owned == expected, "a new one belongs into one of the two tests below"


async def test_a_replica_at_rest_wakes_ten_times_a_second_at_most(
    replicas: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the times for which its tasks rest, not by the clock.  Ray's and Serve's own timers come on top."""
    loop, rests = asyncio.get_running_loop(), dict[str, dict[str, float]]()
    call_at, worker_of = loop.call_at, {worker: role for role, worker in replicas.items()}

    def note(when: float, *arguments: Any, **keywords: Any) -> asyncio.TimerHandle:
        task = asyncio.current_task()
        for worker, role in worker_of.items():
            if task is not None and is_watched(task, worker):
                rests.setdefault(role, {})[task.get_name()] = when - loop.time()
        return call_at(when, *arguments, **keywords)

    for where, name, seconds in AS_SERVED:
        monkeypatch.setattr(where, name, seconds)
    monkeypatch.setattr(loop, "call_at", note)
    expected = {"engine-health", "follow-role", "sim-progress", "watch-load", "worker-metrics"}
    await until(lambda: all(rests.get(role, {}).keys() >= expected for role in replicas))
    await until(lambda: all(sum(1 / seconds for seconds in of_role.values()) < 10 for of_role in rests.values()))


async def throw_into(worker: Any, name: str, error: Exception) -> None:
    """Make what the task waits for raise `error` there."""
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == name and is_watched(task, worker))
    waiter: Any = None
    while waiter is None or waiter.done():
        await asyncio.sleep(0)
        waiter = task
        while isinstance(waiter, asyncio.Task):
            waiter = waiter._fut_waiter  # type: ignore[attr-defined]
    waiter.set_exception(error)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_after_an_error_a_task_begins_anew_and_the_replica_serves(
    replicas: dict[str, Worker], role: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = replicas[role]
    names = (OF_BOTH | (OF_DECODE if role == "decode" else set())) - ENDS_THE_REPLICA
    for name in sorted(names):
        await throw_into(worker, name, RuntimeError(f"thrown into {name}"))
    await until(lambda: all(f"{name} failed, and is started again" in caplog.text for name in names))
    await asyncio.sleep(0.05)
    await worker.check_health()
    frontend = Frontend()
    channel = await frontend.connect(worker)
    num_loads = frontend.num_loads
    assert await generate(channel, [7] * 40) == 20
    await until(lambda: frontend.num_loads > num_loads)
    await until(lambda: sum(len(update.stored) for update in frontend.kv) >= 2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("name", sorted(ENDS_THE_REPLICA))
async def test_the_end_of_what_cannot_begin_anew_is_the_replicas(
    replicas: dict[str, Worker], role: str, name: str
) -> None:
    worker = replicas[role]
    channel = await Frontend().connect(worker)
    await throw_into(worker, name, RuntimeError("thrown in"))
    await until(lambda: channel.is_closed)
    with pytest.raises(EngineDead, match="thrown in"):
        await worker.check_health()
    with pytest.raises(ReplicaLost):
        await Frontend().connect(worker)


async def test_a_replica_whose_engine_hangs_fails_its_sequences_and_lets_nobody_come_back(
    replicas: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "IDLE_FLOOR_S", 0.3)
    worker: Any = replicas["decode"]
    channel = await Frontend().connect(worker)
    assert await generate(channel, [7] * 40) == 20
    worker._engine._is_hung = True
    with pytest.raises(EngineDead, match="the engine hangs"):
        await generate(channel, [8] * 40)
    await until(lambda: channel.is_closed)
    with pytest.raises(EngineDead, match="the engine hangs"):
        await worker.check_health()
    with pytest.raises(EngineDead, match="the engine hangs"):
        await worker.stats(replica_id="d")
    with pytest.raises(ReplicaLost):
        await Frontend().connect(worker)


async def test_a_replica_follows_its_assignment_and_loses_nothing(replicas: dict[str, Worker]) -> None:
    prefill: Any = replicas["prefill"]
    frontend = Frontend()
    channel = await frontend.connect(prefill)

    def tasks() -> set[str]:
        return {task.get_name() for task in asyncio.all_tasks() if task in prefill._background}

    roles.write_roles("a", "m", {"p": "decode"})
    running = asyncio.create_task(generate(channel, [3] * 40))
    await until(lambda: frontend.roles == ["decode"])
    assert prefill.role == "decode"
    assert "links" in tasks()
    await until(lambda: roles.told_role("a", "p") == "decode")
    assert await running == 20
    later = Frontend()
    another = await later.connect(prefill)
    await until(lambda: later.roles == ["decode"])
    roles.write_roles("a", "m", {})
    await until(lambda: frontend.roles == ["decode", "prefill"])
    await until(lambda: "links" not in tasks())
    assert await generate(channel, [4] * 40) == 20
    another.close()
    channel.close()


async def test_a_replica_that_is_told_to_look_does_not_wait_for_its_next_look(
    replicas: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOLD_POLL_S", 3600.0)
    loop, read = asyncio.get_running_loop(), asyncio.Event()

    def get(key: str) -> Any:
        loop.call_soon_threadsafe(read.set)
        return KV.get(key)

    monkeypatch.setattr(roles, "get_internal_kv", get)
    for _ in range(2):  # the second one is followed by the long rest
        read.clear()
        replicas["prefill"]._roles.look()
        await asyncio.wait_for(read.wait(), 5)
    roles.write_roles("a", "m", {"p": "decode"})
    await replicas["prefill"].look_at_roles(replica_id="p")
    await until(lambda: replicas["prefill"].role == "decode")


async def test_a_replica_that_decodes_now_probes_those_that_prefill_now(replicas: dict[str, Worker]) -> None:
    roles.write_roles("a", "m", {"p": "decode", "d": "prefill"})
    prefill: Any = replicas["prefill"]
    await until(lambda: prefill.role == "decode" and prefill._decodes._links.is_usable("d"))


async def test_a_role_stays_while_the_assignment_cannot_be_read(
    replicas: dict[str, Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roles.write_roles("a", "m", {"d": "prefill"})
    await until(lambda: replicas["decode"].role == "prefill")

    def fail(key: str) -> bytes:
        raise OSError("GCS is gone")

    monkeypatch.setattr(roles, "get_internal_kv", fail)
    await until(lambda: "follow-role failed, and is started again" in caplog.text)
    assert replicas["decode"].role == "prefill"
    monkeypatch.setattr(roles, "get_internal_kv", KV.get)
    roles.write_roles("a", "m", {})
    await until(lambda: replicas["decode"].role == "decode")
