"""The KV transfer itself: correct, checked by a control that must fail, small in Ray and outside its store."""

from __future__ import annotations

import pickle
import random

import pytest
import ray
from ray import serve

from app.messages import GenerateRequest, TransferDescriptor
from app.verify import verify
from tests.engines.conftest import Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]


def test_verify_passes(baton: Baton) -> None:
    assert verify(baton.url, spoil=False, tolerance=0.03, seed=1)


def test_verify_fails_on_wrong_kv(baton: Baton) -> None:
    assert not verify(baton.url, spoil=True, tolerance=0.03, seed=1)


async def test_descriptor_is_small(baton: Baton) -> None:
    handle = serve.get_deployment_handle("prefill", "baton")
    handle._init(_run_router_in_separate_loop=True)
    request = GenerateRequest(request_id="size", prompt_token_ids=[7] * 4095, sampling={})
    replica = baton.stats("prefill")["replica_id"]
    descriptor: TransferDescriptor = await handle.prefill.remote(request, replica_id=replica)
    assert descriptor.prompt_tokens == 4095
    assert len(pickle.dumps(descriptor)) < 4096


def test_kv_never_enters_the_object_store(baton: Baton) -> None:
    before, moved = created_bytes(), baton.stats("decode")["transferred_bytes"]
    for seed in range(5):
        baton.complete(random.Random(100 + seed).choices(range(300, 2000), k=2048), max_tokens=4)
    moved = baton.stats("decode")["transferred_bytes"] - moved
    assert moved == 5 * 2048 * 2048
    assert created_bytes() - before < moved / 100


def created_bytes() -> int:
    """Bytes that were ever put into this node's object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    count: int = reply.store_stats.cumulative_created_bytes
    return count
