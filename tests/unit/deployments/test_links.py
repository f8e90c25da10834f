"""A decode replica's links: what a probe makes of a pair, when pairs are probed, and what keeps one from starting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from app.background import BackgroundTasks
from app.engines.base import EngineInfo, EngineSpec
from app.engines.transport import NamedTransport
from app.errors import ConfigError, EngineDead, PrefillFailed
from app.handoff_seal import seal
from app.messages import (
    Emit,
    EngineStats,
    GenerateRequest,
    KvFormat,
    Link,
    PrefillReport,
    TokenDelta,
    TransferDescriptor,
    TransportEvidence,
    local_prefill,
)
from deployments.replica import links as module
from deployments.replica.decode import DecodeHalf
from deployments.replica.links import LinkKeeper
from deployments.replica.prefill import ProbeTurns
from tests.unit.waiting import until

INFO = EngineInfo(engine="fake", version="1", num_blocks=1000, block_size_tokens=16, max_model_len=4096)
FORMAT = KvFormat(
    protocol=1,
    engine="fake",
    engine_version="1",
    model="m",
    settings={},
    block_size_tokens=16,
    tensor_parallel_size=1,
)
OTHER = msgspec.structs.replace(FORMAT, engine_version="2")
BYTES_PER_TOKEN = 1000
GOOD = TransportEvidence("cuda_ipc")
BAD = TransportEvidence("tcp/lo", "KV moves by tcp/lo")


class Watch(NamedTransport):
    """Says of every peer what the test wants."""

    def __init__(self) -> None:
        super().__init__("")
        self.evidence: TransportEvidence | None = GOOD
        self.by_peer: dict[str, TransportEvidence] = {}
        self.peer = ""

    async def since(self, mark: int) -> TransportEvidence | None:
        return self.by_peer.get(self.peer, self.evidence)


class Engine:
    """Takes the KV of a probe in a millisecond for each of its tokens, and counts it a little later."""

    def __init__(self) -> None:
        self.transport_watch = Watch()
        self.tells = True
        self.is_dead = False
        self.lengths: list[int] = []
        self.local_reason = ""
        self._now = EngineStats()
        self._later: list[EngineStats] = []

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor, emit: Emit) -> None:
        num_tokens = len(request.prompt_token_ids)
        self.lengths.append(num_tokens)
        self.transport_watch.peer = descriptor.replica_id
        report = PrefillReport("remote", "", descriptor.replica_id, "d", 0, num_tokens, "")
        emit(TokenDelta([1], report=local_prefill("d", 0, self.local_reason) if self.local_reason else report))
        if self.tells:
            now = self._now
            moved = now.transferred_bytes + num_tokens * BYTES_PER_TOKEN
            self._later = [
                now,
                EngineStats(
                    num_transfers=now.num_transfers + 1,
                    transferred_bytes=moved,
                    transfer_s=now.transfer_s + num_tokens / 1000,
                ),
            ]

    async def stats(self) -> EngineStats:
        self._now = self._later.pop(0) if self._later else self._now
        return self._now

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDead


class Peers:
    """Prefill replicas that a test makes come, fail and go."""

    def __init__(self) -> None:
        self.replicas: set[str] = set()
        self.failing: dict[str, Exception] = {}
        self.hung: set[str] = set()
        self.told: TransportEvidence | None = None
        self.abandoned: list[str] = []
        self.probing: list[str] = []
        self.salts: set[str | None] = set()
        self.formats: dict[str, KvFormat | None] = {}
        """Of replicas whose KV is not like FORMAT."""
        self._on_change: Callable[[], object] = lambda: None

    def follow(self, on_change: Callable[[], object]) -> None:
        self._on_change = on_change

    def become(self, *replicas: str) -> None:
        self.replicas = set(replicas)
        self._on_change()

    def ready(self) -> set[str]:
        return self.replicas

    async def begin_probe(self, replica: str) -> None:
        self.probing.append(replica)

    async def end_probe(self, replica: str) -> TransportEvidence | None:
        self.probing.remove(replica)
        return self.told

    def withdraw(self, replica: str) -> None:
        if replica in self.probing:
            self.probing.remove(replica)

    async def prefill(self, request: GenerateRequest, replica: str) -> TransferDescriptor:
        assert self.probing == [replica]
        self.salts.add(request.cache_salt)
        if replica in self.hung:
            await asyncio.sleep(3600)
        if (error := self.failing.get(replica)) is not None:
            raise error
        descriptor = TransferDescriptor(
            engine="fake",
            replica_id=replica,
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,
            ready_at=0.0,
            lease_s=30,
            params={},
            kv_format=self.formats.get(replica, FORMAT),
        )
        return seal(descriptor, request)

    def abandon(self, request_id: str, replica: str) -> None:
        self.abandoned.append(replica)


class Decode:
    """A decode replica's keeper and what it works with."""

    def __init__(self, **fields: Any) -> None:
        self.engine = Engine()
        self.peers = Peers()
        spec: dict[str, Any] = {
            "role": "decode",
            "is_disaggregated": True,
            "replica_id": "d",
            "model_path": "",
            "device": "cpu",
            "tensor_parallel_size": 1,
            "engine_args": {},
            "required_transport": "nvlink",
            "transfer_timeout_s": 5.0,
            **fields,
        }
        self.deaths: list[EngineDead] = []
        self.background = BackgroundTasks("d", self.deaths.append)
        engine: Any = self.engine
        self.keeper = LinkKeeper(EngineSpec(**spec), engine, self.peers, self.background)
        self.can_prefill = True
        self.kv_format = FORMAT
        self.published: list[list[Link]] = []
        self.keeper.on_change = self.published.append

    async def start(self, *replicas: str, info: EngineInfo = INFO) -> None:
        self.peers.replicas = set(replicas)
        await self.keeper.start(info, self.kv_format, can_prefill=self.can_prefill)

    def problems(self) -> dict[str, str]:
        return {link.prefill_replica: link.problem for link in self.keeper.links()}


