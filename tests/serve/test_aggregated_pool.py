"""A model with an aggregated pool beside prefill and decode, over HTTP with sim engines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray import serve

from tests.conftest import wait_until

pytestmark = pytest.mark.serve

SHORT, LONG = list(range(300, 320)), list(range(300, 500))


def arguments() -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}, "health_check_period_s": 0.5}
    return {
        "models": [
            {
                "name": "tiny",
                "source": "baton:tiny",
                "engine_args": {"max_model_len": 2048, "num_blocks": 512, "speed_up": "max"},
                "prefill": pool,
                "decode": pool,
                "aggregated": pool,
                "routing": {"placement": {"policy": "thresholds", "max_local_tokens": 64}},
            }
        ],
        "transfer": {},
        "frontend": {"resources": {"num_cpus": 0.1}},
    }


class Application:
    """The running application."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=30)

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = self.http.get("/health").json()
        return report

    def state(self) -> str:
        state: str = self.http.get("/v1/models").json()["data"][0]["state"]
        return state

    def serve(self, prompt: list[int]) -> dict[str, Any]:
        """Serve a prompt and return the explanation of where it was served."""
        answer = self.http.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": prompt, "max_tokens": 4, "ignore_eos": True},
            headers={"x-baton-explain": "1"},
        ).raise_for_status()
        assert answer.json()["usage"]["completion_tokens"] == 4
        (explanation,) = json.loads(answer.headers["x-baton-explain"])
        found: dict[str, Any] = explanation
        return found

    def pool_states(self) -> dict[str, dict[str, int]]:
        return {replica["role"]: replica["view"] for replica in self.http.get("/stats").json()["replicas"]}

    def kill(self, role: str) -> None:
        (pid,) = [endpoint["pid"] for endpoint in self.health()["endpoints"] if endpoint["role"] == role]
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def app(serve_url: str) -> Iterator[Application]:
    from deployments.build import build

    serve.run(build(arguments()), name="third", route_prefix="/third")
    running = Application(f"{serve_url}/third")
    wait_until(lambda: running.health()["status"] == "healthy", 30, "all pools ready")
    yield running
    running.http.close()
    serve.delete("third")


def test_all_three_pools_are_told_of(app: Application) -> None:
    (model,) = app.health()["models"]
    assert (model["mode"], model["state"]) == ("disaggregated", "ready")
    assert model["pools"] == {role: {"ready": 1, "reachable": 1} for role in ("prefill", "decode", "aggregated")}
    assert {endpoint["role"] for endpoint in app.health()["endpoints"]} == {"prefill", "decode", "aggregated"}


def test_short_prompts_are_the_aggregated_pools_and_long_ones_are_not(app: Application) -> None:
    short, long = app.serve(SHORT), app.serve(LONG)
    assert (short["kind"], short["actual"]["kind"], short["prefill"]) == ("local", "local", None)
    assert "aggregated" in short
    assert (long["kind"], long["actual"]["kind"]) == ("remote", "remote")
    assert long["prefill"]
    assert long["decode"]


def test_stats_tell_what_the_frontend_believes(app: Application) -> None:
    before = app.pool_states()["prefill"]["cached_blocks"]  # of other tests and of probes
    new = [token + 500 for token in LONG]
    app.serve(new)
    app.serve(SHORT)
    # The block of the last token is not full.
    known = before + len(new) // 16
    wait_until(lambda: app.pool_states()["prefill"]["cached_blocks"] == known, 5, "the prompt in the pool state")
    wait_until(lambda: app.pool_states()["aggregated"]["cached_blocks"] >= 1, 5, "the other one, too")
    assert app.serve(new)["expected"]["cached_tokens"] > 0
    idle = {"sequences": 0, "queued_tokens": 0, "used_blocks": 0}
    wait_until(
        lambda: all(idle.items() <= state.items() for state in app.pool_states().values()), 5, "nothing left to do"
    )


def test_the_aggregated_pool_serves_what_the_others_cannot(app: Application) -> None:
    wait_until(lambda: app.state() == "ready", 30, "all pools ready")
    app.kill("prefill")
    app.kill("decode")
    wait_until(lambda: app.state() == "degraded", 5, "their death noticed", every_s=0.02)
    assert app.health()["status"] == "degraded"
    explanation = app.serve(LONG)
    assert explanation["aggregated"]
    assert explanation["reason"].startswith("no_")
    wait_until(lambda: app.state() == "ready", 60, "all pools are back")
    assert app.serve([token + 1000 for token in LONG])["actual"]["kind"] == "remote"


def test_without_the_aggregated_pool_decode_serves_short_prompts(app: Application) -> None:
    wait_until(lambda: app.state() == "ready", 60, "all pools ready")
    app.kill("aggregated")
    wait_until(lambda: app.state() == "degraded", 5, "its death noticed", every_s=0.02)
    explanation = app.serve(SHORT)
    assert explanation["kind"] == "local"
    assert explanation["decode"]
    wait_until(lambda: app.state() == "ready", 60, "the pool is back")
