"""The times of one engine follow from its pace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engines.sim.profile import PrefillTimes, SimProfile, StepTimes, TransferTimes
from app.pace import Pace

PACE = Pace(
    prefill_base_s=0.02,
    prefill_s_per_token=1e-4,
    prefill_s_per_token_squared=1e-9,
    step_base_s=0.005,
    step_s_per_sequence=1e-4,
    step_s_per_kv_token=1e-8,
    chunk_tokens=1000,
)
lengths = st.integers(0, 100_000)


def test_a_prompt_takes_full_steps_and_what_its_tokens_and_their_squares_take() -> None:
    assert PACE.prompt_s(1000) == pytest.approx(0.02 + 0.1 + 1e-3)
    assert PACE.prompt_s(1001) == pytest.approx(2 * 0.02 + 0.1001 + 1e-9 * 1001**2)
    assert PACE.prompt_s(3000, cached=1500) == pytest.approx(2 * 0.02 + 0.15 + 1e-9 * (3000**2 - 1500**2))


def test_a_step_takes_its_base_and_what_sequences_and_their_kv_add() -> None:
    assert PACE.step_s(0, 0) == 0.005
    assert PACE.step_s(10, 10_000) == pytest.approx(0.005 + 1e-3 + 1e-4)


def test_prompts_that_wait_share_their_steps() -> None:
    num_prompts, num_tokens = 10, 100
    queue_s = PACE.queue_s(num_prompts * num_tokens, num_prompts * PACE.compute_s(num_tokens))
    assert queue_s == pytest.approx(0.02 + num_prompts * PACE.compute_s(num_tokens))
    assert queue_s < num_prompts * PACE.prompt_s(num_tokens)


@given(lengths, lengths)
def test_a_prompt_with_more_cached_never_takes_longer(num_tokens: int, cached: int) -> None:
    cached = min(cached, num_tokens)
    assert 0 <= PACE.prompt_s(num_tokens, cached) <= PACE.prompt_s(num_tokens)


@given(lengths, lengths)
def test_what_a_prompt_adds_is_the_same_in_one_piece_and_in_two(num_tokens: int, first: int) -> None:
    first = min(first, num_tokens)
    in_two = PACE.compute_s(first) + PACE.compute_s(num_tokens, first)
    assert in_two == pytest.approx(PACE.compute_s(num_tokens))


def test_nothing_takes_no_time() -> None:
    assert PACE.queue_s(0, 0.0) == PACE.prompt_s(0) == PACE.prompt_s(500, 500) == 0
    assert PACE.compute_s(500, 600) == 0


@given(st.integers(1, 1000), st.integers(1, 500), lengths)
def test_the_formula_is_that_of_the_simulated_engine(num_tokens: int, sequences: int, kv_tokens: int) -> None:
    profile = SimProfile(
        source="here",
        prefill=PrefillTimes(base_s=0.02, per_token_s=1e-4, per_token_squared_s=1e-9),
        step=StepTimes(base_s=0.005, per_sequence_s=1e-4, per_kv_token_s=1e-8),
        transfer=TransferTimes(base_s=0.0, bytes_per_s=1e9),
        kv_bytes_per_token=1,
    )
    assert PACE.prompt_s(num_tokens) == pytest.approx(profile.prefill_s(num_tokens))
    assert PACE.step_s(sequences, kv_tokens) == pytest.approx(profile.step_s(sequences, kv_tokens))
