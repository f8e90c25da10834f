"""The default application with real vLLM engines and real NIXL, started once for all tests here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from ray import serve

from tests.conftest import REPOSITORY, wait_until

START_TIMEOUT_S = 240.0


class Baton:
    """The running application, seen over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def close(self) -> None:
        self.http.close()
        self.openai.close()

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """A text completion, greedy unless said otherwise."""
        fields = {"temperature": 0, "max_tokens": 16, **fields}
        return self.openai.completions.create(model="tiny", prompt=prompt, **fields)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(path, json={"model": "tiny", **fields})

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = self.http.get("/health").json()
        return report

    def stats(self, role: str) -> dict[str, Any]:
        """Of the only replica of a role."""
        replicas = [r for r in self.http.get("/stats").json()["replicas"] if r["role"] == role]
        assert len(replicas) == 1, replicas
        return replicas[0]

    def is_idle(self) -> bool:
        """Whether no engine runs a request or holds a KV block."""
        loads = [self.stats(role) for role in ("prefill", "decode")]
        return all(load["num_running"] == load["num_waiting"] == load["num_used_blocks"] == 0 for load in loads)

    def count_prefills(self, kind: str, reason: str = "") -> float:
        """How many prompts were prefilled so since the frontend started."""
        labels = f'kind="{kind}",model="tiny",reason="{reason}"'
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"baton_prefills_total{{{labels}}}"):
                return float(line.split()[-1])
        return 0.0

    def replica_process(self, role: str) -> psutil.Process:
        pids = [endpoint["pid"] for endpoint in self.health()["endpoints"] if endpoint["role"] == role]
        assert len(pids) == 1, pids
        return psutil.Process(pids[0])

    def wait_until_healthy(self) -> None:
        wait_until(lambda: self.http.get("/health").json()["status"] == "healthy", START_TIMEOUT_S, "healthy")


def engine_processes(replica: psutil.Process) -> list[psutil.Process]:
    """The engine core and its workers, which are the replica's descendants."""
    return [process for process in replica.children(recursive=True) if "VLLM" in " ".join(process.cmdline())]


@pytest.fixture(scope="session")
def baton(serve_url: str) -> Iterator[Baton]:
    from app.build import build

    os.environ.pop("MODEL", None)
    document = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    serve.run(build(document["applications"][0]["args"]), name="baton", route_prefix="/")
    running = Baton(serve_url)
    running.wait_until_healthy()
    yield running
    running.close()
    serve.delete("baton")
