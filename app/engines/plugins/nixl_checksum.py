"""Lets a vLLM decode engine see whether the KV that it has pulled is what prefill computed.

Nothing that moves KV says so: a network protects what is on the wire, not what a driver, a stale registration or a
wrong address put there.  So for requests that are sampled (``transfer.checksum_rate``):

1. When prefill has computed the prompt, and holds its KV, the adapter asks each of the engine's workers for a number
   for each block over all layers (`SUMS_METHOD`, kv_sums.py).  They travel in the descriptor's `params` (`CHECKSUMS`).
2. When decode has read the blocks, its workers compute the same of where they have arrived.  If one differs, the read
   counts as failed, and vLLM computes the prompt itself, as after a lease (nixl_lease.py).

Each rank compares with the rank that it has read from, and only if the two ends store KV alike (`layout`): with the
same parallelism and the same bytes in each block of each layer.  Otherwise there is nothing to compare, as vLLM cuts or
reorders what it reads.  If decode has the beginning of the prompt, it has read, and compares, the last blocks only.

Requests without checksums cost one look-up.  A request with them occupies either engine's loop for as long as its sums
take (docs/decisions/0029-kv-checksum.md).
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from app.upstream import Patch, check_parameters, check_uses

logger = logging.getLogger("vllm.baton.checksum")  # vLLM sets up what is below ``vllm``

CHECKSUMS = "baton_checksums"
"""The key in ``kv_transfer_params``: for each rank [layout, [sum of each block]].  Empty if nobody could make them."""
CHECKS = "baton_kv_checks"
"""The connector's list of what was compared.  An element is [request id, result, positions of the blocks that differ],
where the last block of the prompt has the position -1.  With tensor parallelism each rank adds one."""
SUMS_METHOD = "baton_kv_sums"
"""The method that `offer_sums` gives to vLLM's workers."""

Result = Literal["match", "mismatch", "skipped"]


def layout(worker: Any) -> str:
    """Return what the bytes of a block depend on; empty if it is more than is written here.  `worker` is NIXL's.

    Not compared are hybrid models, which have several kinds of blocks, blocks whose tokens are spread over ranks, and
    KV in host memory beside a GPU's.
    """
    is_hybrid = len(worker.kv_cache_config.transfer_groups) > 1 or worker._has_mamba
    is_sliced = worker.pcp_size > 1 or worker.dcp_size > 1
    if is_hybrid or is_sliced or worker.use_host_buffer or worker._mixed_mem_types:
        return ""
    parts = (
        worker.world_size,
        worker.kv_cache_layout,
        worker.vllm_config.cache_config.cache_dtype,
        worker.block_size,
        worker._physical_blocks_per_logical_kv_block,
        worker.block_len_per_layer,
    )
    return " ".join(map(str, parts))


def sums_of(worker: Any, block_ids: Any) -> list[int]:
    """Return the sums of blocks that vLLM's kernels know by these ids.  `worker` is NIXL's, with a `layout`."""
    from app.engines.plugins import kv_sums

    return kv_sums.block_sums(_layers(worker), block_ids)


def _layers(worker: Any) -> list[Any]:
    """Return what NIXL moves of each layer, as uint8 of shape [blocks, bytes]."""
    import torch

    layers = []
    for region, base in enumerate(worker.kv_caches_base_addr[worker.engine_id][worker.tp_rank]):
        cache = worker.device_kv_caches[worker.region_names[region]]
        storage = cache.untyped_storage()
        shape = worker.region_num_blocks[region], worker.block_len_per_layer[region]
        strides = worker.block_stride_per_layer[region], 1
        empty = torch.empty(0, dtype=torch.uint8, device=cache.device)
        layers.append(empty.set_(storage, base - storage.data_ptr(), shape, strides))
    return layers


