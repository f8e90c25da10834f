"""vLLM gets a second decode replica, replicas change their roles, and one goes again: no answer changes."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Semaphore
from typing import Any

import psutil
import pytest
import ray
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from app.cli.verify import Case, GreedyOutput
from app.replica_bounds import Bounds
from deployments.serve_hooks import serve_details
from deployments.switch import switch
from tests.conftest import wait_until
from tests.engines.conftest import START_TIMEOUT_S, Application, Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]

NUM_STREAMS = 4
PROMPTS = [random.Random(seed).choices(range(300, 2000), k=200) for seed in range(40, 40 + NUM_STREAMS)]
OUTPUT_TOKENS = 600


def generate(baton: Baton, prompt: list[int], first_tokens: Semaphore) -> GreedyOutput:
    """Stream a greedy answer, and release `first_tokens` with its first token.

    It has a salt of its own: all would go to the replica that has the prompts cached.
    """
    whole = GreedyOutput([], [], [])
    body = {"ignore_eos": True, "return_tokens_as_token_ids": True, "cache_salt": uuid.uuid4().hex}
    for chunk in baton.complete(prompt, max_tokens=OUTPUT_TOKENS, logprobs=2, stream=True, extra_body=body):
        if (logprobs := chunk.choices[0].logprobs) is not None:
            if not whole.token_ids:
                first_tokens.release()
            whole.token_ids.extend(logprobs.tokens)
            whole.logprobs.extend(logprobs.token_logprobs)
            for candidates in logprobs.top_logprobs:
                best, second, *_ = sorted(candidates.values(), reverse=True)
                whole.margins.append(best - second)
    return whole


@contextmanager
def streaming(baton: Baton, right: list[GreedyOutput]) -> Iterator[None]:
    """Have all answers under way when the block begins, and compare them with `right`, if that has any, in the end.

    In bfloat16 a token may be another one where the two likeliest are as close as other batches make them.
    """
    first_tokens = Semaphore(0)
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        answers: list[Future[GreedyOutput]] = [pool.submit(generate, baton, each, first_tokens) for each in PROMPTS]
        for _ in answers:
            assert first_tokens.acquire(timeout=120)
        yield
    found = [answer.result() for answer in answers]
    assert [len(each.token_ids) for each in found] == [OUTPUT_TOKENS] * NUM_STREAMS
    for number, (one, other) in enumerate(zip(found, right, strict=False)):
        case = Case(f"{number}", len(PROMPTS[number]), one, other, noise=0.0)
        assert case.passes(baton.tolerance), f"answer {number} differs after {one.num_equal(other)} tokens"
    right.extend(found[len(right) :])


def scale(baton: Baton, num: int) -> None:
    """Tell Serve how many decode replicas there are to be, as `baton scale` does."""
    controller: Any = _get_global_client()._controller
    ray.get(controller.update_deployment_replicas.remote(DeploymentID(f"decode-{baton.model}", "baton"), num))


def until_pools_are(baton: Baton, prefill: int, decode: int) -> None:
    def are() -> bool:
        pools = baton.health()["pools"]
        return (pools["prefill"]["reachable"], pools["decode"]["reachable"]) == (prefill, decode)

    wait_until(are, START_TIMEOUT_S, f"{prefill} prefill and {decode} decode", every_s=0.05)


def test_a_decode_replica_comes_changes_its_role_and_goes_while_answers_stay_the_same(
    application: Application, vllm: Baton
) -> None:
    documents = [{"name": "baton", "args": application.arguments}]
    right: list[GreedyOutput] = []
    with streaming(vllm, right):
        pass
    scale(vllm, 2)
    until_pools_are(vllm, 1, 2)
    with streaming(vllm, right):
        for prefill, decode in ((2, 1), (1, 2)):
            targets = {"prefill": Bounds(prefill, prefill), "decode": Bounds(decode, decode)}
            print(*switch(documents, serve_details(), vllm.model, targets, START_TIMEOUT_S), sep="\n")
            until_pools_are(vllm, prefill, decode)
    pids = {endpoint["pid"] for endpoint in vllm.endpoints() if endpoint["home"] == "decode"}
    drained = vllm.count_resumed("drained")
    with streaming(vllm, right):
        began = time.monotonic()
        scale(vllm, 1)
        wait_until(lambda: sum(map(psutil.pid_exists, pids)) == 1, START_TIMEOUT_S, "one is gone", every_s=0.05)
        print(f"the replica was gone after {time.monotonic() - began:.1f} s")
    assert vllm.count_resumed("drained") > drained
    vllm.wait_until_quiet()
