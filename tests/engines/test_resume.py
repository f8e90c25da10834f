"""A real vLLM engine goes on with a sequence that was begun elsewhere as if it had begun it itself.

In float32, where tokens do not depend on what else an engine computes, so that each must be the undisturbed run's.
"""

from __future__ import annotations

import random
import uuid
from typing import Any, NamedTuple

import msgspec
import pytest

from app.messages import GenerateRequest
from benchmarks.faults.questions import REGEX, SCHEMA
from tests.engines.engine_process import MAX_MODEL_LEN, EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

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
    "regex": {**UNTIL_END, "structured_outputs": {"regex": REGEX}},
    "choice": {**UNTIL_END, "structured_outputs": {"choice": ["a quick brown fox jumps", "a quick brown dog sleeps"]}},
}


class Result(NamedTuple):
    tokens: list[int]
    end: tuple[Any, Any]
    logprobs: list[float]


def asked(sampling: dict[str, Any]) -> GenerateRequest:
    """Return a request whose answer has some 40 tokens."""
    given = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **sampling}
    num_tokens = 200 if given["max_tokens"] else MAX_MODEL_LEN - 56
    return GenerateRequest(
        request_id=uuid.uuid4().hex,
        prompt_token_ids=random.Random(str(sampling)).choices(range(300, 2000), k=num_tokens),
        sampling={name: value for name, value in given.items() if value is not None},
        cache_salt=uuid.uuid4().hex,
    )


def generate(decode: EngineProcess, request: GenerateRequest) -> Result:
    deltas = decode.generate(request, None)
    logprobs = [row[0] for delta in deltas if delta.logprobs for row in delta.logprobs.logprobs]
    end = deltas[-1].finish_reason, deltas[-1].stop_reason
    return Result([token for delta in deltas for token in delta.token_ids], end, logprobs)


def check(decode: EngineProcess, request: GenerateRequest) -> Result:
    """Resume `request` at several places, and return the undisturbed result."""
    whole = generate(decode, request)
    num = len(whole.tokens)
    for cut in sorted({1, num // 3, num // 2, num - 1}):
        rest = generate(decode, request.resumed(whole.tokens[:cut]))
        assert (rest.tokens, rest.end) == (whole.tokens[cut:], whole.end), f"resumed after {cut} of {num} tokens"
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-3)
    return whole


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_sequence_is_that_of_an_undisturbed_run(decode: EngineProcess, name: str) -> None:
    check(decode, asked(CASES[name]))


def test_what_was_generated_counts_for_min_tokens_and_may_stop_after_them(decode: EngineProcess) -> None:
    request = asked({})
    prompt = request.prompt_token_ids[:60]
    seen = generate(decode, msgspec.structs.replace(request, prompt_token_ids=prompt)).tokens
    sampling = {"temperature": 0.0, "max_tokens": 150, "min_tokens": 25, "stop_token_ids": sorted(set(seen))}
    whole = check(decode, GenerateRequest(request_id="stops", prompt_token_ids=prompt, sampling=sampling))
    assert whole.end[0] == "stop"
    assert len(whole.tokens) > 25


def test_without_its_output_a_grammar_would_begin_anew(decode: EngineProcess) -> None:
    """The control: as a mere longer prompt, the rest of an answer is a whole new one."""
    request = asked(CASES["regex"])
    whole = generate(decode, request)
    longer = GenerateRequest(
        request_id="control",
        prompt_token_ids=request.prompt_token_ids + whole.tokens[:5],
        sampling=request.sampling,
    )
    assert generate(decode, longer).tokens != whole.tokens[5:]