@pytest.fixture
async def decode(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Decode]:
    monkeypatch.setattr(module, "WAIT_FOR_PREFILL_S", 0.05)
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(module, "STATS_POLL_S", 0.001)
    monkeypatch.setattr(module, "STATS_TIMEOUT_S", 0.05)
    made = Decode()
    yield made
    await made.background.stop()


async def test_a_probe_measures_a_pair_before_the_replica_is_ready(decode: Decode) -> None:
    await decode.start("p")
    (link,) = decode.keeper.links()
    assert (link.prefill_replica, link.transport, link.problem) == ("p", "cuda_ipc", "")
    assert link.latency_s == pytest.approx(0.032)
    assert link.bytes_per_s == pytest.approx(1e6)
    assert link.probe_s is not None
    assert decode.engine.lengths == [32, 32, 2048]
    assert decode.keeper.num_probes == 3
    assert len(decode.peers.salts) == 3
    assert decode.keeper.is_usable("p")
    assert not decode.keeper.is_usable("q")
    assert not decode.peers.probing


async def test_the_long_prompt_fits_into_the_engine(decode: Decode) -> None:
    await decode.start("p", info=msgspec.structs.replace(INFO, max_model_len=90))
    assert decode.engine.lengths == [32, 32, 45]


async def test_what_an_engine_does_not_tell_is_not_made_up(decode: Decode) -> None:
    decode.engine.tells = False
    await decode.start("p")
    (link,) = decode.keeper.links()
    assert (link.latency_s, link.bytes_per_s, link.problem) == (None, None, "")


async def test_the_prefill_side_is_asked_where_it_moves_the_kv(decode: Decode) -> None:
    decode.engine.transport_watch.evidence = None
    decode.peers.told = BAD
    with pytest.raises(ConfigError, match="KV moves by tcp/lo"):
        await decode.start("p")
    decode.peers.told = None
    with pytest.raises(ConfigError, match="no engine tells"):
        await Decode.start(decode, "q")


async def test_nobody_has_to_tell_if_any_transport_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decode(required_transport="any")
    decode.engine.transport_watch.evidence = None
    await decode.start("p")
    assert decode.problems() == {"p": ""}
    await decode.background.stop()


async def test_decode_does_not_start_if_every_pair_falls_short(decode: Decode) -> None:
    decode.engine.transport_watch.evidence = BAD
    with pytest.raises(ConfigError) as failure:
        await decode.start("p", "q")
    assert failure.value.field == "transfer.required_transport"
    assert "nvlink is required" in failure.value.problem
    assert "from prefill replica p: KV moves by tcp/lo; from prefill replica q" in failure.value.problem
    assert "`any`" in failure.value.problem


async def test_one_pair_that_will_do_is_enough(decode: Decode) -> None:
    decode.engine.transport_watch.by_peer = {"p": BAD}
    await decode.start("p", "q")
    assert decode.problems() == {"p": "KV moves by tcp/lo", "q": ""}
    assert not decode.keeper.is_usable("p")
    assert decode.keeper.is_usable("q")


async def test_a_broken_prefill_does_not_keep_decode_from_starting(decode: Decode) -> None:
    decode.peers.failing["p"] = PrefillFailed("no memory")
    await decode.start("p")
    assert decode.problems() == {"p": "the probe failed: no memory"}
    assert decode.peers.abandoned == ["p"]
    assert not decode.peers.probing
    del decode.peers.failing["p"]
    await until(lambda: decode.keeper.is_usable("p"))


