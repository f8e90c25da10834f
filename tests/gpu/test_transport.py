"""KV that would move by another transport than the required one is not moved: decode prefills, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import Baton, make_prompt
from tests.gpu.conftest import Platform, serving_models, vllm_model

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(500)]

HAS_RDMA = Path("/dev/infiniband").is_dir()


@pytest.fixture(scope="module")
def without_rdma(serve_url: str, opened_workers: None, platform: Platform) -> Iterator[Baton]:
    """An application that requires RDMA between two engines of a machine that has none."""
    yield from serving_models(platform, serve_url, [vllm_model(platform, "tiny-rdma")], "rdma")


@pytest.fixture(scope="module", name="served")
def only_this_is_served(without_rdma: Baton) -> tuple[Baton, ...]:
    return (without_rdma,)


@pytest.mark.skipif(HAS_RDMA, reason="this machine has RDMA devices, so RDMA may be what is used")
def test_another_transport_than_the_required_one_is_refused(without_rdma: Baton) -> None:
    """Which one it is shows only when the first KV has moved: that one request may be prefilled remotely."""
    for _ in range(4):
        assert without_rdma.complete(make_prompt(640)).usage.completion_tokens == 16
    assert without_rdma.count_prefills("local", "transport_refused") >= 3
    assert without_rdma.count_prefills("remote") <= 1
    assert without_rdma.stats("decode")["transport"]
