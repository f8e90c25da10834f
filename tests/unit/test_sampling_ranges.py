"""No value of any field gets to an engine that could not hold it."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any, cast

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

from app import sampling_ranges
from app.engines.sglang_sampling import translate
from app.engines.vllm import to_sampling_params
from app.errors import InvalidRequest
from app.frontend.engine_client import _FRONTEND_FIELDS
from app.messages import GenerateRequest
from app.sampling_ranges import RANGES, REQUEST_RANGES, NotOffered, Parts, check_request, check_seeds, check_tokenized

VOCAB_SIZE = 2048
FIELDS = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}

LOGITS = torch.tensor([[-65000.0, -30.0, 0.0, 30.0, 65000.0]])
"""As large as bfloat16 models make them, and larger."""

EDGES = [
    bound + step for power in (7, 8, 15, 16, 30, 31, 32, 53, 63, 64) for bound in (2**power,) for step in (-1, 0, 1)
]
whole = st.sampled_from([*EDGES, *(-edge for edge in EDGES), 10**30, -(10**30)]) | st.integers(-3, 3000)
real = st.floats() | st.floats(-3, 3, width=32) | st.sampled_from([1e-320, 1e-45, 1e38, 1e39, 10**400])
text = st.text(max_size=20) | st.sampled_from(["\ud800", "\x00", "x" * 1000])
long = st.sampled_from([127, 128, 129, 1023, 1024, 1025, 5000])
whole_list = st.lists(whole, max_size=4) | long.map(lambda size: list(range(size)))
json_value = st.recursive(
    st.none() | st.booleans() | whole | real | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
mapping = (
    st.dictionaries(whole, real, max_size=4)
    | long.map(lambda size: dict.fromkeys(range(size), 1.0))
    | st.dictionaries(
        st.sampled_from(["max_pattern_size", "min_pattern_size", "min_count", "regex", "json"]), json_value
    )
)
deep = st.sampled_from([99, 101, 300]).map(lambda depth: nested(depth))
anything = st.one_of(whole, real, st.booleans(), whole_list, mapping, st.lists(text, max_size=4), deep, json_value)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def request(sampling: dict[str, Any], **fields: Any) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=[1], sampling=sampling, **fields)


def check(sampling: dict[str, Any], **fields: Any) -> None:
    check_request(request(sampling, **fields), VOCAB_SIZE)


def refused(asked: GenerateRequest) -> str:
    """The error's text; empty if there is none."""
    try:
        check_request(asked, VOCAB_SIZE)
    except InvalidRequest as error:
        return error.message
    return ""


# The table


def test_every_parameter_of_vllm_has_its_range() -> None:
    """A parameter that a later vLLM brings is refused, until somebody has looked what engines do with its values."""
    assert set(RANGES) == FIELDS - _FRONTEND_FIELDS
    constraints = {name for name in inspect.signature(StructuredOutputsParams).parameters if not name.startswith("_")}
    assert set(cast(Parts, RANGES["structured_outputs"]).ranges) == constraints
    patterns = inspect.signature(RepetitionDetectionParams).parameters
    assert set(cast(Parts, RANGES["repetition_detection"]).ranges) == set(patterns)
    assert set(REQUEST_RANGES) <= set(GenerateRequest.__struct_fields__)
    with pytest.raises(InvalidRequest, match=r"^new_in_vllm_0_33 is not offered"):
        check({"new_in_vllm_0_33": 1})


@pytest.mark.parametrize(
    ("ours", "module", "name"),
    [
        ("MAX_BIASED_TOKENS", "vllm.v1.worker.gpu.sample.logit_bias", "MAX_NUM_LOGIT_BIAS_TOKENS"),
        ("MAX_BIASED_TOKENS", "vllm.v1.worker.gpu.sample.logit_bias", "MAX_NUM_ALLOWED_TOKEN_IDS"),
        ("MAX_STOP_TOKENS", "vllm.v1.worker.gpu.sample.logit_bias", "MAX_NUM_STOP_TOKEN_IDS"),
        ("MAX_LOGPROB_TOKENS", "vllm.sampling_params", "MAX_LOGPROB_TOKEN_IDS"),
        ("MAX_BAD_WORDS", "vllm.envs", "VLLM_MAX_NUM_BAD_WORDS"),
        ("MAX_BAD_WORD_TOKENS", "vllm.envs", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS"),
    ],
)
def test_what_vllms_workers_have_room_for_is_as_it_was(ours: str, module: str, name: str) -> None:
    assert getattr(sampling_ranges, ours) == getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("name", "served", "refused"),
    [
        ("top_k", [-1, 1, 2**31 - 1], [2**31, 10**30, -2, 1.5, "5"]),
        ("stream_interval", [1, 2**30], [0, 2**31, 10**30]),
        ("thinking_token_budget", [0, 2**30], [-1, 2**31, 10**30]),
        ("max_tokens", [1, None], [0, 2**31]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, -(2**63) - 1]),
        ("temperature", [0, 2.0], [math.nan, math.inf, -0.1, 2.1, 10**400]),
        ("top_p", [1, 0.1], [0, 1e-320, math.nan]),
        ("repetition_penalty", [0.01, 2], [1e-320, 1e308, math.inf, 0]),
        ("logprobs", [-1, 0, VOCAB_SIZE], [VOCAB_SIZE + 1, 2**31 - 1, -2]),
        ("logit_bias", [{0: 1.0, VOCAB_SIZE - 1: -100}], [{VOCAB_SIZE: 1.0}, {-1: 1.0}, {0: math.nan}, {True: 1.0}]),
        ("logit_bias", [dict.fromkeys(range(1024), 1.0)], [dict.fromkeys(range(1025), 1.0)]),
        ("stop_token_ids", [[0], list(range(128))], [[VOCAB_SIZE], [-1], list(range(129)), [1.0]]),
        ("allowed_token_ids", [list(range(1024))], [list(range(1025))]),
        ("bad_words", [["a"] * 128], [["a"] * 129, ["\ud800"], "a"]),
        ("repetition_detection", [{"max_pattern_size": 8}], [{"max_pattern_size": 10**6}, {"min_count": 10**30}]),
        ("extra_args", [{"a": 2**64 - 1}], [{"a": 2**64}, {"a": {"b": ["\ud800"]}}, {"a": nested(300)}]),
    ],
)
def test_the_error_names_the_field(name: str, served: list[Any], refused: list[Any]) -> None:
    for value in served:
        check({name: value})
    for value in refused:
        with pytest.raises(InvalidRequest, match=rf"^{name}[. ]"):
            check({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("priority", 2**63), ("priority", -(10**30)), ("cache_salt", "\ud800"), ("reasoning_parser_kwargs", {"a": 2**64})],
)
def test_what_is_no_sampling_parameter_is_checked_too(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name} "):
        check({}, **{name: value})


