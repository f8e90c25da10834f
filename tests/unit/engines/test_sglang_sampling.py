"""What vLLM's sampling parameters become for SGLang: nothing is dropped without a word."""

from __future__ import annotations

import copy
import json
from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string as accepts

from app.engines.sglang_sampling import (
    DEFAULT_MAX_TOKENS,
    MAX_TOP_LOGPROBS_TRANSFERRED,
    RENAMED,
    WITHOUT_EFFECT,
    Translation,
    rest_of,
    translate,
)
from app.errors import CannotResume, InvalidRequest
from app.frontend.engine_client import _FRONTEND_FIELDS, sampling_fields
from app.messages import COUNTS_OUTPUT

FIELDS = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}}
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}

TRANSLATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.1, {"min_p": 0.1}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "max_tokens": (5, {"max_new_tokens": 5}),
    "min_tokens": (5, {"min_new_tokens": 5}),
    "stop_token_ids": ([5], {"stop_token_ids": [5]}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "stream_interval": (5, {"stream_interval": 5}),
    "logit_bias": ({5: -1.0}, {"logit_bias": {"5": -1.0}}),
    "structured_outputs": ({"regex": "a+"}, {"regex": "a+"}),
    "seed": (5, {"sampling_seed": 5}),
    "logprobs": (5, {}),
    "prompt_logprobs": (5, {}),
}
"""A value of each parameter that SGLang has, and what becomes of it."""
UNNEEDED = {"flat_logprobs", "skip_reading_prefix_cache", "skip_special_tokens", "spaces_between_special_tokens"}
REFUSED = {
    "watermarking",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "logprob_token_ids",
    "allowed_token_ids",
    "extra_args",
    "bad_words",
    "thinking_token_budget",
    "repetition_detection",
    "routed_experts_prompt_start",
    "trace_decode_token_ids",
}
"""What SGLang lacks, or has by another interface; what vLLM adds is refused as well, until somebody has looked."""


def translated(
    sampling: dict[str, Any],
    *,
    reasoning_ended: bool | None = None,
    is_disaggregated: bool = True,
    is_deterministic: bool = False,
    has_reasoning_parser: bool = False,
) -> Translation:
    return translate(
        sampling,
        reasoning_ended=reasoning_ended,
        is_disaggregated=is_disaggregated,
        is_deterministic=is_deterministic,
        has_reasoning_parser=has_reasoning_parser,
    )


def params(sampling: dict[str, Any], **where: Any) -> dict[str, Any]:
    return translated(sampling, **where).sampling_params


# Every parameter


@pytest.mark.parametrize("name", FIELDS)
def test_every_parameter_is_translated_or_without_effect_or_the_frontends_or_refused(name: str) -> None:
    value, expected = TRANSLATED.get(name, ("anything", {}))
    where = {"is_disaggregated": name != "prompt_logprobs", "is_deterministic": name == "seed"}
    if name in _FRONTEND_FIELDS:  # it never gets here
        assert name not in {*RENAMED, *WITHOUT_EFFECT, *TRANSLATED}
    elif name in TRANSLATED:
        default = {"max_new_tokens": DEFAULT_MAX_TOKENS}
        assert params({name: value}, **where) == {**default, **expected}
    elif name in UNNEEDED:
        assert translated({name: value}) == translated({})
    else:
        with pytest.raises(InvalidRequest, match=rf"^{name} is not supported by SGLang"):
            translated({name: value})


def test_every_name_is_still_one_of_vllms() -> None:
    assert {*RENAMED, *WITHOUT_EFFECT, *TRANSLATED, *UNNEEDED, *REFUSED} <= set(FIELDS)


@given(st.sampled_from(sorted(REFUSED)), st.data())
def test_what_is_refused_is_refused_in_any_company(name: str, data: st.DataObject) -> None:
    company = data.draw(st.lists(st.sampled_from(["temperature", "top_p", "max_tokens", "logprobs", "logit_bias"])))
    with pytest.raises(InvalidRequest, match=name):
        translated({**{other: TRANSLATED[other][0] for other in company}, name: "anything"})


@pytest.mark.parametrize("empty", [{"bad_words": []}, {"extra_args": {}}, {"allowed_token_ids": None}])
def test_a_parameter_that_asks_for_nothing_is_not_refused(empty: dict[str, Any]) -> None:
    assert translated(empty) == translated({})


def test_a_parameter_that_is_left_out_means_vllms_default() -> None:
    assert sampling_fields(SamplingParams()) == {}
    assert params({}) == {"max_new_tokens": SamplingParams().max_tokens}


def test_translating_does_not_change_the_request() -> None:
    sampling = {name: value for name, (value, _) in TRANSLATED.items() if name not in ("ignore_eos", "min_p")}
    before = copy.deepcopy(sampling)
    translated(sampling, is_disaggregated=False, is_deterministic=True)
    assert sampling == before


