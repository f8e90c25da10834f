"""Lets a vLLM decode engine know whether KV was still prefill's when it had read it.

NIXL reads prefill's memory without prefill's doing.  When the lease on a prompt's KV is over, prefill gives the blocks
to other requests.  A decode engine that reads later, because it stood still or its queue was long, gets KV of other
prompts; vLLM's prefill then logs "Potentially invalid KV blocks", and decode never hears of it.  So here:

1. Prefill says until when it keeps the blocks, by its own clock, in ``remote_blocks_expiry_time``.  vLLM has that field
   for another purpose (reads of decode's KV), and leaves it empty in what prefill gives to decode.
2. Decode asks prefill what its clock shows, at the port that answers NIXL's handshakes, and adds what has passed since
   by decode's own clock (`PeerClock`).  So no two machines' clocks are compared, nor does it matter how long a message
   took: all that can be wrong makes prefill's clock seem later than it is.
3. When a read has ended and prefill's clock may show more than that time, or prefill does not answer, the read counts
   as failed.  vLLM then computes the prompt itself (``kv_load_failure_policy``).

The question is on its way while the KV is being read, and its answer serves for TRUSTED_S, so this takes no time.

vLLM renews the lease by messages that decode sends while requests wait there.  Nobody tells decode whether they came
in time, so they do not count here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import msgspec

from app.upstream import Patch, check_parameters, check_uses

logger = logging.getLogger("vllm.baton.lease")  # vLLM sets up what is below ``vllm``

LATE_READS = "baton_late_reads"
"""The connector's list of the ids of requests whose reads ended too late.  With tensor parallelism each rank adds."""
LEASE = "baton_lease"
TRUSTED_S = 10.0
"""How long prefill's answer serves."""
DRIFT = 0.1
"""By how much a clock may run faster than the other: chrony corrects one by up to 8.3 % (``maxslewrate``)."""
ANSWER_TIMEOUT_S = 2.0
MAX_QUESTIONS = 4
"""How many prefill engines are asked at once."""


class PeerClock:
    """What another process's monotonic clock shows at most."""

    def __init__(self, ask: Callable[[], float], executor: Executor) -> None:
        """`ask` returns what it shows, or raises; `executor` runs it."""
        self._ask = ask
        self._executor = executor
        self._answer: Future[tuple[float, float]] | None = None
        self._asked_at = self._trusted_until = -math.inf
        self._told = math.inf

    def latest(self, at: float) -> float | None:
        """Return what it showed at most at a time of this process's monotonic clock that is not in the future.

        None while that is not known; then it is being asked.  Infinite if it does not answer.
        """
        if self._answer is not None and self._answer.done():
            self._take(self._answer)
            self._answer = None
        if at <= self._trusted_until:
            return self._told + max(0.0, at - self._asked_at) * (1 + DRIFT)
        if self._answer is None:
            self._answer = self._executor.submit(self._timed_ask)
        return None

    def _timed_ask(self) -> tuple[float, float]:
        asked_at = time.monotonic()
        return asked_at, self._ask()

    def _take(self, answer: Future[tuple[float, float]]) -> None:
        try:
            self._asked_at, self._told = answer.result()
            self._trusted_until = self._asked_at + TRUSTED_S
        except Exception as error:  # noqa: BLE001  whatever it is, what was read until now cannot be judged
            logger.warning("a prefill engine does not say what its clock shows: %r", error)
            self._told, self._trusted_until = math.inf, time.monotonic()


class Lease(msgspec.Struct, frozen=True):
    """How long a prefill engine keeps the KV of one request."""

    clock: PeerClock
    """The clock of that engine."""
    until: float | None
    """What it shows when the lease ends; None if the engine does not say."""


