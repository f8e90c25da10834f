"""Decode does not become ready if KV moves by another transport than the required one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import serve

from tests.gpu.conftest import Platform, application_arguments, vllm_model

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(500)]

HAS_RDMA = Path("/dev/infiniband").is_dir()


@pytest.mark.skipif(HAS_RDMA, reason="this machine has RDMA devices, so RDMA may be what is used")
def test_another_transport_than_the_required_one_is_refused(serve_url: str, platform: Platform) -> None:
    from deployments.build import build

    arguments = application_arguments(platform, [vllm_model(platform, "tiny-rdma")], "rdma")
    with pytest.raises(RuntimeError):
        serve.run(build(arguments), name="without-rdma", route_prefix="/without-rdma")
    message = serve.status().applications["without-rdma"].deployments["decode-tiny-rdma"].message
    serve.delete("without-rdma")
    assert "transfer.required_transport: rdma is required" in message
