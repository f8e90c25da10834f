"""The plug-in compares what has arrived with what prefill computed, and only where the two can be compared."""

from __future__ import annotations

import inspect

import pytest

from app.engines.plugins import nixl_checksum, nixl_pull
from app.engines.vllm_surface import KvCheck, kv_checks
from tests.unit.engines.forked import run

WORKER = """
import copy, json, pickle
from types import SimpleNamespace
import torch
from app.engines.plugins import nixl_checksum, nixl_pull
nixl_pull.register()
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

BLOCKS, BYTES, LAYERS = 8, 32, 2

def worker(dtype=torch.uint8, **fields):
    '''A worker of NIXL's whose layers share a storage, block by block: [blocks, layers, bytes].'''
    made = NixlPullConnectorWorker.__new__(NixlPullConnectorWorker)
    storage = torch.randint(0, 256, (BLOCKS, LAYERS, BYTES), dtype=torch.uint8, generator=torch.manual_seed(1))
    caches = {f"layer.{index}": storage.view(dtype)[:, index] for index in range(LAYERS)}
    vars(made).update(
        storage=storage, engine_id="e", tp_rank=0, world_size=1, pcp_size=1, dcp_size=1, kv_cache_layout="LBHNC",
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="auto")),
        kv_cache_config=SimpleNamespace(transfer_groups=[SimpleNamespace(kv_cache_spec=object())]), block_size=16,
        use_host_buffer=False,
        _mixed_mem_types=False, _has_mamba=False, _physical_blocks_per_logical_kv_block=1, device_kv_caches=caches,
        region_names=list(caches), region_num_blocks=[BLOCKS] * LAYERS, block_len_per_layer=[BYTES] * LAYERS,
        block_stride_per_layer=[LAYERS * BYTES] * LAYERS, _recving_metadata={}, _recv_failures=set(),
        kv_caches_base_addr={"e": {0: [cache.data_ptr() for cache in caches.values()]}},
        xfer_stats=NixlKVConnectorStats(),
    )
    vars(made).update(fields)
    return made
"""

PREFILL = (
    WORKER
    + """
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.worker.worker_base import WorkerBase

def told(block_ids, **fields):
    kv_transfer_state._KV_CONNECTOR_AGENT = SimpleNamespace(connector_worker=worker(**fields))
    return getattr(WorkerBase, nixl_checksum.SUMS_METHOD)(None, block_ids)

layout, sums = told([[5, 2]])
split, split_sums = told([[1]], _physical_blocks_per_logical_kv_block=2)
plain = worker()

def of_bfloat16(change=None):
    '''Return the sums of some blocks with all that is odd in bfloat16, of which `change` makes something else.'''
    made = worker(torch.bfloat16)
    words = made.storage.view(torch.int16)
    words[:, :, :4] = torch.tensor([0x7FC0, 0x7FC1, -1, -0x8000], dtype=torch.int16)  # three NaNs and -0.0
    if change is not None:
        block, at, word = change
        words[block, 1, at] = word
    kv_transfer_state._KV_CONNECTOR_AGENT = SimpleNamespace(connector_worker=made)
    sums = getattr(WorkerBase, nixl_checksum.SUMS_METHOD)(None, [[6, 0, 3]])[1]
    made.device_kv_caches = {name: cache.view(torch.uint8) for name, cache in made.device_kv_caches.items()}
    assert made.storage.view(torch.bfloat16)[0, 0, :3].isnan().all()
    assert sums == nixl_checksum.sums_of(made, [6, 0, 3])  # its bytes are what counts
    return sums

def differing(change):
    return [block for block, one, other in zip([6, 0, 3], of_bfloat16(), of_bfloat16(change)) if one != other]

print(json.dumps({
    "sums": sums == nixl_checksum.sums_of(plain, [5, 2]) and len(set(sums)) == 2,
    "bfloat16": [differing(change) for change in (None, (0, 0, 0x7FC1), (3, 2, 0x7FC0), (6, 3, 0), (1, 0, 0))],
    "split": split != layout and split_sums == nixl_checksum.sums_of(plain, [2, 3]),
    "not made": [told([[5], [2]], kv_cache_config=SimpleNamespace(transfer_groups=[None, None])),
                 told([[5]], _has_mamba=True), told([[5]], use_host_buffer=True), told([[5]], dcp_size=2)],
    "layouts": len({layout, *(told([[1]], **each)[0] for each in (
        {"world_size": 2}, {"kv_cache_layout": "LBNHC"}, {"block_size": 32}, {"block_len_per_layer": [BYTES, 16]},
        {"vllm_config": SimpleNamespace(cache_config=SimpleNamespace(cache_dtype="fp8"))},
    ))}),
}))
"""
)

