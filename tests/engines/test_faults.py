"""Engines and replicas are killed while they serve.  After each test all replicas are ready and idle again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Semaphore
from typing import Any

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


def test_killed_decode_replica_takes_its_engine_along_and_comes_back(real: Baton) -> None:
    replica = real.replica_process("decode")
    engine = engine_processes(replica)
    assert engine
    engine[0].suspend()  # it cannot notice by itself that its replica is gone
    replica.kill()
    _, alive = psutil.wait_procs(engine, timeout=10)
    assert not alive, "an engine outlives its replica"
    wait_until(lambda: real.health()["state"] == "unavailable", 30, "unavailable without decode")
    refused = real.post("/v1/completions", prompt="Hello", max_tokens=4)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == 503
    real.wait_until_healthy()
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
    with ThreadPoolExecutor(6) as pool:
        first_tokens = Semaphore(0)
        streams = [pool.submit(stream, real, number, first_tokens) for number in range(6)]
        for _ in streams:
            assert first_tokens.acquire(timeout=60)
        engine[-1].suspend()
        began = time.monotonic()
        wait_until(lambda: real.health()["state"] == "unavailable", soon_s, "out of routing")
        refused = real.post("/v1/completions", prompt="Hello", max_tokens=4)
        assert refused.status_code == 503
        for each in streams:
            assert not each.result(timeout=soon_s), "its tokens could not come"
        print(f"{real.engine}: out of routing and all streams ended {time.monotonic() - began:.1f} s after the stop")
    _, alive = psutil.wait_procs([*engine, replica], timeout=60)
    assert all(map(has_ended, alive)), "a process is left"
    real.wait_until_healthy()
    print(f"{real.engine}: replaced after {time.monotonic() - began:.1f} s")
    assert real.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 200


def stream(baton: Baton, number: int, first_tokens: Semaphore) -> bool:
    """Stream an answer that is longer than the test.  Returns whether it came whole."""
    options: dict[str, Any] = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}, "stream": True}
    try:
        chunks = iter(baton.complete([400 + number, *range(500, 600)], **options))
        next(chunks)
        first_tokens.release()
        *_, last = chunks
        return bool(last.choices[0].finish_reason == "length")
    except (openai.APIError, httpx.HTTPError):
        return False


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
