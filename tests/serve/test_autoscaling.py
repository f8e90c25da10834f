"""The pools scale separately, and a shrinking pool loses nothing.  Sim engines run behind the real frontend."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from app.engines.base import EngineSpec
from app.engines.registry import create_engine
from app.messages import GenerateRequest, TokenDelta
from app.models.source import local_path
from deployments.serve_hooks import get_internal_kv, serve_details
from tests.conftest import wait_until

pytestmark = pytest.mark.serve

QUICKLY = {
    "min_replicas": 1,
    "max_replicas": 3,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1.0,
    "metrics_interval_s": 0.3,
    "look_back_period_s": 2.0,
}
LONG_PROMPTS: dict[str, Any] = {"prompt_tokens": 1500, "max_tokens": 2, "every_s": 0.1}
"""Each takes 0.18 s of a prefill replica, so together they are work for two replicas."""
LONG_OUTPUTS: dict[str, Any] = {"prompt_tokens": 20, "max_tokens": 80, "every_s": 0.15}
"""Each takes 2 s of one of a decode replica's 4 slots, so 13 run at once."""


def arguments(prefill: dict[str, Any], decode: dict[str, Any], gpus: int | None = None) -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}, "graceful_shutdown_timeout_s": 60, "drain_s": 1}
    model = {
        "name": "tiny",
        "source": "baton:tiny",
        "engine_args": {"max_model_len": 2048, "profile": "h200-llama-8b", "speed_up": 0.2},
        "prefill": {**pool, **prefill},
        "decode": {**pool, "engine_args": {"max_num_seqs": 4}, **decode},
        "routing": {"placement": {"policy": "remote"}},
        "slo": {"ttft_ms": 1000},
        "gpus": gpus,
    }
    # The waves are far too much for the pools that they begin with, and by their pace the late would wait for minutes.
    # No pool wakes as soon as its limit asks.
    limits = {"max_ttft_ms": 600_000, "max_wake_s": 0.5}
    return {"models": [model], "transfer": {}, "limits": limits, "frontend": {"resources": {"num_cpus": 0.1}}}


class Application:
    """The running application, and what became of the requests that it was sent."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/scaling"
        self.ended: Counter[str] = Counter()
        self._num_sent = 0

    def deploy(self, prefill: dict[str, Any], decode: dict[str, Any], gpus: int | None = None) -> None:
        """Start the application, or change the number of replicas of the running one."""
        from deployments.build import build

        serve.run(build(arguments(prefill, decode, gpus)), name="scaling", route_prefix="/scaling")
        wait_until(self._is_healthy, 30, "both pools ready")

    def failures(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/stats").json()["frontend"]["failures"]["tiny"]
        return found

    def _is_healthy(self) -> bool:
        answer = httpx.get(f"{self.url}/health")
        return answer.is_success and answer.json()["status"] == "healthy"

    def deployments(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = serve_details()["applications"]["scaling"]["deployments"]
        return found

    def state(self) -> str:
        """Return what the frontend says of the model; "" while none answers."""
        answer = httpx.get(f"{self.url}/v1/models")
        return str(answer.json()["data"][0]["state"]) if answer.is_success else ""

    def status(self) -> tuple[int, str]:
        answer = httpx.get(f"{self.url}/health")
        return answer.status_code, answer.json()["status"]

    def targets(self) -> dict[str, int]:
        return {role: self.deployments()[f"{role}-tiny"]["target_num_replicas"] for role in ("prefill", "decode")}

    def running(self, role: str) -> int:
        replicas = self.deployments()[f"{role}-tiny"]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in replicas)

    def plan(self, deployment: str) -> dict[str, Any]:
        """Return the last plan of the scaling policy."""
        value = get_internal_kv(f"baton:autoscaling:scaling:{deployment}")
        found: dict[str, Any] = json.loads(value) if value else {}
        return found

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))

    async def request(self, http: httpx.AsyncClient, prompt_tokens: int, max_tokens: int) -> None:
        """Stream an answer and record how it ended."""
        self._num_sent += 1
        body = {
            "model": "tiny",
            "prompt": [300 + self._num_sent, *(position % 1000 for position in range(1, prompt_tokens))],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        how = "cut short"
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if "error" in line:
                    how = line
                elif line == "data: [DONE]":
                    how = "whole"
        self.ended[how] += 1

    def pids(self, role: str) -> set[int]:
        return {replica["pid"] for replica in self.deployments()[f"{role}-tiny"]["replicas"]}

    def roles(self) -> list[str]:
        """Return the present role of each replica."""
        answer = httpx.get(f"{self.url}/health")
        return sorted(endpoint["role"] for endpoint in answer.json()["endpoints"])

    def used_blocks(self, role: str) -> list[int]:
        replicas = httpx.get(f"{self.url}/stats").json()["replicas"]
        return [replica["num_used_blocks"] for replica in replicas if replica["role"] == role]

    def prefills(self) -> dict[tuple[str, str], float]:
        """Return how many prompts were prefilled by (kind, reason), from the metrics of the only frontend."""
        metrics = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        (prefills,) = [metric for metric in metrics if metric.name == "baton_prefills"]
        return {
            (sample.labels["kind"], sample.labels["reason"]): sample.value
            for sample in prefills.samples
            if sample.name == "baton_prefills_total" and sample.labels["model"] == "tiny"
        }

    def count(self, sample: str, **labels: str) -> float:
        """Return a count of the only frontend, summed over the labels that are not given; 0 if there is none."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        found = [each for family in families for each in family.samples if each.name == sample]
        return sum(each.value for each in found if labels.items() <= each.labels.items())

    async def until(self, condition: Callable[[], Any], timeout_s: float, what: str) -> None:
        """Call `wait_until` in a thread, so that requests are sent while the condition is evaluated."""
        await asyncio.to_thread(wait_until, condition, timeout_s, what)

    @asynccontextmanager
    async def watching(self, role: str) -> AsyncIterator[set[int]]:
        """Yield a set that collects all targets that a pool has during the block."""
        seen: set[int] = set()

        async def poll() -> None:
            while True:
                seen.add((await asyncio.to_thread(self.targets))[role])
                await asyncio.sleep(0.2)

        polling = asyncio.create_task(poll())
        try:
            yield seen
        finally:
            polling.cancel()
            await asyncio.wait([polling])
        assert polling.cancelled(), polling.exception()

    @asynccontextmanager
    async def wave(self, prompt_tokens: int, max_tokens: int, every_s: float) -> AsyncIterator[None]:
        """Send requests at this pace during the block; at its end wait for all that were sent."""
        async with self.client() as http, asyncio.TaskGroup() as group:

            async def keep_sending() -> None:
                while True:
                    group.create_task(self.request(http, prompt_tokens, max_tokens))
                    await asyncio.sleep(every_s)

            sending = group.create_task(keep_sending())
            try:
                yield
            finally:
                sending.cancel()


