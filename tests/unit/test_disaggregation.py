"""Where a prompt is prefilled, and how a prompt is spoiled for the control run of ``baton verify``."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.messages import GenerateRequest, PrefillMode
from app.routing.disaggregation import Placement, place_prefill, spoil

token_ids = st.integers(0, 200_000)
prompts = st.one_of(
    st.lists(token_ids, min_size=1),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),  # few tokens, many repetitions
    st.builds(lambda token, length: [token] * length, token_ids, st.integers(1, 40)),
)


def request(prompt: list[int], sampling: dict[str, Any] | None = None, mode: PrefillMode = "auto") -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling or {}, prefill_mode=mode)


@pytest.mark.parametrize(
    ("mode", "sampling", "has_prefill_pool", "kind", "reason"),
    [
        ("auto", {}, True, "remote", ""),
        ("auto", {"logprobs": 1}, True, "remote", ""),
        ("auto", {"prompt_logprobs": None}, True, "remote", ""),
        ("spoiled", {}, True, "remote", ""),
        ("local", {}, True, "local", "requested"),
        ("auto", {"prompt_logprobs": 0}, True, "local", "prompt_logprobs"),
        ("auto", {"prompt_logprobs": 5}, True, "local", "prompt_logprobs"),
        ("auto", {}, False, "local", "aggregated"),
        ("local", {}, False, "local", "aggregated"),
        ("spoiled", {}, False, "local", "aggregated"),
    ],
)
def test_a_prompt_is_prefilled_remotely_unless_there_is_a_reason(
    mode: PrefillMode, sampling: dict[str, Any], has_prefill_pool: bool, kind: str, reason: str
):
    asked = request([1, 2], sampling, mode)
    placement = place_prefill(asked, has_prefill_pool=has_prefill_pool, can_decode_prefill=True)
    assert (placement.kind, placement.reason) == (kind, reason)


@pytest.mark.parametrize("mode", ["auto", "spoiled"])
@pytest.mark.parametrize("sampling", [{}, {"logprobs": 1}, {"prompt_logprobs": 0}, {"prompt_logprobs": 5}])
def test_where_decode_cannot_prefill_every_prompt_is_prefilled_remotely(mode: PrefillMode, sampling: dict[str, Any]):
    asked = request([1, 2], sampling, mode)
    assert place_prefill(asked, has_prefill_pool=True, can_decode_prefill=False) == Placement("remote")


def test_where_decode_cannot_prefill_a_request_for_it_is_refused_by_its_name():
    with pytest.raises(InvalidRequest, match="baton_prefill"):
        place_prefill(request([1, 2], mode="local"), has_prefill_pool=True, can_decode_prefill=False)


@pytest.mark.parametrize("mode", ["auto", "local", "spoiled"])
def test_an_aggregated_engine_prefills_whatever_it_could_do_with_a_prefill_pool(mode: PrefillMode):
    placement = place_prefill(request([1, 2], mode=mode), has_prefill_pool=False, can_decode_prefill=False)
    assert placement == Placement("local", "aggregated")


@given(prompts)
@example([5])
@example([5, 5])
@example([5, 6, 6])
@example([6, 6, 5])
def test_a_spoiled_prompt_has_the_same_length_and_other_tokens(prompt: list[int]):
    spoiled = spoil(request(prompt)).prompt_token_ids
    assert len(spoiled) == len(prompt)
    assert spoiled != prompt


@given(prompts.filter(lambda prompt: len(prompt) > 1))
def test_a_spoiled_prompt_differs_before_its_last_token(prompt: list[int]):
    # Decode computes the last token's KV itself, so a difference there alone would change nothing.
    assert spoil(request(prompt)).prompt_token_ids[:-1] != prompt[:-1]


@given(prompts)
@example([0])
@example([151_935])  # may be the last id of the vocabulary
def test_a_spoiled_prompt_stays_in_the_vocabulary(prompt: list[int]):
    spoiled = spoil(request(prompt)).prompt_token_ids
    assert min(spoiled) >= 0
    assert max(spoiled) <= max(1, *prompt)  # a larger id need not exist


def test_spoiling_changes_nothing_but_the_prompt():
    original = request([1, 2, 3], {"temperature": 0.0}, "spoiled")
    spoiled = spoil(original)
    assert msgspec.structs.replace(spoiled, prompt_token_ids=[1, 2, 3]) == original
    assert original.prompt_token_ids == [1, 2, 3]
