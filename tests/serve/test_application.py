"""`baton status` and `baton scale` on a running application of sim engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray import serve

from app.errors import ConfigError
from app.replica_bounds import Bounds
from deployments import application as running
from deployments.serve_hooks import deploy_applications, serve_details
from tests.conftest import wait_until

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def application(serve_url: str) -> Iterator[None]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    args = {
        "models": [{"name": "tiny", "source": "baton:tiny", "prefill": pool, "decode": pool}],
        "transfer": {},
        "frontend": {"resources": {"num_cpus": 0.1}},
    }
    document = {"name": "scaled", "route_prefix": "/scaled", "import_path": "deployments.build:build", "args": args}
    deploy_applications([document])
    wait_until(lambda: status().status == "RUNNING", 60, "the application runs")
    yield
    serve.delete("scaled")


def status() -> running.Status:
    return next(found for found in running.read_status() if found.application == "scaled")


def pools() -> dict[str, running.PoolStatus]:
    return {pool.name: pool for pool in status().pools}


def replicas(name: str) -> dict[str, int] | None:
    """Return a deployment's replicas; None while Serve builds the application anew and reports no deployment."""
    pool = pools().get(name)
    return pool.replicas if pool is not None and status().status == "RUNNING" else None


def pids(name: str) -> set[int]:
    replicas: list[dict[str, Any]] = serve_details()["applications"]["scaled"]["deployments"][name]["replicas"]
    return {replica["pid"] for replica in replicas}


def test_a_pool_grows_and_shrinks_and_nothing_restarts(application: None) -> None:
    before = {name: pids(name) for name in pools()}
    assert running.scale_running("tiny", {"prefill": Bounds(2, 2)})[0] == "prefill-tiny: 1 -> 2"
    wait_until(lambda: replicas("prefill-tiny") == {"running": 2}, 30, "two prefill replicas")
    found = pools()["prefill-tiny"]
    assert (found.target, found.bounds, found.plan) == (2, "2", None)
    assert before["prefill-tiny"] < pids("prefill-tiny")

    running.scale_running("scaled", {"prefill": Bounds(1, 1), "decode": Bounds(1, 2)})
    wait_until(lambda: replicas("prefill-tiny") == {"running": 1}, 30, "one prefill replica")
    assert pools()["decode-tiny"].bounds == "1..2"
    assert {name: pids(name) for name in ("decode-tiny", "frontend")} == {
        name: before[name] for name in ("decode-tiny", "frontend")
    }


def test_what_is_so_already_is_said(application: None) -> None:
    assert running.scale_running("tiny", {"frontend": Bounds(1, 1)}) == ["nothing to change"]


def test_a_wrong_name_changes_nothing(application: None) -> None:
    before = status()
    with pytest.raises(ConfigError, match="no such model; there are tiny"):
        running.scale_running("tinny", {"prefill": Bounds(2, 2)})
    assert status() == before
