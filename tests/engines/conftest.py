"""One application with every engine, started once: the contract is the same for all of them.

Real vLLM and real SGLang engines with real NIXL, prefill and decode apart, SGLang aggregated beside them, and sim.
tests/gpu runs the same tests on applications of its own.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
import yaml
from ray import serve

from app.engine_defaults import cpu_dtype
from benchmarks.faults.fleet import ENGINE_TITLES
from tests.conftest import REPOSITORY, wait_until
from tests.engine_contract import Pair
from tests.engines import workers
from tests.engines.engine_process import EngineProcess, engine_process, vllm_spec

START_TIMEOUT_S = 600.0
CONFIG = REPOSITORY / "cluster" / "local" / "two-engines.yaml"
SGLANG_AGGREGATED = "tiny-sglang-aggregated"
SIM = "tiny-sim"
LONG_PROMPT_TOKENS = 3500
DRAIN_S = 0.5


class Pace(NamedTuple):
    """How fast this machine is, seen by a client of one model; seconds."""

    prompt_s: float
    """From a prompt of LONG_PROMPT_TOKENS to its first token: an engine computes it in one or two steps."""
    token_s: float
    """Between two tokens of a sequence that runs alone."""

    @property
    def settle_s(self) -> float:
        """How soon after a client went away nothing may be left of its request.

        Both engines look once a step.  1.5 s is the promise where such a prompt takes half a second or less (two
        idle cores with AVX512-BF16, or a GPU); slower machines get three times what it takes there.
        """
        return max(1.5, 3 * self.prompt_s)


class Baton:
    """One disaggregated model of the running application, seen over HTTP."""

    def __init__(self, url: str, model: str, engine: str, dtype: str | None = None) -> None:
        self.url = url
        self.model = model
        self.engine = engine
        self.dtype = dtype or cpu_dtype()
        self.tolerance = 0.001 if engine != "vllm" else 0.03
        """The logprob difference at which `baton verify` has to pass."""
        self.http = httpx.Client(base_url=url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    def close(self) -> None:
        self.http.close()
        self.openai.close()

    @property
    def tells_its_cache(self) -> bool:
        """Whether decode publishes events of its prefix cache; SGLang before it knew `cache_salt` cannot."""
        return any(
            endpoint["prefix_cache"] == "published" for endpoint in self.endpoints() if endpoint["role"] == "decode"
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """The tiny model: 4 layers x (K and V) x 2 heads x 64 of its dtype; sim has its profile's."""
        return 131072 if self.engine == "sim" else 1024 * {"bfloat16": 2, "float32": 4}[self.dtype]

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """A text completion, greedy unless said otherwise."""
        fields = {"temperature": 0, "max_tokens": 16, "model": self.model, **fields}
        return self.openai.completions.create(prompt=prompt, **fields)

    def complete_without_transfer(self, prompt: Any, *, salt: str, **fields: Any) -> Any:
        """The same completion from an engine that prefilled the prompt itself."""
        body: dict[str, Any] = {**fields.pop("extra_body", {}), "cache_salt": salt}
        if self.engine == "sglang":  # whose decode engine cannot prefill
            return self.complete(prompt, model=SGLANG_AGGREGATED, extra_body=body, **fields)
        return self.complete(prompt, extra_body={**body, "vllm_xargs": {"baton_prefill": "local"}}, **fields)

    def post(self, path: str, **fields: Any) -> httpx.Response:
        return self.http.post(path, json={"model": self.model, **fields})

    def health(self) -> dict[str, Any]:
        """What /health says of this model."""
        models = {model["name"]: model for model in self.http.get("/health").json()["models"]}
        found: dict[str, Any] = models[self.model]
        return found

    def endpoints(self) -> list[dict[str, Any]]:
        report = self.http.get("/health").json()
        return [endpoint for endpoint in report["endpoints"] if endpoint["model"] == self.model]

    def stats(self, role: str) -> dict[str, Any]:
        """Of the only replica of a role."""
        replicas = self.http.get("/stats").json()["replicas"]
        found: list[dict[str, Any]] = [r for r in replicas if r["role"] == role and r["model"] == self.model]
        assert len(found) == 1, found
        return found[0]

    def is_idle(self) -> bool:
        """Whether the engines of both roles live, run no request and hold no KV block."""
        replicas = self.http.get("/stats").json()["replicas"]
        loads = [r for r in replicas if r["model"] == self.model and r["role"] in ("prefill", "decode")]
        counts = [load.get(name) for load in loads for name in ("num_running", "num_waiting", "num_used_blocks")]
        return counts == [0] * 6

    def count_prefills(self, kind: str, reason: str = "") -> float:
        """How many prompts were prefilled so since the frontend started."""
        return self._metric(f'baton_prefills_total{{kind="{kind}",model="{self.model}",reason="{reason}"}}')

    def count_resumed(self, reason: str = "lost") -> float:
        """How often a sequence went on elsewhere since the frontend started."""
        return self._metric(f'baton_resume_gap_seconds_count{{model="{self.model}",reason="{reason}"}}')

    def _metric(self, sample: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(sample):
                return float(line.split()[-1])
        return 0.0

    def handle(self, role: str) -> Any:
        """Of a pool's deployment."""
        return _handle(f"{role}-{self.model}")

    def engine_of(self, role: str) -> workers.EngineOfReplica:
        """The engine of the only replica of a role."""
        return workers.EngineOfReplica(self.handle(role), self.stats(role)["replica_id"])

    def replica_process(self, role: str) -> psutil.Process:
        pids = [endpoint["pid"] for endpoint in self.endpoints() if endpoint["role"] == role]
        assert len(pids) == 1, pids
        return psutil.Process(pids[0])

    def wait_until_healthy(self) -> None:
        wait_until(lambda: self.health()["state"] == "ready", START_TIMEOUT_S, f"{self.model} ready")

    def wait_until_quiet(self) -> None:
        """Ready, with one replica of each role, and idle."""
        pools = {"prefill": {"ready": 1, "reachable": 1}, "decode": {"ready": 1, "reachable": 1}}
        wait_until(lambda: self.health()["pools"] == pools and self.is_idle(), START_TIMEOUT_S, f"{self.model} quiet")

    @functools.cached_property
    def pace(self) -> Pace:
        """Measured once, on an application that is otherwise idle."""
        prompts = [random.Random(seed).choices(range(300, 2000), k=LONG_PROMPT_TOKENS) for seed in range(900, 903)]
        firsts, tokens = zip(*(self._time(prompt) for prompt in prompts), strict=True)
        return Pace(prompt_s=statistics.median(firsts), token_s=statistics.median(tokens))

    def _time(self, prompt: list[int]) -> tuple[float, float]:
        """Seconds to the first chunk, and for each further token."""
        num_tokens = 21
        options: dict[str, Any] = {"max_tokens": num_tokens, "extra_body": {"ignore_eos": True}, "stream": True}
        began = time.monotonic()
        moments = [time.monotonic() - began for _ in self.complete(prompt, **options)]
        return moments[0], (moments[-1] - moments[0]) / (num_tokens - 1)


PAUSE_S = 0.2
"""Between the requests of a thread of `Load`: without it they would take all of the CPU from an engine that starts."""


class Load:
    """Requests, one after another on each of some threads, until told to stop.

    They ask for remote prefill: which way is quicker depends on the host, and tests of faults need KV that moves.
    """

    def __init__(self, baton: Baton, num_threads: int = 4) -> None:
        self._baton = baton
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(num_threads)
        self._workers = [self._pool.submit(self._work, n) for n in range(num_threads)]
        self.num_done = 0

    def _work(self, worker: int) -> None:
        number = 0
        while not self._stop.wait(PAUSE_S):
            number += 1
            prompt = [300 + worker, 300 + number % 1000, *range(500, 900)]
            body = {"ignore_eos": True, "vllm_xargs": {"baton_prefill": "remote"}}
            answer = self._baton.complete(prompt, max_tokens=16, extra_body=body)
            assert answer.usage.completion_tokens == 16
            self.num_done += 1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._pool.shutdown()

    def check(self) -> None:
        """Raise what any request raised."""
        for worker in self._workers:
            worker.result(timeout=60)


@functools.cache
def _handle(deployment: str) -> Any:
    """Whose router has an event loop of its own, as each test has another."""
    handle = serve.get_deployment_handle(deployment, "baton")
    handle._init(_run_router_in_separate_loop=True)
    return handle


def engine_processes(replica: psutil.Process) -> list[psutil.Process]:
    """The engine core or the scheduler and what works for it: the replica's descendants."""
    return [process for process in replica.children(recursive=True) if is_of_engine(process)]


def is_of_engine(process: psutil.Process) -> bool:
    """Whether it calls itself so; the replica's guard is no part of the engine."""
    return " ".join(process.cmdline()).startswith(ENGINE_TITLES)


@pytest.fixture(scope="package")
def opened_workers() -> Iterator[None]:
    """Replicas are such that a test can call their engines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deployments.replica.worker.PrefillWorker", workers.OpenedPrefill)
        patch.setattr("deployments.replica.worker.DecodeWorker", workers.OpenedDecode)
        patch.setattr("deployments.replica.worker.AggregatedWorker", workers.OpenedAggregated)
        yield


class Application(NamedTuple):
    """The application of all models."""

    url: str
    arguments: dict[str, Any]
    replicas: list[dict[str, Any]]
    """What /stats told of them when all were ready, before any request."""


@pytest.fixture(scope="package")
def application(serve_url: str, opened_workers: None) -> Iterator[Application]:
    """Ends with the tests of this folder: idle as its engines are, they would take CPU time from all that follow."""
    os.environ.pop("MODEL", None)
    arguments = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    for model in arguments["models"]:
        model["routing"] = {"placement": {"policy": "remote"}}  # what the tests are about
    next(model for model in arguments["models"] if model["name"] == "tiny")["decode"]["drain_s"] = DRAIN_S
    split = next(model for model in arguments["models"] if model["name"] == "tiny-sglang")
    arguments["models"].append({**split, "name": SGLANG_AGGREGATED, "prefill": None})
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    options = {"max_model_len": 4096, "profile": "h200-llama-8b", "num_blocks": 2048}
    server = split["server_args"]
    arguments["models"].append(
        {
            "name": SIM,
            "source": "baton:tiny",
            "engine_args": options,
            "server_args": server,
            "routing": {"placement": {"policy": "remote"}},
            "prefill": pool,
            "decode": pool,
        }
    )
    arguments["transfer"]["required_transport"] = "shm"  # so decode is ready only once it has moved KV by that
    with serving(arguments, serve_url):
        yield Application(serve_url, arguments, httpx.get(f"{serve_url}/stats").json()["replicas"])


@contextmanager
def serving(arguments: dict[str, Any], url: str) -> Iterator[None]:
    """Serve the application with these arguments at `url` while the block runs."""
    from deployments.build import build

    serve.run(build(arguments), name="baton", route_prefix="/", external_scaler_enabled=True)
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "healthy", START_TIMEOUT_S, "all models ready")
    yield
    serve.delete("baton")


def running(url: str, model: str, engine: str, dtype: str | None = None) -> Iterator[Baton]:
    baton = Baton(url, model, engine, dtype)
    baton.wait_until_healthy()
    yield baton
    baton.close()


@pytest.fixture(scope="package")
def vllm(application: Application) -> Iterator[Baton]:
    yield from running(application.url, "tiny", "vllm")


@pytest.fixture(scope="package")
def sglang(application: Application) -> Iterator[Baton]:
    yield from running(application.url, "tiny-sglang", "sglang")


@pytest.fixture(scope="package")
def sim(application: Application) -> Iterator[Baton]:
    yield from running(application.url, SIM, "sim")


@pytest.fixture(scope="package")
def served(vllm: Baton, sglang: Baton) -> tuple[Baton, ...]:
    """The models that a fault may reach."""
    return vllm, sglang


@pytest.fixture(scope="package", params=["vllm", "sglang"])
def real(request: pytest.FixtureRequest) -> Baton:
    """Each engine that computes."""
    baton: Baton = request.getfixturevalue(request.param)
    return baton


@pytest.fixture(scope="package", params=["vllm", "sglang", "sim"])
def baton(request: pytest.FixtureRequest) -> Baton:
    """Each engine."""
    found: Baton = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="package")
def engine_pair() -> Iterator[tuple[EngineProcess, EngineProcess]]:
    """A prefill and a decode engine of vLLM without Ray, for tests that stop one, spoil its KV, or need float32."""
    spoilable = vllm_spec("decode", worker_extension_cls="tests.engines.corruption.Corruption")
    with (
        engine_process("vllm", vllm_spec("prefill")) as prefill,
        engine_process("vllm", spoilable) as decode,
    ):
        yield prefill, decode


@pytest.fixture
def prefill(engine_pair: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return engine_pair[0]


@pytest.fixture
def decode(engine_pair: tuple[EngineProcess, EngineProcess]) -> EngineProcess:
    return engine_pair[1]


def make_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(300, 2000), k=num_tokens)


@pytest.fixture
async def pair(real: Baton) -> Pair:
    """The engines of a model, for tests/engine_contract.py."""
    real.wait_until_healthy()
    prefill, decode = real.engine_of("prefill"), real.engine_of("decode")
    is_vllm = real.engine == "vllm"
    pair = Pair(
        prefill,
        decode,
        make_prompt,
        num_tokens_of_slow=LONG_PROMPT_TOKENS,
        can_decode_prefill=is_vllm,
        can_prefill_decode=is_vllm,
        is_exact=real.dtype == "float32",
        keeps_kv=is_vllm,
    )
    await pair.until_idle()
    return pair
