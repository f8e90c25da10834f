"""KV that decode has read counts only if prefill's clock, as far as decode knows it, is before the lease's end."""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from app.engines.plugins import nixl_lease, nixl_pull
from app.engines.plugins.nixl_lease import DRIFT, TRUSTED_S, Leases, PeerClock, ask_clock
from app.engines.vllm_surface import late_reads
from app.ports import free_port
from tests.unit.engines.forked import run

AHEAD_S = 5000.0
"""By how much prefill's clock is ahead of decode's: they are of two machines."""


class World:
    """The time, and a prefill engine that answers when told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.questions: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.is_reachable = True

    def monotonic(self) -> float:
        return self.now

    def ask(self, *_: Any) -> float:
        if not self.is_reachable:
            raise TimeoutError
        return self.now + AHEAD_S

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.questions.append((function, future))
        return future

    def answer(self, *, takes_s: float = 0.0) -> None:
        """Answer all questions, after a time on the way there."""
        questions, self.questions = self.questions, []
        for function, future in questions:
            try:
                asked_at, told = function()
                future.set_result((asked_at, told + takes_s))
            except Exception as error:  # noqa: BLE001  as an executor does
                future.set_exception(error)
        self.now += takes_s

    def prefills(self, seconds: float) -> float:
        """What prefill's clock shows that many seconds from now."""
        return self.now + AHEAD_S + seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(nixl_lease, "time", world)
    return world


@pytest.fixture
def clock(world: World) -> PeerClock:
    executor: Any = world
    return PeerClock(world.ask, executor)


@pytest.fixture
def leases(world: World, monkeypatch: pytest.MonkeyPatch) -> Leases:
    monkeypatch.setattr(nixl_lease, "ThreadPoolExecutor", lambda *_, **__: world)
    return Leases(world.ask)


def test_a_clock_is_asked_once_for_a_while(clock: PeerClock, world: World) -> None:
    assert clock.latest(world.now) is None
    assert clock.latest(world.now) is None
    assert len(world.questions) == 1
    world.answer()
    assert clock.latest(world.now) == world.prefills(0)
    world.now += TRUSTED_S
    assert clock.latest(world.now) == pytest.approx(world.prefills(TRUSTED_S * DRIFT))
    assert not world.questions
    world.now += 0.1
    assert clock.latest(world.now) is None
    assert len(world.questions) == 1


def test_a_slow_answer_makes_the_clock_seem_later_and_never_earlier(clock: PeerClock, world: World) -> None:
    clock.latest(world.now)
    world.answer(takes_s=3.0)
    latest = clock.latest(world.now)
    assert latest is not None
    assert latest >= world.prefills(0)


@pytest.mark.parametrize(("reads_s", "is_good"), [(1.0, True), (9.9, True), (11.5, True), (12.0, False), (40.0, False)])
def test_what_was_read_before_the_lease_ended_is_good(
    leases: Leases, world: World, reads_s: float, is_good: bool
) -> None:
    lease = leases.find("prefill", "10.0.0.1", 5600, world.prefills(12.0))
    world.answer()
    world.now += reads_s
    leases.end("r", lease)
    good, late = leases.judge()
    if world.questions:  # the answer was too old
        assert (good, late) == (set(), set())
        world.answer()
        good, late = leases.judge()
    assert (good, late) == (({"r"}, set()) if is_good else (set(), {"r"}))
    assert leases.judge() == (set(), set()), "each once"


def test_nothing_is_judged_before_prefill_has_answered(leases: Leases, world: World) -> None:
    leases.end("r", leases.find("prefill", "10.0.0.1", 5600, world.prefills(12.0)))
    assert leases.judge() == (set(), set())
    world.answer()
    assert leases.judge() == ({"r"}, set())


def test_a_descriptor_that_was_under_way_for_long_is_late_though_decode_did_not_wait(
    leases: Leases, world: World
) -> None:
    """Decode cannot know by its own clock alone."""
    lease = leases.find("prefill", "10.0.0.1", 5600, world.prefills(-1.0))
    world.answer()
    leases.end("r", lease)
    assert leases.judge() == (set(), {"r"})


def test_without_an_answer_kv_is_not_used(leases: Leases, world: World) -> None:
    world.is_reachable = False
    leases.end("r", leases.find("prefill", "10.0.0.1", 5600, world.prefills(12.0)))
    world.answer()
    assert leases.judge() == (set(), {"r"})
    world.is_reachable = True
    world.now += 0.1
    leases.end("next", leases.find("prefill", "10.0.0.1", 5600, world.prefills(12.0)))
    world.answer()
    assert leases.judge() == ({"next"}, set())


def test_kv_without_a_lease_is_not_used(leases: Leases, world: World) -> None:
    lease = leases.find("prefill", "10.0.0.1", 5600, None)
    world.answer()
    leases.end("r", lease)
    assert leases.judge() == (set(), {"r"})


def test_each_prefill_engine_has_its_own_clock(leases: Leases, world: World) -> None:
    one = leases.find("one", "10.0.0.1", 5600, math.inf)
    two = leases.find("two", "10.0.0.2", 5600, math.inf)
    again = leases.find("one", "10.0.0.1", 5600, math.inf)
    assert one.clock is again.clock is not two.clock
    assert len(world.questions) == 2