def offer_sums() -> None:
    """Have a prefill engine's workers answer `SUMS_METHOD`."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.v1.worker.worker_base import WorkerBase

    _check_names()
    check_parameters(NixlBaseConnectorWorker._logical_to_kernel_block_ids, "self", "block_ids", "ratio")

    def baton_kv_sums(self: Any, block_ids: list[list[int]]) -> tuple[str, list[int]]:
        """Return the worker's layout and the sums of a request's blocks, which are given by group as vLLM does."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        worker: Any = get_kv_transfer_group().connector_worker
        if not (here := layout(worker)):
            return here, []
        ratio = worker._physical_blocks_per_logical_kv_block
        return here, sums_of(worker, worker._logical_to_kernel_block_ids(block_ids, ratio)[0])

    setattr(WorkerBase, SUMS_METHOD, baton_kv_sums)


def refuse_changed_kv() -> None:
    """Have a decode engine compute the prompts whose KV is not what prefill has."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    _check_names()
    for name in ("_pop_done_transfers", "_recv_failures"):
        check_uses(NixlBaseConnectorWorker.get_transfer_results, name)
    reset = Patch(NixlKVConnectorStats, "reset", "self")
    is_empty = Patch(NixlKVConnectorStats, "is_empty", "self")
    pop_done = Patch(NixlPullConnectorWorker, "_pop_done_transfers", "self", "transfers")
    receive = Patch(
        NixlConnectorMetadata,
        "add_new_req_to_recv",
        *("self", "request_id", "local_block_ids", "kv_transfer_params", "local_num_computed_blocks", "awaiting_kvs"),
    )

    def reset_all(self: Any) -> None:
        reset.original(self)
        self.data[CHECKS] = []

    def is_really_empty(self: Any) -> bool:
        return is_empty.original(self) and not self.data.get(CHECKS)

    def add_new_req_to_recv(
        self: Any, request_id: str, local_block_ids: Any, kv_transfer_params: Any, *arguments: Any, **more: Any
    ) -> None:
        receive.original(self, request_id, local_block_ids, kv_transfer_params, *arguments, **more)
        if (checksums := kv_transfer_params.get(CHECKSUMS)) is not None:
            setattr(self.reqs_to_recv[request_id], CHECKSUMS, checksums)

    def pop_done_transfers(self: Any, transfers: Any) -> tuple[set[str], set[str]]:
        done, failed = pop_done.original(self, transfers)
        changed = set()
        for req_id in done - failed - self._recv_failures:
            meta = self._recving_metadata.get(req_id)
            if (checksums := getattr(meta, CHECKSUMS, None)) is None:
                continue
            result, positions = compare(self, meta, checksums)
            self.xfer_stats.data[CHECKS].append([req_id, result, positions])
            if result == "mismatch":
                logger.error("The KV of request %s is not what prefill computed.", req_id)
                changed.add(req_id)
        return done - changed, failed | changed

    reset.apply(reset_all)
    is_empty.apply(is_really_empty)
    pop_done.apply(pop_done_transfers)
    receive.apply(add_new_req_to_recv)


def compare(worker: Any, meta: Any, checksums: list[Any]) -> tuple[Result, list[int]]:
    """Compare what has arrived with what prefill says of it.  Returns the result and which blocks differ (`CHECKS`)."""
    here = layout(worker)
    if not here or worker.tp_rank >= len(checksums) or checksums[worker.tp_rank][0] != here:
        return "skipped", []
    (block_ids,) = meta.local_physical_block_ids
    num_blocks = len(block_ids)
    expected = checksums[worker.tp_rank][1][-num_blocks:]
    if len(expected) != num_blocks:
        return "skipped", []
    pairs = enumerate(zip(sums_of(worker, block_ids), expected, strict=True))
    positions = [index - num_blocks for index, (found, computed) in pairs if found != computed]
    return ("mismatch" if positions else "match"), positions


def _check_names() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    for name in ("kv_cache_layout", "use_host_buffer", "_mixed_mem_types", "world_size", "pcp_size", "dcp_size"):
        check_uses(NixlBaseConnectorWorker.__init__, name)
    for name in ("region_names", "region_num_blocks", "block_len_per_layer", "block_stride_per_layer"):
        check_uses(NixlBaseConnectorWorker.register_kv_caches, name)
    for name in ("kv_caches_base_addr", "device_kv_caches", "transfer_groups", "_has_mamba"):
        check_uses(NixlBaseConnectorWorker.register_kv_caches, name)
