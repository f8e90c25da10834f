"""What a request says of where it is prefilled, and how its prompt is corrupted for ``baton verify``'s control."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.messages import GenerateRequest, PrefillMode
from app.routing.placement import corrupt_prompt, demanded

token_ids = st.integers(0, 200_000)
prompts = st.one_of(
    st.lists(token_ids, min_size=1),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),  # few tokens, many repetitions
    st.builds(lambda token, length: [token] * length, token_ids, st.integers(1, 40)),
)


def request(prompt: list[int], sampling: dict[str, Any] | None = None, mode: PrefillMode = "auto") -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling or {}, prefill_mode=mode)


@pytest.mark.parametrize(
    ("mode", "sampling", "expected"),
    [
        ("auto", {}, None),
        ("auto", {"logprobs": 1}, None),
        ("auto", {"prompt_logprobs": None}, None),
        ("auto", {"prompt_logprobs": 0}, ("local", "prompt_logprobs")),
        ("auto", {"prompt_logprobs": 5}, ("local", "prompt_logprobs")),
        ("local", {"prompt_logprobs": 5}, ("local", "requested")),
        ("remote", {}, ("remote", "requested")),
        ("corrupted", {}, ("remote", "requested")),
    ],
)
def test_what_a_request_demands(mode: PrefillMode, sampling: dict[str, Any], expected: tuple[str, str] | None) -> None:
    assert demanded(request([1, 2], sampling, mode)) == expected


@given(prompts)
@example([5])
@example([5, 5])
@example([5, 6, 6])
@example([6, 6, 5])
def test_a_corrupted_prompt_has_the_same_length_and_other_tokens(prompt: list[int]) -> None:
    corrupted = corrupt_prompt(request(prompt)).prompt_token_ids
    assert len(corrupted) == len(prompt)
    assert corrupted != prompt


@given(prompts.filter(lambda prompt: len(prompt) > 1))
def test_a_corrupted_prompt_differs_before_its_last_token(prompt: list[int]) -> None:
    # Decode computes the last token's KV itself, so a difference there alone would change nothing.
    assert corrupt_prompt(request(prompt)).prompt_token_ids[:-1] != prompt[:-1]


@given(prompts)
@example([0])
@example([151_935])  # may be the last id of the vocabulary
def test_a_corrupted_prompt_stays_in_the_vocabulary(prompt: list[int]) -> None:
    corrupted = corrupt_prompt(request(prompt)).prompt_token_ids
    assert min(corrupted) >= 0
    assert max(corrupted) <= max(1, *prompt)  # a larger id need not exist


def test_corruption_changes_nothing_but_the_prompt() -> None:
    original = request([1, 2, 3], {"temperature": 0.0}, "corrupted")
    corrupted = corrupt_prompt(original)
    assert msgspec.structs.replace(corrupted, prompt_token_ids=[1, 2, 3]) == original
    assert original.prompt_token_ids == [1, 2, 3]
