"""SGLang with prefill and decode on a GPU each, and an aggregated SGLang beside decode to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import wait_until
from tests.engine_contract import EngineContract
from tests.engines.conftest import SGLANG_AGGREGATED, Baton, engine_processes, make_prompt
from tests.engines.test_faults import test_killed_decode_replica_takes_its_engine_along_and_comes_back
from tests.engines.test_routing import (
    test_a_conversation_is_routed_to_where_its_history_lies_and_moves_only_what_decode_lacks,
    test_what_is_cached_is_what_the_router_expects,
)
from tests.engines.test_serving import (
    test_a_client_that_goes_away_during_decode_leaves_nothing_behind,
    test_a_client_that_goes_away_during_prefill_leaves_nothing_behind,
    test_kv_really_moves,
    test_usage_reports_cached_tokens,
)
from tests.engines.test_transfer import test_verify_fails_on_wrong_kv, test_verify_passes
from tests.gpu.conftest import Platform, serving_models, sglang_models

__all__ = [
    "test_a_client_that_goes_away_during_decode_leaves_nothing_behind",
    "test_a_client_that_goes_away_during_prefill_leaves_nothing_behind",
    "test_a_conversation_is_routed_to_where_its_history_lies_and_moves_only_what_decode_lacks",
    "test_killed_decode_replica_takes_its_engine_along_and_comes_back",
    "test_kv_really_moves",
    "test_usage_reports_cached_tokens",
    "test_verify_fails_on_wrong_kv",
    "test_verify_passes",
    "test_what_is_cached_is_what_the_router_expects",
]

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def sglang(serve_url: str, opened_workers: None, platform: Platform) -> Iterator[Baton]:
    if not platform.sglang_python:
        pytest.skip("--sglang-python names no interpreter with SGLang")
    yield from serving_models(platform, serve_url, sglang_models(platform))


@pytest.fixture(scope="module", name="real")
def real_is_sglang(sglang: Baton) -> Baton:
    return sglang


@pytest.fixture(scope="module", name="baton")
def baton_is_sglang(sglang: Baton) -> Baton:
    return sglang


@pytest.fixture(scope="module", name="served")
def only_sglang_is_served(sglang: Baton) -> tuple[Baton, ...]:
    return (sglang,)


class TestContract(EngineContract):
    pass


def test_the_aggregated_model_answers_alone(sglang: Baton) -> None:
    before = sglang.stats("decode")["num_transfers"]
    assert sglang.complete(make_prompt(640), model=SGLANG_AGGREGATED).usage.completion_tokens == 16
    assert sglang.stats("decode")["num_transfers"] == before


def test_killed_prefill_engine_is_said_and_comes_back(sglang: Baton) -> None:
    """Decode cannot prefill: requests are refused, those of the aggregated model are not, and prefill comes back."""
    for process in engine_processes(sglang.replica_process("prefill")):
        process.kill()
    wait_until(lambda: sglang.health()["state"] == "unavailable", 30, "said by /health")
    assert sglang.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 503
    assert sglang.complete(make_prompt(64), model=SGLANG_AGGREGATED).usage.completion_tokens == 16
    sglang.wait_until_healthy()
    before = sglang.count_prefills("remote")
    sglang.complete(make_prompt(640))
    assert sglang.count_prefills("remote") > before
