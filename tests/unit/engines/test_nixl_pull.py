"""The plug-in of decode engines does what it says on the installed vLLM, which still does not do it by itself."""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines.plugins import nixl_pull
from app.engines.vllm_surface import PullTimes, pull_times
from tests.unit.engines.forked import run

PROGRAM = """
import json, time
from types import SimpleNamespace
from app.engines.plugins import nixl_pull
nixl_pull.register()
nixl_pull.register()
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats
from vllm.v1.engine import core

scheduler = SimpleNamespace(_get_remote_prefill_token_count=lambda count: count, kv_recompute_threshold=0)
def ask(num_tokens, num_computed, **params):
    request = SimpleNamespace(
        request_id="r", prompt_token_ids=[1] * num_tokens, num_prompt_tokens=num_tokens, kv_transfer_params=params
    )
    return NixlPullConnectorScheduler.get_num_new_matched_tokens(scheduler, request, num_computed)
matched = [
    ask(33, 0, do_remote_prefill=True, remote_num_tokens=32),
    ask(33, 16, do_remote_prefill=True, remote_num_tokens=32),
    ask(33, 32, do_remote_prefill=True, remote_num_tokens=32),
    ask(32, 0, do_remote_prefill=True, remote_num_tokens=32),
    ask(32, 0, do_remote_prefill=True),
    ask(32, 0),
]

began = time.perf_counter()
for _ in range(20):
    core.time.sleep(0.02)
slept = [time.perf_counter() - began, core.time.monotonic() > 0]

worker = NixlPullConnectorWorker.__new__(NixlPullConnectorWorker)
worker.xfer_stats = NixlKVConnectorStats()
worker._invalid_remote_engines = {"gone"}
worker._failed_recv_reqs = worker._recv_failures = set()
worker._handle_failed_transfer = lambda *arguments, **more: True
meta = SimpleNamespace(remote=SimpleNamespace(engine_id="gone"), local_block_ids=())
worker.transfer_topo = object()
worker._recving_metadata = {"r": meta}
worker._read_blocks_for_req("r", meta)
worker._read_blocks_for_req("r", meta)
worker._pop_done_transfers({"r": [], "unknown": []})
told = worker.xfer_stats.clone_and_reset().data
again = NixlKVConnectorStats().aggregate(NixlKVConnectorStats(data={**told, "num_failed_transfers": [1]})).data
times = [each["baton_pull_times"] for each in (told, again, worker.xfer_stats.data)]

print(json.dumps({"matched": matched, "slept": slept, "times": times}))
"""


@pytest.fixture(scope="module")
def patched() -> Any:
    """What the program says with the plug-in loaded."""
    return run(PROGRAM, nixl_pull.environment("cuda"))


def test_only_what_prefill_holds_is_pulled(patched: Any) -> None:
    assert patched["matched"] == [[32, True], [16, True], [0, False], [32, True], [32, True], [0, False]]


def test_vllm_itself_asks_for_the_whole_prompt() -> None:
    """Else `_pull_what_is_held` can go."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    scheduler: Any = SimpleNamespace(_get_remote_prefill_token_count=lambda count: count, kv_recompute_threshold=0)
    params = {"do_remote_prefill": True, "remote_num_tokens": 32}
    request: Any = SimpleNamespace(request_id="r", prompt_token_ids=[1] * 33, kv_transfer_params=params)
    assert NixlPullConnectorScheduler.get_num_new_matched_tokens(scheduler, request, 0) == (33, True)


def test_an_engine_core_on_a_gpu_looks_for_kv_often(patched: Any) -> None:
    slept_s, has_the_rest = patched["slept"]
    assert slept_s < 20 * 0.02
    assert has_the_rest
    assert nixl_pull.environment("cpu")[nixl_pull.SWITCH] != nixl_pull.POLL_QUICKLY


def test_vllm_sleeps_for_a_millisecond_while_requests_wait_for_kv() -> None:
    """Else `_poll_quickly` can go."""
    from vllm.v1.engine.core import EngineCoreProc

    assert "time.sleep(0.001)" in inspect.getsource(EngineCoreProc._process_engine_step)


def test_the_times_of_a_pull_travel_with_the_connectors_counts(patched: Any) -> None:
    told, aggregated, left = patched["times"]
    ((request_id, began, posted, done),) = told
    assert request_id == "r"
    assert 0 < began < posted < done < time.monotonic()
    assert (aggregated, left) == (told, [])


def test_ranks_that_pull_together_count_as_one_pull() -> None:
    lists = {nixl_pull.TIMES: [["r", 1.0, 2.0, 3.0], ["s", 5.0, 6.0, 7.0], ["r", 1.5, 2.5, 2.9]]}
    assert pull_times(lists) == {"r": PullTimes(1.0, 2.5, 3.0), "s": PullTimes(5.0, 6.0, 7.0)}
    assert pull_times({"transfer_duration": [0.1]}) == {}


def test_nothing_is_patched_in_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import core

    monkeypatch.delenv(nixl_pull.SWITCH, raising=False)
    nixl_pull.register()
    assert core.time is time