# Combinations


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, {"stop_token_ids": [5]}])
def test_ignore_eos_and_stop_tokens_exclude_each_other(sampling: dict[str, Any]) -> None:
    translated(sampling)
    with pytest.raises(InvalidRequest, match=r"ignore_eos: .*stop_token_ids"):
        translated({"ignore_eos": True, "stop_token_ids": [5]})


@pytest.mark.parametrize(("penalty", "is_served"), [(0.0, False), (0.01, True), (2.0, True), (2.01, False)])
def test_a_repetition_penalty_has_sglangs_bounds(penalty: float, is_served: bool) -> None:
    if is_served:
        assert params({"repetition_penalty": penalty})["repetition_penalty"] == penalty
    else:
        with pytest.raises(InvalidRequest, match="repetition_penalty"):
            translated({"repetition_penalty": penalty})


# Seeds


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}])
def test_a_seed_needs_deterministic_inference(sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"^seed: .*enable_deterministic_inference"):
        translated({**sampling, "seed": 0})


def test_greedy_output_needs_no_seed() -> None:
    assert "sampling_seed" not in params({"temperature": 0.0, "seed": 0})


@pytest.mark.parametrize("seed", [0, 5, -7])
def test_a_seed_is_the_requests_under_deterministic_inference(seed: int) -> None:
    assert params({"seed": seed}, is_deterministic=True)["sampling_seed"] == seed


def test_requests_without_a_seed_get_different_ones_under_deterministic_inference() -> None:
    seeds = {params({}, is_deterministic=True)["sampling_seed"] for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)  # SGLang takes no other


def test_requests_without_a_seed_have_none_otherwise() -> None:
    assert "sampling_seed" not in params({})


def test_min_p_is_refused_under_deterministic_inference() -> None:
    with pytest.raises(InvalidRequest, match=r"^min_p .*enable_deterministic_inference"):
        translated({"min_p": 0.1}, is_deterministic=True)


# Structured outputs


def structured(**constraint: Any) -> dict[str, Any]:
    """As the frontend sends it."""
    return sampling_fields(SamplingParams(structured_outputs=StructuredOutputsParams(**constraint)))


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"json": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}),
        ({"json": json.dumps(SCHEMA)}, {"json_schema": json.dumps(SCHEMA)}),
        ({"json_object": True}, {"json_schema": '{"type": "object"}'}),
        ({"regex": r"\d+"}, {"regex": r"\d+"}),
        ({"grammar": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
        ({"choice": ["a", "b"]}, {"ebnf": 'root ::= "a" | "b"'}),
        ({"structural_tag": json.dumps(TAG)}, {"structural_tag": json.dumps(TAG)}),
    ],
    ids=["schema", "schema as text", "any object", "regex", "grammar", "choice", "tag"],
)
def test_a_constraint_is_sglangs_of_the_same_meaning(constraint: dict[str, Any], expected: dict[str, Any]) -> None:
    assert params(structured(**constraint)) == {"max_new_tokens": DEFAULT_MAX_TOKENS, **expected}


def test_a_structural_tag_may_be_a_mapping() -> None:
    assert json.loads(params({"structured_outputs": {"structural_tag": TAG}})["structural_tag"]) == TAG


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=5), st.text("ab"))
@example(['say "no"', r"back\slash", "a\nb\t\x01\x7f"], "say")
@example(["Größe", "東京", "😀", "\u2028"], "Gr")
@example(["a", "ab", ""], "b")
def test_a_choice_derives_exactly_the_choices(choices: list[str], other: str) -> None:
    grammar = Grammar.from_ebnf(params(structured(choice=choices))["ebnf"])
    assert all(accepts(grammar, choice) for choice in choices)
    assert accepts(grammar, other) == (other in choices)


CONSTRAINTS: dict[str, Any] = {
    "json": SCHEMA,
    "json_object": True,
    "regex": "a",
    "choice": ["a"],
    "grammar": 'root ::= "a"',
    "structural_tag": TAG,
}


@pytest.mark.parametrize("names", list(combinations(CONSTRAINTS, 2)), ids="+".join)
def test_two_constraints_at_once_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="structured_outputs: only one"):
        translated({"structured_outputs": {name: CONSTRAINTS[name] for name in names}})


@pytest.mark.parametrize(
    ("name", "value"),
    [("disable_any_whitespace", True), ("disable_additional_properties", True), ("whitespace_pattern", r"\s?")],
)
def test_an_option_that_sglang_has_for_a_whole_pool_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"structured_outputs\.{name}"):
        translated(structured(json=SCHEMA, **{name: value}))


# Log probabilities


