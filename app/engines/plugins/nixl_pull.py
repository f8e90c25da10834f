"""Makes a vLLM engine that decodes pull KV without waiting, and tells when each part of it happened.

It also puts nixl_lease.py and nixl_checksum.py into effect, for both ends: any engine may prefill now and decode later.

1. *Pull what prefill holds.*  When prefill has sampled the first token, that token is part of the prompt that the
   decode engine gets, and prefill does not hold its KV.  vLLM's NixlConnector would ask for the KV of the whole prompt,
   and for a block too many if the token begins one.  Here it asks for ``remote_num_tokens``, which vLLM's prefill
   already sends along and its decode ignores.
2. *Look for it often.*  While vLLM's engine core has nothing but requests that wait for KV, it sleeps for 1 ms between
   two looks, and it takes two or three looks from the end of a transfer to the step that uses it.  On a GPU machine
   POLL_S is enough for the threads that this sleep makes room for.  On a CPU the engines need the core themselves.
3. *Tell the times.*  The times of each request's pull travel with the counts that the connector reports anyway.

vLLM loads this as a general plug-in in each of its processes.  Each part can go once vLLM does the same;
tests/unit/engines/test_nixl_pull.py fails then.  All were still needed with vllm 0.32.0.
"""

from __future__ import annotations

import os
import time
from typing import Any

from app.engines.plugins import begins, nixl_checksum, nixl_lease
from app.upstream import Patch, check_attributes, check_uses, needed

SWITCH = "BATON_NIXL_PULL"
POLL_S = 100e-6
"""The time between two looks for KV on a GPU machine.  One look takes a vLLM engine core 0.3 to 0.5 ms."""
TIMES = "baton_pull_times"
"""The connector's list of times.  An element is [request id, began, posted, done] in seconds of the machine's monotonic
clock: when the connector took up the request, when its reads were under way (after the handshake, if the peer was new),
and when they were seen to be done.  With tensor parallelism each rank adds one."""

POLL_QUICKLY = "quick"


def environment(device: str) -> dict[str, str]:
    """Return the environment variables that switch it on in the processes of an engine."""
    return {SWITCH: POLL_QUICKLY if device == "cuda" else "1"}


def register() -> None:
    """vLLM general plug-in; does nothing without `environment`.  May be called again.

    Raises UpstreamChanged if what it patches is not there.
    """
    if not begins(SWITCH):
        return
    with needed("vllm", "tell until when prefill keeps KV"):
        nixl_lease.tell_expiry()
    with needed("vllm", "sum up the KV that prefill holds"):
        nixl_checksum.offer_sums()
    with needed("vllm", "pull the KV that prefill holds"):
        _pull_what_is_held()
    with needed("vllm", "tell how long pulling KV takes"):
        _tell_times()
    with needed("vllm", "refuse KV that was read too late"):
        nixl_lease.refuse_late_reads()
    with needed("vllm", "refuse KV that is not what prefill computed"):
        nixl_checksum.refuse_changed_kv()
    if os.environ[SWITCH] == POLL_QUICKLY:
        with needed("vllm", "look for KV often"):
            _poll_quickly()


def _pull_what_is_held() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    patch = Patch(NixlPullConnectorScheduler, "get_num_new_matched_tokens", "self", "request", "num_computed_tokens")

    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        count, is_async = patch.original(self, request, num_computed_tokens)
        params = request.kv_transfer_params or {}
        if is_async and params.get("do_remote_prefill") and (held := params.get("remote_num_tokens")):
            count = min(count, held - num_computed_tokens)
        return (count, is_async) if count > 0 else (0, False)

    patch.apply(get_num_new_matched_tokens)


def _tell_times() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    for name in ("xfer_stats", "_recving_metadata"):
        check_uses(NixlBaseConnectorWorker.__init__, name)
    reset = Patch(NixlKVConnectorStats, "reset", "self")
    read = Patch(NixlPullConnectorWorker, "_read_blocks_for_req", "self", "req_id", "meta")
    pop_done = Patch(NixlPullConnectorWorker, "_pop_done_transfers", "self", "transfers")

    def reset_all(self: Any) -> None:
        reset.original(self)
        self.data[TIMES] = []

    def read_blocks_for_req(self: Any, req_id: str, meta: Any) -> None:
        if not hasattr(meta, TIMES):
            setattr(meta, TIMES, [req_id, time.monotonic()])
        read.original(self, req_id, meta)
        getattr(meta, TIMES)[2:] = [time.monotonic()]

    def pop_done_transfers(self: Any, transfers: Any) -> Any:
        result = pop_done.original(self, transfers)
        for req_id in result[0]:
            if (times := getattr(self._recving_metadata.get(req_id), TIMES, None)) is not None:
                self.xfer_stats.data[TIMES].append([*times, time.monotonic()])
        return result

    reset.apply(reset_all)
    read.apply(read_blocks_for_req)
    pop_done.apply(pop_done_transfers)


class _QuickTime:
    """The module ``time``, whose `sleep` takes at most POLL_S."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, POLL_S))


def _poll_quickly() -> None:
    from vllm.v1.engine import core

    check_attributes(core, "time")
    check_uses(core.EngineCoreProc._process_engine_step, "sleep")
    core.time = _QuickTime()
