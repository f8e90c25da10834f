"""Two models behind one endpoint, one disaggregated and one not, deployed from a file as ``serve deploy`` does.

`baton status` and `baton scale` need such an application, too.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from app.errors import ConfigError
from app.replica_bounds import Bounds
from deployments import application as running
from deployments.serve_hooks import deploy_applications, serve_details
from tests.conftest import wait_until

pytestmark = pytest.mark.serve

SPLIT, WHOLE = "split", "org/whole"
CHAT = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TOOLS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}


class Application:
    """The two models over HTTP."""

    def __init__(self, url: str, args: dict[str, Any], pythons: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=60)
        self.args = args
        self.pythons = pythons

    def deploy(self) -> None:
        application = {
            "name": "two",
            "route_prefix": "/two",
            "import_path": "deployments.build:build",
            "args": self.args,
        }
        deploy_applications([application])

    def complete(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": [300, 301, 302], "max_tokens": 4, "temperature": 0, **fields}
        return self.http.post("/v1/completions", json=body)

    def health(self) -> dict[str, Any]:
        report: dict[str, Any] = self.http.get("/health").json()
        return report

    def states(self) -> dict[str, str]:
        return {model["name"]: model["state"] for model in self.health()["models"]}

    def cards(self) -> dict[str, dict[str, Any]]:
        return {card["id"]: card for card in self.http.get("/v1/models").json()["data"]}

    def endpoints(self, model: str) -> dict[str, dict[str, Any]]:
        """Return a model's endpoints by replica id."""
        return {found["replica_id"]: found for found in self.health()["endpoints"] if found["model"] == model}

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum over all series with these labels."""
        found = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith(name + "{")]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.split()[-1]) for line in found if all(label in line for label in wanted))

    def status(self) -> running.Status:
        """Return what `baton status` knows."""
        return next(found for found in running.read_status() if found.application == "two")

    def pool(self, name: str) -> running.PoolStatus | None:
        """Return a deployment; None while Serve builds the application anew and reports none."""
        now = self.status()
        return next((pool for pool in now.pools if pool.name == name and now.status == "RUNNING"), None)

    def pids(self) -> dict[str, set[int]]:
        """Return the processes of each deployment's replicas, as Serve knows them."""
        deployments: dict[str, Any] = serve_details()["applications"]["two"]["deployments"]
        return {name: {replica["pid"] for replica in each["replicas"]} for name, each in deployments.items()}

    def is_whole(self) -> bool:
        answer = self.http.get("/health")
        return answer.status_code == 200 and answer.json()["status"] == "healthy"


def arguments(python: Path) -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    engine_args = {"num_blocks": 512, "speed_up": 1.0}  # 5 ms a step, so a client can leave in the middle of an answer
    return {
        "models": [
            {
                "name": SPLIT,
                "source": "baton:tiny",
                "engine_args": {**engine_args, "profile": "h200-llama-8b", "max_model_len": 2048},
                "server_args": TOOLS,
                "prefill": {**pool},
                "decode": {**pool},
                "routing": {"placement": {"policy": "remote"}},
            },
            {
                "name": WHOLE,
                "source": "baton:tiny",
                "engine_args": {**engine_args, "profile": "cpu-tiny-qwen3", "max_model_len": 1024},
                "server_args": {**TOOLS, "chat_template": "{{ 'always the same words' }}"},
                "decode": {**pool, "python": str(python)},
            },
        ],
        "transfer": {},
        "frontend": {"resources": {"num_cpus": 0.1}},
    }


@pytest.fixture(scope="module")
def app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    pythons = tmp_path_factory.mktemp("a python's own folder")
    python = pythons / "python"
    python.write_text(f'#!/bin/sh\ntouch "{pythons}/$$"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    app = Application(f"{serve_url}/two", arguments(python), pythons)
    app.deploy()
    wait_until(app.is_whole, 120, "both models ready", every_s=0.5)
    yield app
    app.http.close()
    serve.delete("two")


@pytest.mark.parametrize("model", [SPLIT, WHOLE])
def test_both_answer_whole_and_streamed(app: Application, model: str) -> None:
    whole = app.complete(model).json()
    assert whole["model"] == model
    with app.http.stream(
        "POST", "/v1/completions", json={"model": model, "prompt": [300, 301, 302], "max_tokens": 4, "stream": True}
    ) as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {model}
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]