async def test_a_prefill_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decode(transfer_timeout_s=0.05)
    decode.peers.hung.add("p")
    await decode.start("p")
    assert decode.problems() == {"p": "the probe failed: TimeoutError"}
    assert (decode.peers.abandoned, decode.peers.probing) == (["p"], [])
    await decode.background.stop()


async def test_kv_that_decode_computed_itself_proves_nothing(decode: Decode) -> None:
    decode.engine.local_reason = "transfer_failed"
    await decode.start("p")
    assert decode.problems() == {"p": "the probe failed: no KV came (transfer_failed)"}
    assert decode.keeper.num_probes == 0


async def test_decode_waits_a_while_for_the_first_prefill_replica(
    decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_IF_NEEDED_S", 5.0)
    decode.can_prefill = False
    starting = asyncio.create_task(decode.start())
    await asyncio.sleep(0.02)
    decode.peers.become()  # as Serve tells that the pool is there
    await asyncio.sleep(0.02)
    assert not starting.done()
    decode.peers.become("p")
    await starting
    assert decode.keeper.is_usable("p")


async def test_replicas_that_come_later_are_probed_and_those_that_go_are_forgotten(decode: Decode) -> None:
    await decode.start()
    assert decode.keeper.links() == []
    decode.peers.become("p", "q")
    await until(lambda: decode.problems() == {"p": "", "q": ""})
    assert [link.prefill_replica for link in decode.published[-1]] == ["p", "q"]
    decode.peers.become("q")
    await until(lambda: decode.problems() == {"q": ""})
    assert [link.prefill_replica for link in decode.published[-1]] == ["q"]


async def test_a_pair_that_failed_is_tried_less_and_less_often(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    decode.peers.failing["p"] = PrefillFailed("broken")
    await decode.start("p")
    await until(lambda: len(decode.peers.abandoned) >= 3)
    known = decode.keeper._known["p"]
    assert known.num_failures >= 3
    pause_s = known.retry_at - asyncio.get_running_loop().time()
    assert pause_s > 2 * module.FIRST_RETRY_S


async def test_a_replica_whose_own_engine_is_dead_probes_no_longer(decode: Decode) -> None:
    await decode.start()
    decode.engine.is_dead = True
    decode.peers.failing["p"] = EngineDead()
    decode.peers.become("p")
    await until(lambda: decode.deaths)
    assert decode.keeper.links() == []


async def test_after_an_error_the_pool_is_followed_again(decode: Decode) -> None:
    await decode.start()
    ready, decode.peers.ready = decode.peers.ready, lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    decode.peers.become("p")
    await asyncio.sleep(0.01)
    decode.peers.ready = ready  # type: ignore[method-assign]
    await until(lambda: decode.keeper.is_usable("p"))


async def test_a_dead_engine_over_there_is_a_failed_probe(decode: Decode) -> None:
    decode.peers.failing["p"] = EngineDead()
    await decode.start("p")
    assert "its engine is dead" in decode.problems()["p"]


@pytest.mark.parametrize("problem", ["", "KV moves by tcp/lo"])
async def test_decode_takes_no_kv_over_a_link_that_is_not_usable(decode: Decode, problem: str) -> None:
    """A frontend may not know yet that it is not."""
    decode.engine.transport_watch.by_peer = {"p": TransportEvidence("tcp/lo", problem)}
    await decode.start("p", "q")
    request = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={})
    await decode.peers.begin_probe("p")
    descriptor = await decode.peers.prefill(request, "p")
    released: list[TransferDescriptor] = []

    async def receive(*_: object) -> TransferDescriptor:
        return descriptor

    async def release(descriptor: TransferDescriptor) -> None:
        released.append(descriptor)

    worker: Any = SimpleNamespace(
        _handoffs=SimpleNamespace(receive=receive),
        _config=SimpleNamespace(limits=SimpleNamespace(prefill_timeout_s=1)),
        _links=decode.keeper,
        _release=release,
        kv_format=FORMAT,
    )
    channel: Any = SimpleNamespace(id="c")
    found = await DecodeHalf._receive(worker, channel, 0, request)
    assert found == ((None, "transport_refused") if problem else (descriptor, ""))
    assert released == ([descriptor] if problem else [])


@pytest.mark.parametrize(("prefill", "own"), [(OTHER, FORMAT), (FORMAT, OTHER)], ids=["newer prefill", "newer decode"])
async def test_replicas_of_two_versions_pair_up_with_their_own_kind(
    decode: Decode, prefill: KvFormat, own: KvFormat
) -> None:
    decode.peers.formats = {"p": prefill, "q": own}
    decode.kv_format = own
    await decode.start("p", "q")
    there, here = prefill.engine_version, own.engine_version
    problem = f"KV of another kind: engine_version is {there} at prefill and {here} at decode"
    assert decode.problems() == {"p": f"the probe failed: {problem}", "q": ""}
    assert decode.peers.abandoned == ["p"]
    assert len(decode.engine.lengths) == 3, "no KV of p has been read"


async def test_a_prefill_replica_that_is_replaced_by_one_that_fits_is_used(decode: Decode) -> None:
    decode.peers.formats = {"p": None}
    await decode.start("p")
    assert "older version" in decode.problems()["p"]
    decode.peers.become("q")
    await until(lambda: decode.problems() == {"q": ""})


@pytest.mark.parametrize("told", [OTHER, None], ids=["another version", "an older version of Baton"])
async def test_decode_takes_no_kv_that_does_not_fit(decode: Decode, told: KvFormat | None) -> None:
    """The replica may have been replaced under the same name, or the frontend may know no links yet."""
    await decode.start("p")
    request = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={})
    await decode.peers.begin_probe("p")
    descriptor = seal(msgspec.structs.replace(await decode.peers.prefill(request, "p"), kv_format=told), request)
    released: list[TransferDescriptor] = []

    async def receive(*_: object) -> TransferDescriptor:
        return descriptor

    async def release(_: str, descriptor: TransferDescriptor) -> None:
        released.append(descriptor)

    worker: Any = SimpleNamespace(
        _handoffs=SimpleNamespace(receive=receive),
        _config=SimpleNamespace(limits=SimpleNamespace(prefill_timeout_s=1)),
        _links=decode.keeper,
        _engine=SimpleNamespace(release=release),
        _info=INFO,
        kv_format=FORMAT,
    )
    worker._release = partial(DecodeHalf._release, worker)
    channel: Any = SimpleNamespace(id="c")
    assert await DecodeHalf._receive(worker, channel, 0, request) == (None, "incompatible_kv")
    assert released == [descriptor]
    worker._info = msgspec.structs.replace(INFO, engine="another")
    assert await DecodeHalf._receive(worker, channel, 0, request) == (None, "incompatible_kv")
    assert released == [descriptor], "another engine's descriptor is not given to this one"