@pytest.fixture
def listener() -> Iterator[int]:
    """The port of vLLM's own answers to handshakes."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler

    port, ready, stop = free_port(), threading.Event(), threading.Event()
    arguments = ({(0, 0): b"metadata"}, ready, stop, "127.0.0.1", port)
    thread = threading.Thread(target=NixlBaseConnectorScheduler._nixl_handshake_listener, args=arguments)
    thread.start()
    assert ready.wait(10)
    yield port
    stop.set()
    thread.join()


def test_vllm_says_what_its_clock_shows(listener: int) -> None:
    before = time.perf_counter()
    assert before < ask_clock("127.0.0.1", listener) < time.perf_counter()


def test_a_port_that_nobody_answers_at_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq

    monkeypatch.setattr(nixl_lease, "ANSWER_TIMEOUT_S", 0.1)
    with pytest.raises(zmq.Again):
        ask_clock("127.0.0.1", free_port())


PREFILL = """
import json
from types import SimpleNamespace
from app.engines.plugins import nixl_pull
nixl_pull.register()
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.v1.request import RequestStatus

scheduler = NixlPullConnectorScheduler.__new__(NixlPullConnectorScheduler)
vars(scheduler).update(
    is_bidirectional_kv_xfer_enabled=False, _kv_lease_duration=12, _reqs_need_send={}, _is_hma_required=False,
    _stop_heartbeat=lambda request_id: None, get_exchange_clipped_blocks=lambda block_ids: block_ids,
    engine_id="prefill", side_channel_host="10.0.0.1", side_channel_port=5600, transfer_tp_size=1,
    vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(
        decode_context_parallel_size=1, pipeline_parallel_size=1)),
)
request = SimpleNamespace(
    request_id="r", status=RequestStatus.FINISHED_LENGTH_CAPPED, num_computed_tokens=32,
    kv_transfer_params={"do_remote_decode": True},
)
_, params = scheduler.request_finished(request, ([1, 2],))
_, none_kept = scheduler.request_finished(request, ([],))
print(json.dumps([params["remote_blocks_expiry_time"], scheduler._reqs_need_send["r"],
                  none_kept["remote_blocks_expiry_time"]]))
"""

DECODE = """
import json, time
from types import SimpleNamespace
from app.engines.plugins import nixl_lease, nixl_pull
nixl_lease.ask_clock = lambda host, port: time.perf_counter()
nixl_pull.register()
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

worker = NixlPullConnectorWorker.__new__(NixlPullConnectorWorker)
worker.xfer_stats = NixlKVConnectorStats()
worker._invalid_remote_engines = {"prefill"}  # so that nothing is read
worker._recv_failures = {"failed before"}
worker._handle_failed_transfer = lambda *arguments, **more: True
worker.transfer_topo = object()
now = time.perf_counter()
untils = {"good": now + 60, "late": now - 1, "untold": None, "failed before": now - 1}
worker._recving_metadata = {}
for name, until in untils.items():
    remote = SimpleNamespace(engine_id="prefill", host="10.0.0.1", port=5600, blocks_expiry_time=until)
    worker._recving_metadata[name] = meta = SimpleNamespace(remote=remote, local_block_ids=([1],))
    worker._read_blocks_for_req(name, meta)
worker._recving_metadata["nothing to read"] = SimpleNamespace(remote=remote, local_block_ids=([],))
worker._read_blocks_for_req("nothing to read", worker._recving_metadata["nothing to read"])
transfers = {name: [] for name in worker._recving_metadata}
done, failed = worker._pop_done_transfers(transfers)
give_up_at = time.monotonic() + 10
while len(done | failed) < len(worker._recving_metadata) and time.monotonic() < give_up_at:
    more = worker._pop_done_transfers(transfers)
    done, failed = done | more[0], failed | more[1]
told = worker.xfer_stats.clone_and_reset().data
print(json.dumps([sorted(done), sorted(failed), sorted(told["baton_late_reads"]), sum(told["num_kv_expired_reqs"])]))
"""


def test_prefill_says_until_when_it_keeps_kv() -> None:
    until, is_kept_until, of_nothing = run(PREFILL, nixl_pull.environment("cpu"))
    assert until == is_kept_until
    assert of_nothing is None


def test_reads_that_came_too_late_have_failed() -> None:
    done, failed, told, num_expired = run(DECODE, nixl_pull.environment("cpu"))
    assert done == ["failed before", "good", "nothing to read"]
    assert failed == told == ["late", "untold"]
    assert num_expired == 2


def test_the_late_reads_are_told_with_the_connectors_counts() -> None:
    assert late_reads({nixl_lease.LATE_READS: ["r", "s", "r"]}) == {"r", "s"}
    assert late_reads({"transfer_duration": [0.1]}) == set()


def test_vllms_prefill_does_not_say_it_by_itself() -> None:
    """Else `tell_expiry` can go."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    source = inspect.getsource(NixlPullConnectorScheduler.request_finished)
    assert "if is_d_node:\n                # D blocks expiry time" in source


def test_vllms_decode_does_not_check_it_by_itself() -> None:
    """Else `refuse_late_reads` can go."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    assert "expiry" not in inspect.getsource(NixlBaseConnectorWorker._pop_done_transfers)