@pytest.fixture(scope="module")
def app(serve_url: str) -> Iterator[Application]:
    app = Application(serve_url)
    app.deploy({"replicas": 2}, {"replicas": 3})
    yield app
    serve.delete("scaling")


async def undisturbed(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return what an engine generates for these prompts if nothing happens to it."""
    spec = EngineSpec(
        role="decode",
        is_disaggregated=False,
        replica_id="undisturbed",
        model_path=local_path("baton:tiny"),
        device="cpu",
        tensor_parallel_size=1,
        engine_args={"max_model_len": 2048, "speed_up": "max"},
    )
    engine = create_engine("sim", spec)
    await engine.start()
    try:
        answers: list[list[int]] = []
        for prompt in prompts:
            deltas: list[TokenDelta] = []
            sampling = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True}
            await engine.generate(
                GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling), None, deltas.append
            )
            answers.append([token for delta in deltas for token in delta.token_ids])
        return answers
    finally:
        await engine.stop()


async def test_long_streams_of_a_replica_that_is_removed_go_on_elsewhere(app: Application) -> None:
    """Each would take 45 s to end where it is.  The clients leave once the replica has gone and all have gone on."""
    num_tokens = 1800
    prompts = [[700 + number, *range(300, 339)] for number in range(6)]
    expected = await undisturbed(prompts, num_tokens)
    received: list[list[int]] = [[] for _ in prompts]
    before = app.pids("decode")

    async def stream(http: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": prompts[number], "max_tokens": num_tokens, "temperature": 0, "return_token_ids": True}
        async with http.stream(
            "POST", "/v1/completions", json={**body, "model": "tiny", "ignore_eos": True, "stream": True}
        ) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    received[number] += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
        raise AssertionError(f"stream {number} ended after {len(received[number])} tokens")

    async with app.client() as http, asyncio.TaskGroup() as group:
        streams = [group.create_task(stream(http, number)) for number in range(len(prompts))]
        await app.until(lambda: all(received) and min(app.used_blocks("decode")) > 0, 20, "each replica decodes")
        await asyncio.to_thread(app.deploy, {"replicas": 2}, {"replicas": 2})
        await app.until(lambda: len(app.pids("decode")) == 2, 30, "the replica is gone")
        so_far = [len(tokens) for tokens in received]
        await app.until(
            lambda: all(len(tokens) > count + 3 for tokens, count in zip(received, so_far, strict=True)),
            20,
            "all go on",
        )
        for task in streams:
            task.cancel()
    assert app.pids("decode") < before
    assert [tokens == answer[: len(tokens)] for tokens, answer in zip(received, expected, strict=True)] == [True] * 6
    assert app.count("baton_resume_gap_seconds_count", reason="drained") >= 2
    assert app.count("baton_resume_gap_seconds_count", reason="lost") == 0
    assert app.failures()["ejections_so_far"] == {}


async def test_what_shrinks_under_load_loses_neither_streams_nor_kv(app: Application) -> None:
    """Of 48 sequences, 8 decode at once for 2 s, so the KV of the others waits on prefill for up to 10 s."""
    before = app.prefills()[("remote", "")]
    async with app.client() as http, asyncio.TaskGroup() as group:
        for _ in range(48):
            group.create_task(app.request(http, prompt_tokens=40, max_tokens=80))
        await app.until(lambda: min(app.used_blocks("prefill")) > 0, 10, "KV waits on both prefill replicas")
        await asyncio.to_thread(app.deploy, {"replicas": 1}, {"replicas": 1})
    assert app.ended == {"whole": 48}
    assert app.prefills() == {("remote", ""): before + 48}
    await app.until(lambda: len(app.pids("prefill")) == len(app.pids("decode")) == 1, 20, "one of each is left")


async def test_pools_of_a_fixed_number_scale_apart_once_they_may(app: Application) -> None:
    before = app.pids("prefill") | app.pids("decode")
    app.deploy({"autoscaling": QUICKLY}, {"autoscaling": QUICKLY})
    await grows(app, "prefill", LONG_PROMPTS, while_stays="decode")
    await grows(app, "decode", LONG_OUTPUTS, while_stays="prefill")
    assert set(app.ended) == {"whole"}
    assert app.prefills().keys() == {("remote", "")}
    assert before & (app.pids("prefill") | app.pids("decode")), "Serve started anew what it could keep"


async def grows(app: Application, role: str, wave: dict[str, Any], while_stays: str) -> None:
    """Send a wave until a pool has grown.  It must shrink afterwards, and the other pool must stay as it is."""
    async with app.watching(while_stays) as seen, app.wave(**wave):
        await app.until(lambda: app.running(role) >= 2, 25, f"{role} grows")
        plan = app.plan(f"{role}-tiny")
        assert plan["wanted"] > 1
        assert plan["reason"]
        assert plan["signals"]
    assert seen == {1}, f"{while_stays} grew too: {app.plan(f'{while_stays}-tiny')}"
    await app.until(lambda: app.targets() == {"prefill": 1, "decode": 1}, 20, f"{role} returns")


async def test_within_a_budget_replicas_change_their_role_with_the_load_and_none_restarts(app: Application) -> None:
    prefill, decode = {**QUICKLY, "max_replicas": 1}, {**QUICKLY, "min_replicas": 2, "max_replicas": 2}
    await asyncio.to_thread(app.deploy, {"autoscaling": prefill}, {"autoscaling": decode}, gpus=3)
    await app.until(lambda: app.roles() == ["decode", "decode", "prefill"], 30, "three replicas")
    before = app.pids("prefill") | app.pids("decode")
    async with app.wave(**LONG_PROMPTS):
        await app.until(lambda: app.roles() == ["decode", "prefill", "prefill"], 30, "a decode replica prefills")
    async with app.wave(**LONG_OUTPUTS):
        await app.until(lambda: app.roles() == ["decode", "decode", "prefill"], 30, "it decodes again")
    assert set(app.ended) == {"whole"}
    assert app.pids("prefill") | app.pids("decode") == before


async def test_an_idle_model_sleeps_and_its_clients_wake_it(app: Application) -> None:
    """They are told when to come again, as no engine starts within `max_wake_s`, and come as OpenAI's clients do."""
    sleepy = {"autoscaling": {**QUICKLY, "min_replicas": 0}}
    await asyncio.to_thread(app.deploy, sleepy, sleepy)
    await app.until(lambda: app.state() == "asleep", 60, "the model sleeps")
    assert app.status() == (200, "healthy")
    assert app.targets() == {"prefill": 0, "decode": 0}
    assert "asleep" in app.plan("decode-tiny")["reason"]
    refused: list[httpx.Response] = []

    async def ask(http: httpx.AsyncClient) -> httpx.Response:
        while True:
            answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 3})
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return answer
            refused.append(answer)

    async with app.watching("decode") as seen, app.client() as http, asyncio.timeout(60):
        answers = await asyncio.gather(*(ask(http) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    assert seen <= {0, 1}, "each request wakes a replica of its own"
    assert app.count("baton_wake_seconds_count") >= 1
    await app.until(lambda: app.state() == "ready", 30, "prefill has woken too")
