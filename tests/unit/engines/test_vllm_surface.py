"""vLLM has the names that Baton uses of it, and still needs what Baton does for it.

A test here that fails after an update of vLLM says what to look at: a detour that can go, or one that leads nowhere.
"""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines import vllm_surface
from app.engines.vllm_surface import COUNTED, ConnectorStats, check_environment, check_names, rejection
from app.messages import TransferDescriptor
from app.upstream import UpstreamChanged

HANDOFF = TransferDescriptor(
    engine="vllm",
    replica_id="prefill",
    request_id="r",
    prompt_tokens=50,
    cached_tokens=0,
    ready_at=time.time(),
    lease_s=30,
    params={"remote_request_id": "r-1", "do_remote_prefill": True, "remote_block_ids": [[1, 2]]},
)


def test_the_installed_vllm_has_every_name() -> None:
    check_names(is_disaggregated=True)


def test_a_field_that_is_gone_is_said_when_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.v1.metrics import stats

    class Renamed:
        num_running_reqs = num_waiting_reqs = kv_connector_stats = 0

    monkeypatch.setattr(stats, "SchedulerStats", Renamed)
    with pytest.raises(UpstreamChanged, match=f"^vllm {vllm.__version__} .*has no kv_cache_usage"):
        check_names(is_disaggregated=False)


def test_a_count_that_the_connector_no_longer_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_surface, "COUNTED", (*COUNTED, "num_of_old"))
    with pytest.raises(UpstreamChanged, match="does not count num_of_old"):
        check_names(is_disaggregated=True)


def test_an_environment_variable_that_vllm_does_not_read_is_said() -> None:
    with pytest.raises(UpstreamChanged, match="no environment variable VLLM_OF_OLD"):
        check_environment(["OMP_NUM_THREADS", "VLLM_NO_USAGE_STATS", "VLLM_OF_OLD"])


def test_what_the_connector_counts_is_added_up() -> None:
    stats = ConnectorStats()
    stats.add({"transfer_duration": [0.5, 0.25], "bytes_transferred": [10, 20], "post_duration": [1.0]})
    stats.add({"transfer_duration": [], "num_failed_handshakes": [1]})
    assert stats == ConnectorStats(
        num_transfers=2, transfer_duration=0.75, bytes_transferred=30, num_failed_handshakes=1
    )


async def test_a_rejection_is_what_vllm_itself_sends() -> None:
    """`rejection` can go once vLLM's client of an engine core has a call for it; AsyncLLM has one."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    sent: list[Any] = []

    async def add_request_async(request: Any) -> None:
        sent.append(request)

    llm: Any = SimpleNamespace(engine_core=SimpleNamespace(add_request_async=add_request_async))
    await AsyncLLM.notify_kv_transfer_request_rejected(llm, "release-r-1", HANDOFF.params)
    ours: Any = rejection(HANDOFF)
    ours.arrival_time = sent[0].arrival_time
    assert ours == sent[0]
    assert not [name for name in dir(EngineCoreClient) if "reject" in name]


def test_vllm_aborts_a_rejection_at_once() -> None:
    from vllm.v1.engine.core import EngineCore

    calls: list[Any] = []
    core: Any = SimpleNamespace(
        scheduler=SimpleNamespace(add_request=lambda request: calls.append("add"), get_ec_connector=lambda: None),
        abort_requests=lambda ids: calls.append(ids),
        get_supported_tasks=lambda: ("generate",),
    )
    request: Any = SimpleNamespace(
        request_id="release-r-1",
        abort_immediately=True,
        pooling_params=None,
        kv_transfer_params=None,
        ec_transfer_params=None,
    )
    EngineCore.add_request(core, request)
    assert calls == ["add", ["release-r-1"]]


def test_a_spinning_wait_of_vllm_goes_by_sched_yield(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cpu_waits` patches ``os.sched_yield``; that can go once vLLM's queue does not spin after each message."""
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import shm_broadcast

    yields: list[None] = []
    monkeypatch.setattr("os.sched_yield", lambda: yields.append(None))
    utils.sched_yield()
    assert yields == [None]
    assert shm_broadcast.sched_yield is utils.sched_yield
    spinning: Any = SimpleNamespace(is_reader=True, last_read=time.monotonic(), busy_loop_s=1.0)
    shm_broadcast.SpinCondition.wait(spinning)
    assert yields == [None, None]
    assert inspect.signature(shm_broadcast.SpinCondition).parameters["busy_loop_s"].default > 0
