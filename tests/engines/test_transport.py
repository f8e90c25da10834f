"""What is proven when real engines start: by which transport KV moves between a decode and a prefill replica."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from ray import serve

from deployments.replica.link_record import read_links
from tests.conftest import REPOSITORY, open_to_others, wait_until
from tests.engines.conftest import START_TIMEOUT_S, Application, Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = REPOSITORY / "cluster" / "local" / "two-engines.yaml"
TRANSPORT = "intra-node cma/memory (zero-copy)"


def test_a_pair_is_proven_before_decode_is_ready(application: Application, real: Baton) -> None:
    (first,) = [each for each in application.replicas if (each["model"], each["role"]) == (real.model, "decode")]
    assert (first["num_probes"], first["num_transfers"]) == (3, 3)
    real.wait_until_quiet()
    (link,) = read_links("baton", real.stats("decode")["replica_id"])
    assert link.prefill_replica == real.stats("prefill")["replica_id"]
    assert (link.transport, link.problem) == (TRANSPORT, "")
    assert link.probe_s is not None
    assert (link.bytes_per_s is not None) is (real.engine == "vllm")  # SGLang does not tell
    remote = real.count_prefills("remote")
    real.complete([7] * 100, max_tokens=4)
    assert real.count_prefills("remote") == remote + 1


@pytest.mark.usefixtures("application")
def test_no_other_machine_can_connect_to_an_engine() -> None:
    """NIXL's side channels, SGLang's bootstrap server and UCX ask nobody for a token."""
    assert open_to_others() == []


def needs_nvlink() -> dict[str, Any]:
    """The arguments of an application of vLLM that requires a transport which is not there."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    found["models"] = [model for model in found["models"] if model["name"] == "tiny"]
    found["transfer"]["required_transport"] = "nvlink"
    return found


def test_decode_does_not_become_ready_without_the_required_transport(serve_url: str) -> None:
    """The first replica that Serve starts is waited for.  tests/gpu waits until Serve gives up, after three."""
    from deployments.build import build

    name, decode = "vllm-nvlink", "decode-tiny"
    serve.run_many(
        [serve.RunTarget(build(needs_nvlink()), name=name, route_prefix=f"/{name}")],
        wait_for_applications_running=False,
    )

    def refused() -> str:
        message: str = serve.status().applications[name].deployments[decode].message
        return message if "required_transport" in message else ""

    try:
        message = wait_until(refused, START_TIMEOUT_S, "decode is refused")
        pool = serve.status().applications[name].deployments[decode]
    finally:
        serve.delete(name)
    assert "RUNNING" not in pool.replica_states
    assert "transfer.required_transport: nvlink is required" in message
    assert re.search(r"KV moves by intra-node .*tcp/lo", message)
    assert "set it to a transport that is there" in message
