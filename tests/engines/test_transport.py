"""What is proven when real engines start: by which transport KV moves between a decode and a prefill replica.

Each test has an application of its own, beside that of the other tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from ray import serve

from tests.conftest import REPOSITORY
from tests.engines.conftest import running

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = REPOSITORY / "cluster" / "local" / "two-engines.yaml"
MODELS = {"vllm": "tiny", "sglang": "tiny-sglang"}
TRANSPORT = "intra-node cma/memory (zero-copy)"


def arguments(engine: str, required_transport: str) -> dict[str, Any]:
    """The arguments of an application of one model."""
    found: dict[str, Any] = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    found["models"] = [model for model in found["models"] if model["name"] == MODELS[engine]]
    found["models"][0]["routing"] = {"placement": {"policy": "remote"}}
    found["transfer"]["required_transport"] = required_transport
    return found


@contextmanager
def application(engine: str, required_transport: str) -> Iterator[str]:
    """Deploy an application, and yield its route prefix."""
    from deployments.build import build

    name = f"{engine}-{required_transport}"
    try:
        serve.run(build(arguments(engine, required_transport)), name=name, route_prefix=f"/{name}")
        yield f"/{name}"
    finally:
        serve.delete(name)


@pytest.mark.parametrize("engine", MODELS)
def test_a_pair_is_proven_before_decode_is_ready(serve_url: str, engine: str) -> None:
    from deployments.replica.link_record import read_links

    with application(engine, "shm") as prefix:
        for baton in running(f"{serve_url}{prefix}", MODELS[engine], engine):
            decode = baton.stats("decode")
            (link,) = read_links(prefix[1:], decode["replica_id"])
            assert link.prefill_replica == baton.stats("prefill")["replica_id"]
            assert (link.transport, link.problem) == (TRANSPORT, "")
            assert link.probe_s is not None
            assert (link.bytes_per_s is not None) is (engine == "vllm")  # SGLang does not tell
            assert (decode["num_probes"], decode["num_transfers"]) == (3, 3)
            baton.complete([7] * 100, max_tokens=4)
            assert baton.count_prefills("remote") == 1
            assert baton.is_idle()


def test_decode_does_not_become_ready_without_the_required_transport(serve_url: str) -> None:
    """With vLLM only: Serve starts the replica three times before it gives up."""
    from deployments.build import build

    name = "vllm-nvlink"
    with pytest.raises(RuntimeError):
        serve.run(build(arguments("vllm", "nvlink")), name=name, route_prefix=f"/{name}")
    message = serve.status().applications[name].deployments[f"decode-{MODELS['vllm']}"].message
    serve.delete(name)
    assert "transfer.required_transport: nvlink is required" in message
    assert re.search(r"KV moves by intra-node .*tcp/lo", message)
    assert "set it to a transport that is there" in message