DECODE = (
    WORKER
    + """
def receive(name, block_ids, checksums):
    '''Take up a request as the scheduler and the worker do, and have it done.'''
    metadata = NixlConnectorMetadata()
    params = {"remote_block_ids": [[0]], "remote_engine_id": "p", "remote_request_id": "p", "remote_host": "h",
              "remote_port": 1}
    if checksums is not None:
        params[nixl_checksum.CHECKSUMS] = checksums
    metadata.add_new_req_to_recv(request_id=name, local_block_ids=(block_ids,), kv_transfer_params=params)
    (meta,) = pickle.loads(pickle.dumps(metadata)).reqs_to_recv.values()
    meta.local_physical_block_ids = meta.local_block_ids
    decode._recving_metadata[name] = meta

decode = worker()
here = nixl_checksum.layout(decode)
sums = nixl_checksum.sums_of(decode, [1, 2, 3, 4])
receive("right", [1, 2, 3, 4], [[here, sums]])
receive("only the end was read", [3, 4], [[here, sums]])
receive("blocks swapped", [1, 3, 2, 4], [[here, sums]])
receive("a block changed", [1, 5, 3, 4], [[here, sums]])
receive("not sampled", [1], None)
receive("failed before", [1, 5, 3, 4], [[here, sums]])
receive("no sums", [1], [])
receive("another layout", [1], [["other", sums]])
receive("fewer sums", [1, 2, 3, 4], [[here, sums[:3]]])
decode._recv_failures = {"failed before"}
done, failed = decode._pop_done_transfers({name: [] for name in decode._recving_metadata})
was_empty = decode.xfer_stats.is_empty()
told = decode.xfer_stats.clone_and_reset()
together = NixlKVConnectorStats().aggregate(told).data["baton_kv_checks"]
decode._recv_failures = set()
decode.tp_rank, decode.kv_caches_base_addr["e"][1] = 1, decode.kv_caches_base_addr["e"][0]
other_rank = [nixl_checksum.compare(decode, decode._recving_metadata["right"], ranks)
              for ranks in ([[here, sums]], [[here, [0] * 4], [here, sums]])]
print(json.dumps([sorted(done), sorted(failed), was_empty, told.data["baton_kv_checks"], together, other_rank,
                  decode.xfer_stats.is_empty()]))
"""
)


def test_prefills_workers_sum_up_the_blocks_of_a_request() -> None:
    found = run(PREFILL, nixl_pull.environment("cpu"))
    assert found["sums"]
    assert found["split"]
    # Another NaN, a NaN of the other sign, and 0.0 for -0.0; the last change is in a block that the request has not.
    assert found["bfloat16"] == [[], [0], [3], [6], []]
    assert found["not made"] == [["", []]] * 4
    assert found["layouts"] == 6


def test_reads_of_kv_that_has_changed_have_failed() -> None:
    done, failed, was_empty, told, together, other_rank, is_empty = run(DECODE, nixl_pull.environment("cpu"))
    assert failed == ["a block changed", "blocks swapped"]
    skipped = ["another layout", "fewer sums", "no sums"]
    assert done == sorted([*skipped, "failed before", "not sampled", "only the end was read", "right"])
    results = {check.request_id: (check.result, check.positions) for check in kv_checks({nixl_checksum.CHECKS: told})}
    assert results == {
        "right": ("match", []),
        "only the end was read": ("match", []),
        "blocks swapped": ("mismatch", [-3, -2]),
        "a block changed": ("mismatch", [-3]),
        **dict.fromkeys(skipped, ("skipped", [])),
    }
    assert together == told
    assert (was_empty, is_empty) == (False, True)
    assert other_rank == [["skipped", []], ["match", []]]


def test_the_checks_are_told_with_the_connectors_counts() -> None:
    assert kv_checks({nixl_checksum.CHECKS: [["r", "mismatch", [-2]]]}) == [KvCheck("r", "mismatch", [-2])]
    assert kv_checks({"transfer_duration": [0.1]}) == []


def test_vllm_does_not_compare_by_itself() -> None:
    """Else nixl_checksum.py can go."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, metadata, pull_worker

    for module in (base_worker, metadata, pull_worker):
        assert "checksum" not in inspect.getsource(module).lower()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_nothing_is_compared_without_the_plug_in(role: str) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    assert not hasattr(WorkerBase, nixl_checksum.SUMS_METHOD), role
