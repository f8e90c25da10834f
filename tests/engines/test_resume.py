"""A real vLLM engine goes on with a sequence that was begun elsewhere as if it had begun it itself.

In float32, where tokens do not depend on what else an engine computes, so that each must be the undisturbed run's.
"""

from __future__ import annotations

import gc
import os
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import pytest
import pytest_asyncio

from app.engines.base import EngineSpec
from app.engines.vllm import VllmEngine
from app.messages import GenerateRequest, TokenDelta
from app.models.source import local_path

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's client leaves that to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*Context.__del__:pytest.PytestUnraisableExceptionWarning"),
]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
UNTIL_END: dict[str, Any] = {"ignore_eos": False, "max_tokens": 60}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "to the model's length": {"max_tokens": None},
    "log probabilities": {"logprobs": 3},
    "repetition penalty": {"repetition_penalty": 1.7},
    "frequency and presence penalties": {"frequency_penalty": 1.5, "presence_penalty": 0.7},
    "bad words": {"bad_words": ["the", " a"]},
    "seed": {"temperature": 1.0, "seed": 7},
    "seed with top_p": {"temperature": 0.9, "top_p": 0.8, "seed": 11},
    "JSON schema": {**UNTIL_END, "structured_outputs": {"json": SCHEMA}},
    "JSON schema with a seed": {**UNTIL_END, "structured_outputs": {"json": SCHEMA}, "temperature": 1.0, "seed": 3},
    "regex": {**UNTIL_END, "structured_outputs": {"regex": r"(ab|cd){4,9}-[0-9]{5}"}},
    "choice": {**UNTIL_END, "structured_outputs": {"choice": ["a quick brown fox jumps", "a quick brown dog sleeps"]}},
}


class Result(NamedTuple):
    tokens: list[int]
    end: tuple[Any, Any]
    logprobs: list[float]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    spec = EngineSpec(
        role="decode",
        is_disaggregated=False,
        replica_id="decode",
        model_path=local_path("baton:tiny"),
        device="cpu",
        tensor_parallel_size=1,
        engine_args={"max_model_len": 256, "block_size": 32, "dtype": "float32"},
    )
    with patch.dict(os.environ, {"VLLM_CPU_KVCACHE_SPACE": "1"}):
        engine = VllmEngine(spec)
        try:
            await engine.start()
            yield engine
        finally:
            await engine.stop()
            del engine
            gc.collect()


def asked(sampling: dict[str, Any]) -> GenerateRequest:
    given = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=random.Random(str(sampling)).choices(range(300, 2000), k=200),
        sampling={name: value for name, value in given.items() if value is not None},
        cache_salt=uuid.uuid4().hex,
    )


async def generate(engine: VllmEngine, request: GenerateRequest) -> Result:
    deltas: list[TokenDelta] = []
    await engine.generate(request, None, deltas.append)
    logprobs = [row[0] for delta in deltas if delta.logprobs for row in delta.logprobs.logprobs]
    end = deltas[-1].finish_reason, deltas[-1].stop_reason
    return Result([token for delta in deltas for token in delta.token_ids], end, logprobs)


async def check(engine: VllmEngine, request: GenerateRequest) -> Result:
    """Resume `request` at several places, and return the undisturbed result."""
    whole = await generate(engine, request)
    num = len(whole.tokens)
    for cut in sorted({1, num // 3, num // 2, num - 1}):
        rest = await generate(engine, request.resumed(whole.tokens[:cut]))
        assert (rest.tokens, rest.end) == (whole.tokens[cut:], whole.end), f"resumed after {cut} of {num} tokens"
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-3)
    return whole


@pytest.mark.parametrize("name", CASES)
async def test_a_resumed_sequence_is_that_of_an_undisturbed_run(engine: VllmEngine, name: str) -> None:
    await check(engine, asked(CASES[name]))


async def test_what_was_generated_counts_for_min_tokens_and_may_stop_after_them(engine: VllmEngine) -> None:
    request = asked({})
    prompt = request.prompt_token_ids[:60]
    seen = (await generate(engine, msgspec.structs.replace(request, prompt_token_ids=prompt))).tokens
    sampling = {"temperature": 0.0, "max_tokens": 150, "min_tokens": 25, "stop_token_ids": sorted(set(seen))}
    whole = await check(engine, GenerateRequest(request_id="stops", prompt_token_ids=prompt, sampling=sampling))
    assert whole.end[0] == "stop"
    assert len(whole.tokens) > 25


async def test_without_its_output_a_grammar_would_begin_anew(engine: VllmEngine) -> None:
    """The control: as a mere longer prompt, the rest of an answer is a whole new one."""
    request = asked(CASES["regex"])
    whole = await generate(engine, request)
    longer = GenerateRequest(
        request_id="control",
        prompt_token_ids=request.prompt_token_ids + whole.tokens[:5],
        sampling=request.sampling,
    )
    assert (await generate(engine, longer)).tokens != whole.tokens[5:]