class Leases:
    """The leases on the KV that one decode process is reading."""

    def __init__(self, ask: Callable[[str, int], float]) -> None:
        """`ask` returns what the clock of the prefill engine at a host and port shows, or raises."""
        self._ask = ask
        self._executor = ThreadPoolExecutor(MAX_QUESTIONS, thread_name_prefix="baton-lease")
        self._clocks: dict[str, PeerClock] = {}
        self._ended: dict[str, tuple[Lease, float]] = {}
        """The reads that have ended and are not judged yet, by request: the lease, and when it was noticed."""

    def find(self, engine_id: str, host: str, port: int, until: float | None) -> Lease:
        """Return the lease on KV of a prefill engine, a read of which begins."""
        if engine_id not in self._clocks:
            self._clocks[engine_id] = PeerClock(lambda: self._ask(host, port), self._executor)
        clock = self._clocks[engine_id]
        clock.latest(time.monotonic())
        return Lease(clock, until)

    def end(self, request_id: str, lease: Lease) -> None:
        """Note that a read has ended; `judge` will tell about it."""
        self._ended[request_id] = lease, time.monotonic()

    def judge(self) -> tuple[set[str], set[str]]:
        """Return the ended reads that are good and those that may have come too late, each once."""
        good: set[str] = set()
        late: set[str] = set()
        for request_id, (lease, ended_at) in list(self._ended.items()):
            latest = lease.clock.latest(ended_at)
            if latest is None:
                continue
            del self._ended[request_id]
            (good if lease.until is not None and latest < lease.until else late).add(request_id)
        return good, late


def ask_clock(host: str, port: int) -> float:
    """Return what the monotonic clock of the engine shows that answers NIXL's handshakes at `host` and `port`.

    Raises zmq's errors, and those of msgspec.
    """
    import zmq
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
    from vllm.utils.network_utils import make_zmq_path

    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", host, port)) as socket:
        socket.setsockopt(zmq.RCVTIMEO, round(1000 * ANSWER_TIMEOUT_S))
        socket.send(msgspec.msgpack.encode((GET_META_MSG, 0, 0)))
        _, told = socket.recv_multipart()
        return msgspec.msgpack.decode(told, type=float)


def tell_expiry() -> None:
    """Have a prefill engine say until when it keeps KV.

    The time is that of the engine core, in which the port for handshakes is too; a worker frees the blocks no earlier.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    patch = Patch(NixlPullConnectorScheduler, "request_finished", "self", "request", "block_ids")
    check_uses(patch.original, "_reqs_need_send")

    def request_finished(self: Any, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        is_kept, params = patch.original(self, request, block_ids)
        if is_kept and params is not None:
            params["remote_blocks_expiry_time"] = self._reqs_need_send[request.request_id]
        return is_kept, params

    patch.apply(request_finished)


def refuse_late_reads() -> None:
    """Have a decode engine compute the prompts whose KV it may have read too late."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    for name in ("send_multipart", "perf_counter"):
        check_uses(NixlBaseConnectorScheduler._nixl_handshake_listener, name)
    check_uses(NixlBaseConnectorWorker.__init__, "_recving_metadata")
    for name in ("_pop_done_transfers", "_recv_failures"):
        check_uses(NixlBaseConnectorWorker.get_transfer_results, name)
    check_parameters(NixlKVConnectorStats.record_kv_expired_req, "self")
    reset = Patch(NixlKVConnectorStats, "reset", "self")
    read = Patch(NixlPullConnectorWorker, "_read_blocks_for_req", "self", "req_id", "meta")
    pop_done = Patch(NixlPullConnectorWorker, "_pop_done_transfers", "self", "transfers")
    leases = Leases(ask_clock)

    def reset_all(self: Any) -> None:
        reset.original(self)
        self.data[LATE_READS] = []

    def read_blocks_for_req(self: Any, req_id: str, meta: Any) -> None:
        if any(meta.local_block_ids):  # else there is nothing to read
            remote = meta.remote
            lease = leases.find(remote.engine_id, remote.host, remote.port, remote.blocks_expiry_time)
            setattr(meta, LEASE, lease)
        read.original(self, req_id, meta)

    def pop_done_transfers(self: Any, transfers: Any) -> tuple[set[str], set[str]]:
        done, failed = pop_done.original(self, transfers)
        unjudged = set()
        for req_id in done - failed - self._recv_failures:
            if (lease := getattr(self._recving_metadata.get(req_id), LEASE, None)) is not None:
                leases.end(req_id, lease)
                unjudged.add(req_id)
        good, late = leases.judge()
        for req_id in late:
            logger.warning("The lease on the KV of request %s was over when it had been read.", req_id)
            self.xfer_stats.record_kv_expired_req()
            self.xfer_stats.data[LATE_READS].append(req_id)
        return (done - unjudged) | good, failed | late

    reset.apply(reset_all)
    read.apply(read_blocks_for_req)
    pop_done.apply(pop_done_transfers)
