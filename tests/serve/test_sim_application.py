"""The whole application over sim engines, from HTTP through channels and handoffs; nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from app.replica_bounds import Bounds
from deployments.cluster import LOOPBACK
from deployments.serve_hooks import serve_details
from deployments.switch import switch
from tests.conftest import open_to_others, wait_until

pytestmark = pytest.mark.serve

TOKENS = list(range(300, 400))


def arguments(**engine_args: Any) -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    return {
        "models": [
            {
                "name": "tiny",
                "source": "baton:tiny",
                "engine_args": {"max_model_len": 2048, "num_blocks": 512, **engine_args},
                "prefill": pool,
                "decode": {**pool, "replicas": 2},
                "routing": {"placement": {"policy": "remote"}},
            }
        ],
        "transfer": {},
        "frontend": {"replicas": 2, "resources": {"num_cpus": 0.1}},
    }


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    from deployments.build import build

    # A step takes 5 ms, slow enough for a client to leave in the middle of an answer.
    serve.run(build(arguments(profile="h200-llama-8b", speed_up=1.0)), name="sim", route_prefix="/sim")
    url = f"{serve_url}/sim"
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "healthy", 30, "both pools ready")
    yield url
    serve.delete("sim")


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": TOKENS, "max_tokens": 20, "ignore_eos": True, "temperature": 0, **fields}


def used_blocks(url: str) -> int:
    replicas = httpx.get(f"{url}/stats").json()["replicas"]
    assert len(replicas) == 3
    return sum(replica["num_used_blocks"] for replica in replicas)


def test_an_answer_is_the_same_streamed_and_whole_and_from_either_replica(url: str) -> None:
    whole = [httpx.post(f"{url}/v1/completions", json=completion()).json()["choices"][0]["text"] for _ in range(4)]
    with httpx.stream("POST", f"{url}/v1/completions", json=completion(stream=True)) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert {*whole, streamed} == {whole[0]}
    assert whole[0]


def test_tokens_come_one_by_one_to_a_client_that_keeps_up(url: str) -> None:
    def num_events() -> int:
        with httpx.stream("POST", f"{url}/v1/completions", json=completion(stream=True, max_tokens=30)) as response:
            return sum(line.startswith("data: {") for line in response.iter_lines())

    # Whoever is late for a moment, on a busy machine, gets two at once.
    wait_until(lambda: num_events() == 30, 60, "a stream of 30 tokens has 30 events")


def test_kv_moves_and_all_blocks_return(url: str) -> None:
    httpx.post(f"{url}/v1/completions", json=completion(prompt=[n + 1 for n in TOKENS])).raise_for_status()
    decode = [r for r in httpx.get(f"{url}/stats").json()["replicas"] if r["role"] == "decode"]
    assert sum(replica["num_transfers"] for replica in decode) >= 1
    wait_until(lambda: used_blocks(url) == 0, 5, "blocks returned")


def test_blocks_return_when_the_client_leaves(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json=completion(stream=True, max_tokens=1500)) as response:
        lines = response.iter_lines()  # kept in a variable: when it is deleted, httpx ends the request
        next(lines)
        assert used_blocks(url) > 0
    wait_until(lambda: used_blocks(url) == 0, 5, "blocks returned")


def test_blocks_return_when_a_client_leaves_that_waits_for_the_whole_answer(url: str) -> None:
    """Headers and body are sent in separate packets, as Python's clients do; see deployments/haproxy.py."""
    host, port, path = httpx.URL(url).host, httpx.URL(url).port, httpx.URL(url).path
    body = json.dumps(completion(max_tokens=1500)).encode()
    head = f"POST {path}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    for _ in range(10):
        with socket.create_connection((host, port or 80)) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode())
            client.sendall(body)
            wait_until(lambda: used_blocks(url) > 0, 5, "the request runs")
        wait_until(lambda: used_blocks(url) == 0, 2, "blocks returned", every_s=0.02)


def test_what_the_engine_cannot_do_is_a_400_that_names_it(url: str) -> None:
    answer = httpx.post(f"{url}/v1/completions", json=completion(logit_bias={"5": 1.0}))
    assert answer.status_code == 400
    assert "logit_bias" in answer.json()["error"]["message"]


def test_health_does_not_tell_how_to_reach_a_replica(url: str) -> None:
    """Whoever has a channel's token could read everybody's tokens."""
    health = httpx.get(f"{url}/health").text
    assert '"replica_id"' in health
    assert '"token"' not in health
    assert '"channel"' not in health


@pytest.mark.usefixtures("url")
def test_no_other_machine_can_connect() -> None:
    """Whoever reaches Ray's ports and has its token can run code; NIXL's side channels ask for none."""
    assert open_to_others() == []
    with socket.create_server(("", 0)) as server:  # the control
        (found,) = open_to_others()
        assert found.startswith(f"0.0.0.0:{server.getsockname()[1]} of ")


@pytest.mark.usefixtures("url")
def test_the_command_line_finds_a_cluster_on_loopback() -> None:
    """Ray by itself looks for it at the machine's own address; it is imported before `connect` could set a variable."""
    code = "from deployments.application import connect; connect()"
    environment = {name: value for name, value in os.environ.items() if name not in LOOPBACK}
    environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)


class Clients:
    """Stream answers, one after the other in each of some threads, and compare them with what they have to be."""

    def __init__(self, url: str, number: int) -> None:
        self.url = url
        self.num_right = 0
        self.wrong: list[str] = []
        self._prompts = [[n + shift for n in TOKENS] for shift in range(number)]
        self._right = [self._text(prompt) for prompt in self._prompts]
        self._has_ended = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(number)]

    def _text(self, prompt: list[int]) -> str:
        body = completion(prompt=prompt, stream=True, max_tokens=60)
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    def _run(self, index: int) -> None:
        while not self._has_ended.is_set():
            try:
                text = self._text(self._prompts[index])
            except (httpx.HTTPError, KeyError) as error:
                text = repr(error)
            if text == self._right[index]:
                self.num_right += 1
            else:
                self.wrong.append(text)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join()


def pools(url: str) -> tuple[int, int]:
    found = httpx.get(f"{url}/health").json()["models"][0]["pools"]
    return found["prefill"]["ready"], found["decode"]["ready"]


def test_replicas_change_their_role_under_load_and_nothing_is_lost(url: str) -> None:
    applications = [{"name": "sim", "args": arguments(profile="h200-llama-8b", speed_up=1.0)}]
    with Clients(url, 6) as clients:
        for prefill, decode in ((2, 1), (1, 2), (2, 1), (1, 2)):
            before = clients.num_right
            targets = {"prefill": Bounds(prefill, prefill), "decode": Bounds(decode, decode)}
            print(*switch(applications, serve_details(), "tiny", targets, 60), sep="\n")
            wait_until(lambda: pools(url) == (prefill, decode), 30, "both frontends have heard", every_s=0.02)  # noqa: B023
            wait_until(lambda: clients.num_right > before + 12, 60, "answers go on")  # noqa: B023
    assert clients.wrong == []
    states = httpx.get(f"{url}/health").json()
    assert {(each["home"], each["role"]) for each in states["endpoints"]} <= {
        (home, role) for home in ("prefill", "decode") for role in ("prefill", "decode")
    }
    wait_until(lambda: used_blocks(url) == 0, 60, "blocks returned")