def test_each_is_served_by_its_own_pools(app: Application) -> None:
    prefills = {
        SPLIT: {"kind": "remote", "reason": ""},
        WHOLE: {"kind": "local", "reason": "aggregated"},
    }
    for model, labels in prefills.items():
        before = app.metric("baton_prefills_total"), app.metric("baton_prefills_total", model=model, **labels)
        app.complete(model, prompt=[400 + len(model), 401]).raise_for_status()
        after = app.metric("baton_prefills_total"), app.metric("baton_prefills_total", model=model, **labels)
        assert after == (before[0] + 1, before[1] + 1)


def test_models_are_listed_with_their_engine_mode_and_state(app: Application) -> None:
    cards = app.cards()
    told = {name: (card["engine"], card["mode"], card["state"]) for name, card in cards.items()}
    assert told == {SPLIT: ("sim", "disaggregated", "ready"), WHOLE: ("sim", "aggregated", "ready")}
    assert [card["max_model_len"] for card in cards.values()] == [2048, 1024]
    assert all(card["object"] == "model" and card["root"] for card in cards.values())


def test_health_and_stats_tell_the_models_apart(app: Application) -> None:
    assert app.health()["models"] == [
        {
            "name": SPLIT,
            "engine": "sim",
            "mode": "disaggregated",
            "local_prefill": True,
            "state": "ready",
            "pools": {"decode": {"ready": 1, "reachable": 1}, "prefill": {"ready": 1, "reachable": 1}},
        },
        {
            "name": WHOLE,
            "engine": "sim",
            "mode": "aggregated",
            "local_prefill": True,
            "state": "ready",
            "pools": {"decode": {"ready": 1, "reachable": 1}},
        },
    ]
    replicas = app.http.get("/stats").json()["replicas"]
    assert {(replica["model"], replica["role"]) for replica in replicas} == {
        (SPLIT, "prefill"),
        (SPLIT, "decode"),
        (WHOLE, "decode"),
    }
    known = {endpoint["replica_id"]: endpoint["model"] for endpoint in app.health()["endpoints"]}
    assert known == {replica["replica_id"]: replica["model"] for replica in replicas}


def test_each_server_has_arguments_of_its_own(app: Application) -> None:
    words = {}
    for model in (SPLIT, WHOLE):
        tokens = app.http.post("/tokenize", json={"model": model, "messages": CHAT}).json()["tokens"]
        words[model] = app.http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]
    assert "always the same words" in words[WHOLE]
    assert "Hello" in words[SPLIT]


def test_requests_and_tool_calls_of_both_are_counted(app: Application) -> None:
    """vLLM's own metrics expect only one model in a process."""
    for model in (SPLIT, WHOLE):
        requests = app.metric("http_requests_total", handler="/v1/chat/completions")
        parsed = app.metric("vllm:tool_call_parser_invocations_total", model_name=model)
        body = {"model": model, "messages": CHAT, "max_tokens": 4, "tools": [TOOL]}
        app.http.post("/v1/chat/completions", json=body).raise_for_status()
        assert app.metric("http_requests_total", handler="/v1/chat/completions") == requests + 1
        assert app.metric("vllm:tool_call_parser_invocations_total", model_name=model) == parsed + 1


