"""The KV transfer is correct, a control with wrong KV fails, and Ray carries little and stores none of it."""

from __future__ import annotations

import random

import pytest
import ray

from app.cli import verify
from app.cli.verify import compare_output
from app.handoff_seal import unpack
from app.messages import GenerateRequest
from tests.engines.conftest import SGLANG_AGGREGATED, Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]


REFERENCES = {"sglang": SGLANG_AGGREGATED}
"""The aggregated model with which an engine is compared if its decode engine cannot prefill."""


def test_verify_passes(baton: Baton) -> None:
    reference = REFERENCES.get(baton.engine)
    assert compare_output(
        baton.url, model=baton.model, reference=reference, corrupt_kv=False, tolerance=baton.tolerance, seed=1
    )


def test_verify_fails_on_wrong_kv(baton: Baton) -> None:
    assert not compare_output(
        baton.url, model=baton.model, reference=REFERENCES.get(baton.engine), corrupt_kv=True, seed=1
    )


def test_verify_needs_no_reference_where_prefill_can_be_one(sglang: Baton, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few output tokens suffice: the reference prefills for each of them, and wrong KV shows in the first ones."""
    monkeypatch.setattr(verify, "OUTPUT_TOKENS", 8)
    assert compare_output(sglang.url, model=sglang.model, corrupt_kv=False, seed=2)
    assert not compare_output(sglang.url, model=sglang.model, corrupt_kv=True, seed=2)


async def test_descriptor_is_small(real: Baton) -> None:
    handle = real.handle("prefill")
    request = GenerateRequest(request_id="size", prompt_token_ids=[7] * 4095, sampling={})
    replica = real.stats("prefill")["replica_id"]
    packed = await handle.prefill.remote(request, replica_id=replica)
    await handle.abandon.remote("size", replica_id=replica)
    assert unpack(packed).prompt_tokens == 4095
    assert len(packed) < 4096


def test_kv_never_enters_the_object_store(real: Baton) -> None:
    before, moved = created_bytes(), real.stats("decode")["transferred_bytes"]
    for seed in range(5):
        real.complete(random.Random(100 + seed).choices(range(300, 2000), k=2048), max_tokens=4)
    moved = real.stats("decode")["transferred_bytes"] - moved
    assert moved == 5 * 2048 * real.kv_bytes_per_token
    assert created_bytes() - before < moved / 100


def created_bytes() -> int:
    """Return how many bytes have ever been put into this node's object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    count: int = reply.store_stats.cumulative_created_bytes
    return count
