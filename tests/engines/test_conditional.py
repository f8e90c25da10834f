"""Real SGLang with aggregated engines beside prefill and decode: the router has a choice, and a fallback.

This is a second application, cluster/local/sglang-conditional.yaml, beside that of the other tests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray import serve

from app.cli.verify import compare_output
from app.routing.placement import NEAR, NEAR_S
from tests.conftest import REPOSITORY, wait_until
from tests.engines.conftest import Baton, Load, engine_processes, running

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]

CONFIG = REPOSITORY / "cluster" / "local" / "sglang-conditional.yaml"


@pytest.fixture(scope="module")
def conditional(serve_url: str) -> Iterator[Baton]:
    from deployments.build import build

    arguments = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]
    serve.run(build(arguments), name="conditional", route_prefix="/conditional")
    yield from running(f"{serve_url}/conditional", "tiny", "sglang")
    serve.delete("conditional")


def explained(baton: Baton, prompt: list[int], mode: str = "auto") -> dict[str, Any]:
    answer = baton.http.post(
        "/v1/completions",
        json={"model": baton.model, "prompt": prompt, "max_tokens": 4, "vllm_xargs": {"baton_prefill": mode}},
        headers={"x-baton-explain": "1"},
    ).raise_for_status()
    found: dict[str, Any] = json.loads(answer.headers["x-baton-explain"])[0]
    return found


def new_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(300, 2000), k=num_tokens)


def test_it_goes_where_the_first_token_is_predicted_sooner(conditional: Baton) -> None:
    for num_tokens in (100, 400, 1600) * 2:
        for mode in ("remote", "local"):
            explained(conditional, new_prompt(num_tokens), mode)
    for num_tokens in (50, 200, 800, 3000):
        found = explained(conditional, new_prompt(num_tokens))
        remote, local = (way["ttft_ms"] + way["interference_ms"] for way in found["expected"]["ways"])
        is_local = local / NEAR + 1e3 * NEAR_S <= remote
        assert (found["kind"], found["reason"]) == ("local" if is_local else "remote", "faster")
        assert found["actual"]["kind"] == found["kind"]


def test_what_its_aggregated_engines_have_cached_is_what_the_router_expects(conditional: Baton) -> None:
    prompt = new_prompt(500)
    assert explained(conditional, prompt, "local")["actual"]["cached_tokens"] == 0
    found = explained(conditional, prompt, "local")
    assert found["aggregated"]["cached_tokens"] == found["actual"]["cached_tokens"] == 496
    assert explained(conditional, prompt, "remote")["expected"]["cached_tokens"] == 0


def test_verify_compares_with_the_aggregated_pool(conditional: Baton) -> None:
    assert compare_output(conditional.url, model=conditional.model, corrupt_kv=False, tolerance=0.001, seed=4)
    assert not compare_output(conditional.url, model=conditional.model, corrupt_kv=True, seed=4)


def test_prefill_engine_killed_under_load_fails_no_request(conditional: Baton) -> None:
    replica = conditional.replica_process("prefill")
    explained(conditional, new_prompt(100), "remote")
    with Load(conditional) as load:
        wait_until(lambda: load.num_done >= 4, 60, "load")
        for process in engine_processes(replica):
            process.kill()
        wait_until(lambda: conditional.health()["state"] == "degraded", 30, "said by /health")
        found = explained(conditional, new_prompt(100))
        assert (found["kind"], found["reason"], "aggregated" in found) == ("local", "no_prefill_replica", True)
        conditional.wait_until_healthy()
    load.check()
