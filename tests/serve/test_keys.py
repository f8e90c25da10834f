"""Keys, tenants and limits of a running application with two frontends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve

from app.tenant_usage import BURST_S
from app.tenants import digest
from deployments.serve_hooks import deploy_applications, serve_details
from tests.conftest import wait_until

pytestmark = pytest.mark.serve

RATE = 2.0
PROMPT = list(range(300, 500))


def tenant(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "keys": [digest(f"{name}-key".encode()).hex()], **fields}


class Application:
    """What a client of each tenant sees of it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.keys = folder / "keys.yaml"
        self.usage = folder / "usage"
        self.write(tenant("ops", admin=True), tenant("a"), tenant("b"), tenant("slow", requests_per_s=RATE))

    def write(self, *tenants: dict[str, Any]) -> None:
        self.keys.write_text(yaml.safe_dump({"tenants": tenants}))

    def deploy(self) -> None:
        pool = {"engine": "sim", "resources": {"num_cpus": 0.1}, "engine_args": {"num_blocks": 512}}
        args = {
            "models": [{"name": "tiny", "source": "baton:tiny", "decode": pool}],
            "frontend": {"replicas": 2, "resources": {"num_cpus": 0.1}},
            "security": {"keys": str(self.keys), "usage_records": str(self.usage)},
        }
        application = {"name": "keys", "route_prefix": "/keys", "import_path": "deployments.build:build", "args": args}
        deploy_applications([application])

    def client(self, name: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": f"{name}-key"}, timeout=60)

    def complete(self, name: str, prompt: list[int] = PROMPT) -> httpx.Response:
        """Ask by a connection of its own, so that both frontends are asked."""
        with self.client(name) as client:
            return client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 2})

    def cached(self, name: str) -> int:
        usage = self.complete(name).json()["usage"]
        return int((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)

    def is_ready(self) -> bool:
        with self.client("ops") as client:
            answer = client.get("/health")
        return answer.status_code == 200 and answer.json().get("status") == "healthy"

    def recorded(self) -> Counter[str]:
        lines = [line for path in self.usage.iterdir() for line in path.read_text().splitlines()]
        return Counter(record["tenant"] for record in map(json.loads, lines))


@pytest.fixture(scope="module")
def app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    found = Application(f"{serve_url}/keys", tmp_path_factory.mktemp("keys"))
    found.deploy()
    wait_until(found.is_ready, 120, "the application serves")
    yield found
    serve.delete("keys")


def ledger_pids() -> list[int]:
    deployments = serve_details()["applications"]["keys"]["deployments"]
    return [replica["pid"] for replica in deployments["ledger"]["replicas"] if replica["state"] == "RUNNING"]


def test_without_a_key_nothing_but_a_word_about_health(app: Application) -> None:
    with httpx.Client(base_url=app.url) as client:
        assert client.get("/health").json() == {"status": "healthy"}
        assert {client.get(path).status_code for path in ("/v1/models", "/stats", "/metrics")} == {401}
    with app.client("a") as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/stats").status_code == 403


def test_no_tenant_finds_another_ones_prompt_in_a_cache(app: Application) -> None:
    assert [app.cached("a"), app.cached("a")] == [0, 192]
    assert [app.cached("b"), app.cached("b")] == [0, 192]


def test_what_each_used_is_recorded(app: Application) -> None:
    before = app.recorded()
    for name in ("a", "b", "b"):
        app.complete(name)
    wait_until(lambda: app.recorded() - before == Counter(a=1, b=2), 10, "a line for each sequence")


def flood(app: Application, seconds: float) -> Counter[int]:
    """Have one tenant ask all the time by 4 connections at once; returns the statuses."""
    until = time.monotonic() + seconds

    def ask(_: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        while time.monotonic() < until:
            statuses[app.complete("slow", [1, 2, 3]).status_code] += 1
        return statuses

    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(ask, range(4)), Counter())


def test_a_limit_is_of_all_frontends_together(app: Application) -> None:
    """Without the ledger each of the two would give the whole of it."""
    began = time.monotonic()
    statuses = flood(app, 8)
    assert set(statuses) == {200, 429}
    assert statuses[200] <= RATE * (BURST_S + time.monotonic() - began) + 2


def test_the_ledgers_death_refuses_nobody(app: Application) -> None:
    (pid,) = ledger_pids()
    os.kill(pid, signal.SIGKILL)
    assert set(flood(app, 4)) <= {200, 429}
    assert app.complete("a").status_code == 200
    wait_until(lambda: set(ledger_pids()) - {pid}, 60, "another ledger")
    assert set(flood(app, 2)) <= {200, 429}


def test_a_key_that_is_taken_out_is_refused_by_every_frontend(app: Application) -> None:
    app.write(tenant("ops", admin=True), tenant("a"))
    wait_until(lambda: {app.complete("b").status_code for _ in range(8)} == {401}, 30, "no frontend takes the key")
    assert app.complete("a").status_code == 200
