"""Engines and replicas are killed while they serve.  After each test all replicas are ready and idle again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from threading import Semaphore
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
from ray.exceptions import RayActorError

from app.cli.verify import compare_output
from app.engines import progress
from app.errors import EngineDead, ReplicaLost
from tests.conftest import eventually, wait_until
from tests.engines.conftest import SGLANG_AGGREGATED, START_TIMEOUT_S, Baton, Load, engine_processes
from tests.engines.workers import EngineOfReplica

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def healed(served: tuple[Baton, ...]) -> Iterator[None]:
    """Wait before and after each test until all is ready and nothing runs, so that tests may run in any order."""
    for each in served:
        each.wait_until_quiet()
    yield
    for each in served:
        each.wait_until_quiet()


def test_prefill_engine_killed_under_load_fails_no_request(vllm: Baton) -> None:
    replica = vllm.replica_process("prefill")
    with Load(vllm) as load:
        wait_until(lambda: load.num_done >= 4, 60, "load")
        for process in engine_processes(replica):
            process.kill()
        # By then a prefill was under way, or none was and frontends know already that this replica is of no use.
        wait_until(lambda: sum(vllm.count_prefills("local", why) for why in WITHOUT_PREFILL) > 0, 30, "local prefill")
        wait_until(lambda: not replica.is_running(), 60, "Serve gave the replica up")
        vllm.wait_until_healthy()
        remote = vllm.count_prefills("remote")
        wait_until(lambda: vllm.count_prefills("remote") > remote, START_TIMEOUT_S, "remote prefill again")
    load.check()


WITHOUT_PREFILL = ("prefill_failed", "no_prefill_replica")


def test_sglang_without_its_prefill_engine_says_so_and_harms_no_other_model(sglang: Baton, vllm: Baton) -> None:
    """Decode cannot prefill, so the model is down.  Requests fail at once, and when prefill is back nothing is left."""
    processes = engine_processes(sglang.replica_process("prefill"))
    long = random.Random(9).choices(range(300, 2000), k=3500)
    with ThreadPoolExecutor(4) as pool, Load(vllm) as load:
        under_way = [pool.submit(sglang.post, "/v1/completions", prompt=[n, *long], max_tokens=8) for n in range(4)]
        wait_until(lambda: not sglang.is_idle(), 30, "requests under way", every_s=0.01)
        for process in processes:
            process.kill()
        began = time.monotonic()
        answers = [future.result() for future in under_way]
        assert {answer.status_code for answer in answers} <= {200, 502, 503}
        assert 503 in {answer.status_code for answer in answers}
        assert time.monotonic() - began < 15, "noticed within seconds"
        wait_until(lambda: sglang.health()["state"] == "unavailable", 15, "said by /health")
        assert vllm.health()["state"] == "ready"
        assert sglang.http.get("/health").json()["status"] == "degraded"
        done = load.num_done
        wait_until(lambda: load.num_done > done + 4, 60, "the other model goes on")
        sglang.wait_until_healthy()
    load.check()
    wait_until(sglang.is_idle, 30, "nothing left of the requests that failed")
    answer = sglang.complete(long, max_tokens=8, logprobs=0)
    reference = sglang.complete_without_transfer(long, salt="after", max_tokens=8, logprobs=0)
    assert answer.choices[0].logprobs.token_logprobs == reference.choices[0].logprobs.token_logprobs


class WithoutDecode(NamedTuple):
    """What a model with one decode replica is while that one is gone."""

    state: str
    status: int
    """Of a request."""
    goes_on: bool
    """Whether its streams do."""


WITHOUT_DECODE = {
    "vllm": WithoutDecode("degraded", 200, goes_on=True),  # its prefill engine serves whole requests
    "sglang": WithoutDecode("unavailable", 503, goes_on=False),
}


def test_killed_decode_replica_takes_its_engine_along_and_comes_back(real: Baton) -> None:
    replica = real.replica_process("decode")
    engine = engine_processes(replica)
    assert engine
    expected = WITHOUT_DECODE[real.engine]
    resumed = real.count_resumed()
    with streaming(real, 4) as streams, Load(real) if expected.goes_on else nullcontext() as load:
        engine[0].suspend()  # it cannot notice by itself that its replica is gone
        replica.kill()
        _, alive = psutil.wait_procs(engine, timeout=10)
        assert not alive, "an engine outlives its replica"
        wait_until(lambda: real.health()["state"] == expected.state, 30, "without decode")
        check_answer(real, expected)
        check_streams(real, streams, expected)
        real.wait_until_healthy()
    if load is not None:
        load.check()
        assert real.count_resumed() >= resumed + len(streams)
    assert real.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 200
    before = real.count_prefills("remote")
    real.complete("Hello again")
    assert real.count_prefills("remote") > before


def test_a_decode_engine_that_hangs_is_out_of_routing_soon_and_replaced(real: Baton) -> None:
    """A stopped process is there, but makes no step; with tensor parallelism, or by a deadlock, others hang with it."""
    replica = real.replica_process("decode")
    engine = engine_processes(replica)
    step_s = real.pace.settle_s  # no step of the engine has taken longer
    patience_s = min(progress.IDLE_CEILING_S, max(progress.IDLE_FLOOR_S, progress.PATIENCE * step_s))
    soon_s = progress.REST_S + patience_s + 5
    expected = WITHOUT_DECODE[real.engine]
    with streaming(real, 6) as streams:
        engine[-1].suspend()
        began = time.monotonic()
        wait_until(lambda: real.health()["state"] == expected.state, soon_s, "out of routing")
        check_answer(real, expected)
        check_streams(real, streams, expected)
        print(f"{real.engine}: out of routing and all streams ended {time.monotonic() - began:.1f} s after the stop")
    _, alive = psutil.wait_procs([*engine, replica], timeout=60)
    assert all(map(has_ended, alive)), "a process is left"
    real.wait_until_healthy()
    print(f"{real.engine}: replaced after {time.monotonic() - began:.1f} s")
    assert real.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 200


def check_answer(baton: Baton, expected: WithoutDecode) -> None:
    """Send a request that demands what cannot be done without decode."""
    reason = "no_decode_replica"
    before = baton.count_prefills("local", reason)
    body = {"prompt": "Hello", "max_tokens": 4, "vllm_xargs": {"baton_prefill": "remote"}}
    answer = baton.post("/v1/completions", **body)
    assert answer.status_code == expected.status, answer.text
    if expected.goes_on:
        assert answer.json()["usage"]["completion_tokens"] <= 4
        assert baton.count_prefills("local", reason) > before
    else:
        assert answer.json()["error"]["code"] == expected.status


class Streamed(NamedTuple):
    """What came of a streamed answer."""

    is_whole: bool
    longest_gap_s: float
    """The longest time between two of its tokens."""


STREAM_TOKENS, ENDLESS = 300, 3000
"""More than an engine generates until the test has done to it what it does, and more than in the whole test."""


@contextmanager
def streaming(baton: Baton, num: int) -> Iterator[list[Future[Streamed]]]:
    """Have `num` answers under way while the block runs: each has a token when it begins."""
    first_tokens = Semaphore(0)
    with ThreadPoolExecutor(num) as pool:
        streams = [pool.submit(stream, baton, number, first_tokens) for number in range(num)]
        for _ in streams:
            assert first_tokens.acquire(timeout=60)
        yield streams


def stream(baton: Baton, number: int, first_tokens: Semaphore) -> Streamed:
    wanted = STREAM_TOKENS if WITHOUT_DECODE[baton.engine].goes_on else ENDLESS
    options: dict[str, Any] = {"max_tokens": wanted, "extra_body": {"ignore_eos": True}, "stream": True}
    moments, num_tokens, end = [], 0, None
    try:
        for chunk in baton.complete([400 + number, *range(500, 600)], logprobs=0, **options):
            moments.append(time.monotonic())
            num_tokens += len(chunk.choices[0].logprobs.tokens) if chunk.choices[0].logprobs else 0
            end = chunk.choices[0].finish_reason
            if len(moments) == 1:
                first_tokens.release()
    except (openai.APIError, httpx.HTTPError):
        end = None
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    return Streamed(end == "length" and num_tokens == wanted, max(gaps, default=0.0))


def check_streams(baton: Baton, streams: Sequence[Future[Streamed]], expected: WithoutDecode) -> None:
    """Those that have lost decode end as expected."""
    ended = [each.result(timeout=START_TIMEOUT_S) for each in streams]
    assert {each.is_whole for each in ended} == {expected.goes_on}
    if expected.goes_on:
        print(f"{baton.engine}: the longest stall of a stream took {max(each.longest_gap_s for each in ended):.2f} s")


def test_verify_passes_after_restarts(sglang: Baton) -> None:
    assert compare_output(
        sglang.url, model=sglang.model, reference=SGLANG_AGGREGATED, corrupt_kv=False, tolerance=0.001, seed=3
    )


DEAD = (EngineDead, ReplicaLost, RayActorError)
"""The exceptions for a dead engine: Serve may have given its replica up meanwhile, or SGLang may have ended it."""


async def test_an_engine_that_has_ended_says_so(real: Baton) -> None:
    """One is stopped, the other one dies; both at once, as each takes a replica to start anew."""
    stopped, killed = real.engine_of("prefill"), real.engine_of("decode")
    processes = {role: engine_processes(real.replica_process(role)) for role in ("prefill", "decode")}
    assert processes["prefill"]
    await killed.check_health()
    for _ in range(2):
        await stopped.stop()
    for process in processes["decode"]:
        process.kill()
    wait_until(lambda: all(map(has_ended, processes["prefill"])), 10, "a stopped engine leaves no process behind")
    for engine in (stopped, killed):
        await eventually(partial(says_it_ended, engine), 5, "the end is said")
    with pytest.raises(DEAD):
        await killed.stats()


async def says_it_ended(engine: EngineOfReplica) -> bool:
    with suppress(*DEAD):
        await engine.check_health()
        return False
    return True


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process has ended, even if its living parent has not waited for it."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True