def test_the_seeds_of_all_sequences_are_within_64_bits() -> None:
    """vLLM gives sequence number i the seed of the request plus i."""
    check_seeds(None, 5)
    check_seeds(2**63 - 1, 1)
    with pytest.raises(InvalidRequest, match=r"^seed "):
        check_seeds(2**63 - 1, 2)


def test_tokens_are_counted_after_tokenization() -> None:
    check_tokenized(range(128), [[1]] * 1024)
    with pytest.raises(InvalidRequest, match=r"^stop_token_ids "):
        check_tokenized(range(129), None)
    with pytest.raises(InvalidRequest, match=r"^bad_words "):
        check_tokenized([], [[1] * 513] * 2)


# What passes


several = st.dictionaries(st.sampled_from(sorted(RANGES)), anything, max_size=4)
single = st.sampled_from(sorted(name for name, values in RANGES.items() if values != NotOffered())).flatmap(
    lambda name: anything.map(lambda value: {name: value})
)


@settings(max_examples=2500, deadline=None)
@given(single | several, st.just((0, "a")) | st.tuples(whole, text))
@example({"top_k": 2**31}, (0, ""))
@example({"top_k": 2**31 - 1}, (2**63 - 1, "a"))
@example({"repetition_penalty": 1e-320}, (0, ""))
def test_what_passes_is_within_what_engines_hold(sampling: dict[str, Any], others: tuple[int, str]) -> None:
    asked = request(sampling, priority=others[0], cache_salt=others[1])
    if refusal := refused(asked):
        assert refusal.startswith((*RANGES, *REQUEST_RANGES))
        assert len(refusal) < 300
        return
    message = msgspec.msgpack.encode(asked)
    assert msgspec.msgpack.decode(message, type=GenerateRequest).sampling.keys() == sampling.keys()
    _fits_into_vllm(sampling)
    _fits_into_sglang(sampling)


def _fits_into_vllm(sampling: dict[str, Any]) -> None:
    """The adapter refuses it, or the engine core gets it and its tensors can hold it."""
    try:
        params = to_sampling_params(sampling, None)
    except InvalidRequest:
        return
    msgspec.msgpack.encode(params)
    _fits_in_32_bits([params.top_k, params.min_tokens + 2**20, params.max_tokens or 0, params.logprobs or 0])
    _fits_in_32_bits([params.thinking_token_budget or 0, *params.stop_token_ids, *(params.allowed_token_ids or ())])
    torch.tensor([params.seed or 0], dtype=torch.int64)
    assert len(params.logit_bias or ()) <= 1024
    _leaves_probabilities(params.temperature or 1.0, params.repetition_penalty, params.top_p)


def _fits_into_sglang(sampling: dict[str, Any]) -> None:
    try:
        translation = translate(
            sampling,
            reasoning_ended=None,
            is_disaggregated=False,
            is_deterministic=True,
            has_reasoning_parser=False,
        )
    except InvalidRequest:
        return
    params = translation.sampling_params
    _fits_in_32_bits([params.get("top_k", 1), params.get("min_new_tokens", 0), params.get("stream_interval", 1)])
    torch.tensor([params["sampling_seed"]], dtype=torch.int64)
    assert all(0 <= int(token) < VOCAB_SIZE for token in params.get("logit_bias", ()))
    assert translation.logprob_arguments().get("top_logprobs_num", 0) <= VOCAB_SIZE
    _leaves_probabilities(
        params.get("temperature") or 1.0, params.get("repetition_penalty", 1.0), params.get("top_p", 1.0)
    )


def _fits_in_32_bits(values: list[int]) -> None:
    torch.tensor(values, dtype=torch.int32)


def _leaves_probabilities(temperature: float, repetition_penalty: float, top_p: float) -> None:
    """Samplers raise an error for NaN, which ends an engine."""
    penalty = torch.tensor(repetition_penalty, dtype=torch.float32)
    logits = torch.where(LOGITS > 0, LOGITS / penalty, LOGITS * penalty)
    assert torch.isfinite(torch.softmax(logits / torch.tensor(max(temperature, 0.01)), dim=-1)).all()
    assert torch.tensor(top_p, dtype=torch.float32) > 0
