"""vLLM with prefill and decode on a GPU each: the tests of tests/engines that hold there too, and a few more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import wait_until
from tests.engine_contract import EngineContract
from tests.engines.conftest import LONG_PROMPT_TOKENS, Baton, make_prompt
from tests.engines.test_faults import (
    test_an_engine_that_has_ended_says_so,
    test_killed_decode_replica_takes_its_engine_along_and_comes_back,
    test_prefill_engine_killed_under_load_fails_no_request,
)
from tests.engines.test_routing import (
    test_a_conversation_is_routed_to_where_its_history_lies_and_moves_only_what_decode_lacks,
    test_an_answer_that_was_decoded_here_is_cached_for_a_local_prefill,
    test_what_is_cached_is_what_the_router_expects,
)
from tests.engines.test_serving import (
    test_a_client_that_goes_away_during_decode_leaves_nothing_behind,
    test_a_client_that_goes_away_during_prefill_leaves_nothing_behind,
    test_a_client_that_goes_away_from_a_whole_answer_leaves_nothing_behind,
    test_health_names_every_endpoint,
    test_kv_really_moves,
    test_usage_reports_cached_tokens,
)
from tests.engines.test_transfer import (
    test_descriptor_is_small,
    test_kv_never_enters_the_object_store,
    test_verify_fails_on_wrong_kv,
    test_verify_passes,
)
from tests.gpu.conftest import Platform, serving_models, vllm_model

__all__ = [
    "test_a_client_that_goes_away_during_decode_leaves_nothing_behind",
    "test_a_client_that_goes_away_during_prefill_leaves_nothing_behind",
    "test_a_client_that_goes_away_from_a_whole_answer_leaves_nothing_behind",
    "test_a_conversation_is_routed_to_where_its_history_lies_and_moves_only_what_decode_lacks",
    "test_an_answer_that_was_decoded_here_is_cached_for_a_local_prefill",
    "test_an_engine_that_has_ended_says_so",
    "test_descriptor_is_small",
    "test_health_names_every_endpoint",
    "test_killed_decode_replica_takes_its_engine_along_and_comes_back",
    "test_kv_never_enters_the_object_store",
    "test_kv_really_moves",
    "test_prefill_engine_killed_under_load_fails_no_request",
    "test_usage_reports_cached_tokens",
    "test_verify_fails_on_wrong_kv",
    "test_verify_passes",
    "test_what_is_cached_is_what_the_router_expects",
]

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def vllm(serve_url: str, opened_workers: None, platform: Platform) -> Iterator[Baton]:
    yield from serving_models(platform, serve_url, [vllm_model(platform, "tiny")], platform.required_transport)


@pytest.fixture(scope="module", name="real")
def real_is_vllm(vllm: Baton) -> Baton:
    return vllm


@pytest.fixture(scope="module", name="baton")
def baton_is_vllm(vllm: Baton) -> Baton:
    return vllm


@pytest.fixture(scope="module", name="served")
def only_vllm_is_served(vllm: Baton) -> tuple[Baton, ...]:
    return (vllm,)


class TestContract(EngineContract):
    pass


def test_kv_moves_between_gpus_by_cuda_ipc(vllm: Baton, platform: Platform) -> None:
    if platform.device == "cpu":
        pytest.skip("a CPU has no cuda_ipc")
    before = vllm.count_prefills("remote")
    vllm.complete(make_prompt(640))
    assert vllm.count_prefills("remote") == before + 1
    assert re.search(r"cuda_ipc/cuda \(.*zero-copy", vllm.stats("decode")["transport"])  # a table, not lanes


def test_kv_moves_by_the_required_transport(vllm: Baton) -> None:
    """`--required-transport` says which; an application that requires another one is in test_transport.py."""
    remote = vllm.count_prefills("remote")
    for _ in range(3):
        vllm.complete(make_prompt(640))
    assert vllm.count_prefills("remote") == remote + 3


def test_a_seed_gives_the_same_answer_again(vllm: Baton) -> None:
    prompt = make_prompt(300)

    def answer(seed: int, salt: str) -> str:
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 24}
        text: str = (
            vllm.complete(prompt, extra_body={"cache_salt": salt, "ignore_eos": True}, **options).choices[0].text
        )
        return text

    first, again, other = answer(7, "first"), answer(7, "again"), answer(8, "other")
    assert first == again
    assert first != other


@pytest.mark.parametrize("moment", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.6])
def test_a_client_that_goes_away_at_any_moment_leaves_nothing_behind(vllm: Baton, moment: float) -> None:
    """The moments are shares of the time to the first token: in prefill, around the transfer, and in decode."""
    wait_until(vllm.is_idle, 40, "idle before")
    body = {"model": vllm.model, "prompt": make_prompt(LONG_PROMPT_TOKENS), "max_tokens": 500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        vllm.http.post("/v1/completions", json=body, timeout=moment * vllm.pace.prompt_s)
    wait_until(vllm.is_idle, vllm.pace.settle_s, "both engines idle and without blocks")
