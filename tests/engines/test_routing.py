"""The router knows what real engines have cached, and KV that decode holds is not moved again."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.engines.conftest import Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]

BLOCK_SIZES = {"vllm": 32, "sglang": 16, "sim": 16}
"""Block sizes in tokens, as in cluster/local/two-engines.yaml; sim's is its default."""


def new_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(300, 2000), k=num_tokens)


def served(baton: Baton, prompt: list[int], mode: str = "auto", **fields: Any) -> tuple[dict[str, Any], list[int]]:
    """Serve a completion of 40 tokens; return its explanation, and the token ids of prompt and answer."""
    body = {
        "prompt": prompt,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"baton_prefill": mode},
        **fields,
    }
    answer = baton.http.post(
        "/v1/completions", json={"model": baton.model, **body}, headers={"x-baton-explain": "1"}
    ).raise_for_status()
    explained: dict[str, Any] = json.loads(answer.headers["x-baton-explain"])[0]
    return explained, prompt + answer.json()["choices"][0]["token_ids"]


def cached(explained: dict[str, Any]) -> tuple[int, int]:
    """Return how many prompt tokens the router expected to be cached, and how many were."""
    return explained["expected"]["cached_tokens"], explained["actual"]["cached_tokens"]


def in_blocks(baton: Baton, num_tokens: int) -> int:
    """Round `num_tokens` down to whole blocks."""
    return num_tokens // BLOCK_SIZES[baton.engine] * BLOCK_SIZES[baton.engine]


def test_what_is_cached_is_what_the_router_expects(baton: Baton) -> None:
    prompt = new_prompt(500)
    assert cached(served(baton, prompt)[0]) == (0, 0)
    assert cached(served(baton, prompt)[0]) == (in_blocks(baton, 499),) * 2
    assert cached(served(baton, prompt[:300] + new_prompt(200))[0]) == (in_blocks(baton, 300),) * 2
    assert cached(served(baton, prompt, cache_salt="other")[0]) == (0, 0)
    assert cached(served(baton, prompt, cache_salt="other")[0]) == (in_blocks(baton, 499),) * 2


def test_a_conversation_is_routed_to_where_its_history_lies_and_moves_only_what_decode_lacks(baton: Baton) -> None:
    if not baton.tells_its_cache:
        pytest.skip("without events the router knows of prompts that it sent, and not of answers")
    history: list[int] = []
    for turn in range(3):
        prompt = history + new_prompt(200)
        before = baton.stats("decode")["transferred_bytes"]
        explained, history_and_answer = served(baton, prompt)
        moved = (baton.stats("decode")["transferred_bytes"] - before) / baton.kv_bytes_per_token
        expected, actual = cached(explained)
        assert expected == actual
        assert explained["actual"]["kind"] == "remote"
        if turn:
            held = explained["decode"]["cached_tokens"]
            # Decode has computed the KV of all tokens but the answer's last; SGLang counts that one too.
            assert held in (in_blocks(baton, len(history) - 1), in_blocks(baton, len(history)))
            if baton.engine != "sglang":  # SGLang does not tell how much less it moved
                assert moved <= len(prompt) - held + BLOCK_SIZES[baton.engine]
        history = history_and_answer


def test_an_answer_that_was_decoded_here_is_cached_for_a_local_prefill(vllm: Baton) -> None:
    _, history = served(vllm, new_prompt(200))
    explained, _ = served(vllm, history + new_prompt(50), "local")
    assert cached(explained) == (in_blocks(vllm, len(history) - 1),) * 2
    assert explained["kind"] == explained["actual"]["kind"] == "local"


def test_both_ways_are_predicted_once_they_were_measured(vllm: Baton) -> None:
    for mode in ("remote", "local") * 4:
        served(vllm, new_prompt(400), mode)
    explained, _ = served(vllm, new_prompt(400))
    ways = explained["expected"]["ways"]
    # A third, whole on prefill, if other tests' KV moved slowly: engines on a CPU notice it when their step ends.
    assert [way["kind"] for way in ways[:2]] == ["remote", "local"]
    assert all(1 < way["ttft_ms"] < 10_000 for way in ways)
    assert explained["reason"] == "configured"