async def test_decode_replicas_probe_one_prefill_replica_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = ProbeTurns()
    await turns.begin("d0")
    second = asyncio.create_task(turns.begin("d1"))
    await asyncio.sleep(0)
    assert not second.done()
    assert turns.end("d0")
    await second
    assert not turns.end("d0")
    assert turns.end("d1")


async def test_a_turn_ends_if_whoever_has_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.replica.prefill.SILENT_S", 0.1)
    turns = ProbeTurns()
    await turns.begin("d0")
    async with asyncio.timeout(5):
        await turns.begin("d1")
    assert not turns.end("d0")
    assert turns.end("d1")


async def test_a_turn_lasts_while_whoever_has_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.replica.prefill.SILENT_S", 1.0)
    turns, loop = ProbeTurns(), asyncio.get_running_loop()
    await turns.begin("d0")
    await asyncio.sleep(0.2)
    turns.keep("d1")  # it has none
    turns.keep("d0")
    kept_at = loop.time()
    async with asyncio.timeout(10):
        await turns.begin("d1")
    assert loop.time() - kept_at > 0.95
    turns.end("d1")


async def test_a_turn_that_nobody_waits_for_any_more_is_not_taken() -> None:
    turns = ProbeTurns()
    await turns.begin("d0")
    second = asyncio.create_task(turns.begin("d1"))
    await asyncio.sleep(0)
    assert not turns.end("d1")
    assert turns.end("d0")
    with pytest.raises(PrefillFailed, match="withdrawn"):
        await second
    async with asyncio.timeout(5):
        await turns.begin("d2")
    assert turns.end("d2")


async def test_stopping_ends_a_probe_that_is_under_way(decode: Decode) -> None:
    await decode.start()
    decode.peers.hung.add("p")
    decode.peers.become("p")
    await until(lambda: decode.peers.probing == ["p"])
    async with asyncio.timeout(5):
        await decode.background.stop()
    assert (decode.peers.abandoned, decode.peers.probing) == (["p"], [])


async def test_kv_of_a_replica_that_drains_is_still_taken(decode: Decode) -> None:
    decode.peers.failing["q"] = PrefillFailed("broken")
    await decode.start("p", "q")
    decode.peers.become()
    await until(lambda: decode.problems() == {})
    assert decode.keeper.is_usable("p")
    assert not decode.keeper.is_usable("q")


async def test_a_probe_that_fails_in_an_unforeseen_way_leaves_the_others(decode: Decode) -> None:
    decode.peers.failing["p"] = OSError("the log is full")
    await decode.start("p", "q")
    assert decode.problems() == {"p": "the probe failed: OSError('the log is full')", "q": ""}