def test_an_unknown_and_a_missing_model_are_refused(app: Application) -> None:
    unknown = app.complete("other")
    assert unknown.status_code == 404
    assert f"`{WHOLE}`" in unknown.json()["error"]["message"]
    missing = app.http.post("/v1/completions", json={"prompt": "Hello"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (400, "model")
    headers = {"content-type": "application/json"}
    assert app.http.post("/v1/completions", content="{nope", headers=headers).status_code == 400
    huge = b'{"model": "split", "prompt": "' + b"x" * 40_000_000 + b'"}'
    assert app.http.post("/v1/completions", content=huge, headers=headers).status_code == 413


@pytest.mark.parametrize("model", [SPLIT, WHOLE])
def test_a_client_that_leaves_ends_its_sequence(app: Application, model: str) -> None:
    before = app.metric("baton_sequences_total", model=model, end="cancelled")
    body = {"model": model, "prompt": [500, 501], "max_tokens": 900, "ignore_eos": True, "stream": True}
    with app.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
    wait_until(
        lambda: app.metric("baton_sequences_total", model=model, end="cancelled") > before, 5, "sequences cancelled"
    )


def test_a_pool_runs_in_its_python(app: Application) -> None:
    started = {int(path.name) for path in app.pythons.iterdir() if path.name.isdigit()}
    assert {endpoint["pid"] for endpoint in app.endpoints(WHOLE).values()} <= started
    assert not {endpoint["pid"] for endpoint in app.endpoints(SPLIT).values()} & started


def test_a_pool_grows_and_shrinks_and_nothing_restarts(app: Application) -> None:
    def has_replicas(number: int) -> bool:
        pool = app.pool("prefill-split")
        return pool is not None and pool.replicas == {"running": number}

    wait_until(lambda: has_replicas(1), 60, "one prefill replica")
    before = app.pids()
    assert running.scale_running(SPLIT, {"prefill": Bounds(2, 2)})[0] == "prefill-split: 1 -> 2"
    wait_until(lambda: has_replicas(2), 30, "two prefill replicas")
    found = app.pool("prefill-split")
    assert found is not None
    assert (found.target, found.bounds, found.plan) == (2, "2", None)
    assert before["prefill-split"] < app.pids()["prefill-split"]

    running.scale_running(SPLIT, {"prefill": Bounds(1, 1), "decode": Bounds(1, 2)})
    wait_until(lambda: has_replicas(1), 30, "one prefill replica")
    decode = app.pool("decode-split")
    assert decode is not None
    assert decode.bounds == "1..2"
    running.scale_running(SPLIT, {"decode": Bounds(1, 1)})
    wait_until(lambda: len(app.endpoints(SPLIT)) == 2, 30, "the frontend has let one go")
    wait_until(lambda: app.pool("decode-split"), 30, "Serve has built the application anew")
    after = app.pids()
    assert all(after[name] == before[name] for name in ("decode-split", "decode-org-whole", "frontend"))


def test_what_is_so_already_is_said(app: Application) -> None:
    assert running.scale_running(SPLIT, {"frontend": Bounds(1, 1)}) == ["nothing to change"]


def test_a_wrong_name_changes_nothing(app: Application) -> None:
    before = app.status()
    with pytest.raises(ConfigError, match="no such model; there are split, org/whole"):
        running.scale_running("splitt", {"prefill": Bounds(2, 2)})
    assert app.status() == before


def test_a_model_that_is_down_is_named_and_the_other_goes_on(app: Application) -> None:
    (endpoint,) = app.endpoints(WHOLE).values()
    os.kill(endpoint["pid"], signal.SIGKILL)
    wait_until(lambda: app.states()[WHOLE] == "unavailable", 10, "its death noticed", every_s=0.02)
    refused = app.complete(WHOLE)
    report = app.http.get("/health")
    assert app.complete(SPLIT).status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, 503)
    assert (report.status_code, report.json()["status"]) == (200, "degraded")
    assert {model["name"]: model["state"] for model in report.json()["models"]} == {
        SPLIT: "ready",
        WHOLE: "unavailable",
    }
    wait_until(app.is_whole, 60, "the model is back")
    assert app.complete(WHOLE).status_code == 200


def test_a_change_of_one_model_leaves_the_others_replicas_alone(app: Application) -> None:
    before = {model: set(app.endpoints(model)) for model in (SPLIT, WHOLE)}
    app.args = copy.deepcopy(app.args)
    app.args["models"][1]["engine_args"]["max_model_len"] = 768
    app.args["models"][0]["prefill"]["replicas"] = 2
    app.deploy()

    def is_deployed() -> bool:
        answer = app.http.get("/v1/models")
        return answer.status_code == 200 and answer.json()["data"][1]["max_model_len"] == 768

    wait_until(is_deployed, 120, "a new frontend", every_s=0.5)
    wait_until(lambda: len(app.endpoints(SPLIT)) == 3, 60, "a second prefill replica", every_s=0.5)
    wait_until(lambda: not before[WHOLE] & set(app.endpoints(WHOLE)), 60, "a new decode replica", every_s=0.5)
    wait_until(app.is_whole, 60, "all ready")
    assert before[SPLIT] < set(app.endpoints(SPLIT))
    assert app.complete(WHOLE, prompt=[300] * 800).status_code == 400
    assert app.complete(SPLIT, prompt=[300] * 800).status_code == 200