@pytest.mark.parametrize(
    ("sampling", "arguments"),
    [
        ({}, {}),
        ({"logprobs": 0}, {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 0}),
        ({"logprobs": 3}, {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": 3}),
        ({"prompt_logprobs": 0}, {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 0}),
        ({"prompt_logprobs": 2}, {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}),
        (
            {"logprobs": 3, "prompt_logprobs": 2},
            {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3},
        ),
        (
            {"logprobs": 1, "prompt_logprobs": 2},
            {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2},
        ),
    ],
)
def test_log_probabilities_are_asked_for_of_what_the_request_wants(
    sampling: dict[str, Any], arguments: dict[str, Any]
) -> None:
    translation = translated(sampling, is_disaggregated=False)
    assert translation.logprob_arguments() == arguments
    wanted = (translation.num_logprobs, translation.num_prompt_logprobs)
    assert wanted == (sampling.get("logprobs"), sampling.get("prompt_logprobs"))


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("is_disaggregated", [True, False])
def test_the_whole_vocabularys_log_probabilities_are_refused(name: str, is_disaggregated: bool) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: .*whole vocabulary"):
        translated({name: -1}, is_disaggregated=is_disaggregated)


@pytest.mark.parametrize("num", [0, 5])
def test_prompt_log_probabilities_do_not_cross_from_prefill_to_decode(num: int) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt_logprobs: "):
        translated({"prompt_logprobs": num}, is_disaggregated=True)


@pytest.mark.parametrize(
    ("over", "is_disaggregated", "is_served"), [(0, True, True), (1, True, False), (1, False, True)]
)
def test_the_first_tokens_candidates_have_to_fit_into_the_transfer(
    over: int, is_disaggregated: bool, is_served: bool
) -> None:
    sampling = {"logprobs": MAX_TOP_LOGPROBS_TRANSFERRED + over}
    if is_served:
        assert translated(sampling, is_disaggregated=is_disaggregated).num_logprobs == sampling["logprobs"]
    else:
        with pytest.raises(InvalidRequest, match=rf"^logprobs: at most {MAX_TOP_LOGPROBS_TRANSFERRED}"):
            translated(sampling, is_disaggregated=is_disaggregated)


# Reasoning before a structured output


@pytest.mark.parametrize("has_reasoning_parser", [True, False])
@pytest.mark.parametrize("reasoning_ended", [None, True])
def test_a_grammar_binds_at_once_unless_the_model_reasons_first(
    reasoning_ended: bool | None, has_reasoning_parser: bool
) -> None:
    where: dict[str, Any] = {"reasoning_ended": reasoning_ended, "has_reasoning_parser": has_reasoning_parser}
    assert not translated(structured(regex="a"), **where).require_reasoning


def test_a_grammar_binds_after_the_reasoning_where_the_engine_knows_its_end() -> None:
    translation = translated(structured(regex="a"), reasoning_ended=False, has_reasoning_parser=True)
    assert translation.require_reasoning


def test_a_grammar_after_reasoning_is_refused_where_the_engine_does_not_know_its_end() -> None:
    with pytest.raises(InvalidRequest, match=r"^structured_outputs: .*reasoning_parser"):
        translated(structured(regex="a"), reasoning_ended=False, has_reasoning_parser=False)


@pytest.mark.parametrize("has_reasoning_parser", [True, False])
def test_reasoning_without_a_grammar_needs_nothing_of_the_engine(has_reasoning_parser: bool) -> None:
    assert not translated({}, reasoning_ended=False, has_reasoning_parser=has_reasoning_parser).require_reasoning


def test_an_empty_constraint_is_refused_rather_than_taken_for_none() -> None:
    with pytest.raises(InvalidRequest, match=r"structured_outputs\.regex is empty"):
        translated({"structured_outputs": {"regex": ""}})


def test_a_switch_that_is_off_asks_for_nothing() -> None:
    assert translated({"watermarking": False}) == translated({})


def test_the_rest_of_a_sequence_has_what_is_left_of_its_bounds() -> None:
    sampling = {"temperature": 0.0, "max_tokens": 40, "min_tokens": 12, "logprobs": 2}
    assert rest_of(sampling, 0) == sampling
    assert rest_of(sampling, 10) == {**sampling, "max_tokens": 30, "min_tokens": 2}
    assert rest_of(sampling, 20) == {**sampling, "max_tokens": 20, "min_tokens": 0}
    assert rest_of({}, 5)["max_tokens"] == DEFAULT_MAX_TOKENS - 5
    assert rest_of({"max_tokens": None}, 5)["max_tokens"] is None


@pytest.mark.parametrize("name", COUNTS_OUTPUT)
def test_what_counts_output_tokens_cannot_go_on(name: str) -> None:
    with pytest.raises(CannotResume, match=name):
        rest_of({name: {"regex": "a"} if name == "structured_outputs" else 1.5}, 3)
