"""What a replica notices of its own speed, and for how long."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pace import Pace
from app.recent_load import (
    FIRST_OUTPUT_TOKENS,
    FIRST_WINDOW_S,
    LONGEST_WINDOW_S,
    PRIOR_S,
    SHORTEST_WINDOW_S,
    SMOOTHING,
    RecentLoad,
)

PACE = Pace(
    prefill_base_s=0.01,
    prefill_s_per_token=1e-4,
    step_base_s=0.01,
    step_s_per_sequence=1e-3,
    step_s_per_kv_token=1e-7,
)
KV_TOKENS = 10_000


class Replica:
    """Tells its recent load of what it does, in a time that only tests move."""

    def __init__(self, pace: Pace | None = PACE) -> None:
        self.now = 100.0
        self.recent = RecentLoad(pace, lambda: self.now)
        self._num_tokens = 0

    def update(self, *, is_prefilling: bool = False, decoding: int = 0) -> None:
        self.recent.update(
            is_prefilling=is_prefilling, decoding=decoding, kv_tokens=KV_TOKENS, num_tokens=self._num_tokens
        )

    def prefill(self, seconds: float, decoding: int = 0) -> None:
        self.update(is_prefilling=True, decoding=decoding)
        self.now += seconds
        self.update(decoding=decoding)

    def prefill_beside(self, steps: int, sequences: int, step_s: float) -> None:
        """Compute prompts in steps of `step_s` seconds that also give each sequence a token."""
        self.update(is_prefilling=True, decoding=sequences)
        for _ in range(steps):
            self.now += step_s
            self._num_tokens += sequences
            self.update(is_prefilling=True, decoding=sequences)
        self.update(decoding=sequences)

    def idle(self, seconds: float, decoding: int = 0) -> None:
        self.update(decoding=decoding)
        self.now += seconds
        self.update(decoding=decoding)

    def decode(self, seconds: float, sequences: int, slowness: float = 1.0) -> None:
        """Decode in steps that take `slowness` times as long as by the pace."""
        step_s = slowness * PACE.step_s(sequences, KV_TOKENS)
        self.update(decoding=sequences)
        for _ in range(round(seconds / step_s)):
            self.now += step_s
            self._num_tokens += sequences
            self.update(decoding=sequences)


# The share of prefill


def test_the_share_is_that_of_the_time_in_which_prompts_are_computed() -> None:
    replica = Replica()
    for _ in range(1000):
        replica.prefill(0.01)
        replica.idle(0.03)
    assert replica.recent.prefill_share == pytest.approx(0.25, abs=0.01)


def test_the_share_fades_with_the_window_and_does_not_depend_on_how_often_it_is_updated() -> None:
    often, seldom = Replica(), Replica()
    for _ in range(100):
        often.prefill(0.01)
    seldom.prefill(1.0)
    assert often.recent.prefill_share == pytest.approx(seldom.recent.prefill_share)
    assert seldom.recent.prefill_share == pytest.approx(1 - math.exp(-1.0 / FIRST_WINDOW_S))
    before = seldom.recent.prefill_share
    seldom.idle(FIRST_WINDOW_S)
    assert seldom.recent.prefill_share == pytest.approx(before / math.e)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100), st.integers(0, 50)), max_size=50))
def test_whatever_happens_the_share_is_one_and_the_slowness_positive(steps: list[tuple[bool, float, int]]) -> None:
    replica = Replica()
    for is_prefilling, seconds, decoding in steps:
        if is_prefilling:
            replica.prefill(seconds, decoding)
        else:
            replica.idle(seconds, decoding)
        assert 0 <= replica.recent.prefill_share <= 1
        assert 0 < replica.recent.slowness < math.inf


def test_the_tokens_that_sequences_get_from_steps_with_prompts_are_taken_off_the_share() -> None:
    replica, step_s = Replica(), PACE.step_s(16, KV_TOKENS)
    replica.prefill_beside(1000, 16, 4 * step_s)
    assert replica.recent.prefill_share == pytest.approx(0.75, abs=0.01)
    replica.prefill_beside(1000, 16, step_s)  # no longer than without a prompt
    assert replica.recent.prefill_share == pytest.approx(0, abs=0.01)


# Slowness


@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.2, 3.0])
def test_steady_decode_shows_how_slow_the_steps_are(slowness: float) -> None:
    replica = Replica()
    replica.decode(10 * FIRST_WINDOW_S, 16, slowness)
    assert replica.recent.slowness == pytest.approx(slowness, rel=0.1)


@pytest.mark.parametrize("slowness", [0.5, 3.0])
def test_the_time_in_which_prompts_are_computed_says_nothing_of_steps(slowness: float) -> None:
    replica = Replica()
    for _ in range(100):
        replica.prefill(0.2, decoding=16)
        replica.decode(0.4, 16, slowness)
    assert replica.recent.slowness == pytest.approx(slowness, rel=0.1)


def test_a_few_slow_steps_of_one_sequence_hardly_count_against_the_measured_pace() -> None:
    replica = Replica()
    replica.decode(0.1 * PRIOR_S, 1, 10.0)
    assert 1 < replica.recent.slowness < 1.2


def test_what_was_noticed_is_forgotten_while_nothing_decodes() -> None:
    replica = Replica()
    replica.decode(10 * FIRST_WINDOW_S, 16, 3.0)
    replica.idle(10 * FIRST_WINDOW_S)
    assert replica.recent.slowness == pytest.approx(1, abs=0.01)


def test_without_a_pace_nothing_is_slow() -> None:
    replica = Replica(pace=None)
    replica.decode(20, 16, 3.0)
    assert replica.recent.slowness == 1
    replica.prefill(1.0)
    assert replica.recent.prefill_share > 0


# What sequences are like here


@pytest.mark.parametrize(
    ("decoded_s", "window_s"),
    [(4.0, 4.0), (0.0, SHORTEST_WINDOW_S), (1e6, LONGEST_WINDOW_S)],
    ids=["as long as sequences decode", "not too short", "not too long"],
)
def test_the_window_follows_how_long_sequences_decode(decoded_s: float, window_s: float) -> None:
    recent = Replica().recent
    assert recent.window_s == FIRST_WINDOW_S
    for _ in range(100):
        recent.on_sequence_end(decoded_s, 1)
        assert SHORTEST_WINDOW_S <= recent.window_s <= LONGEST_WINDOW_S
    assert recent.window_s == pytest.approx(window_s, rel=0.01)


def test_one_odd_sequence_moves_the_window_by_its_share() -> None:
    recent = Replica().recent
    recent.on_sequence_end(FIRST_WINDOW_S + 1, 1)
    assert recent.window_s == pytest.approx(FIRST_WINDOW_S + SMOOTHING)


def test_sequences_are_taken_to_get_as_many_tokens_as_those_that_ended() -> None:
    recent = Replica().recent
    assert recent.output_tokens == FIRST_OUTPUT_TOKENS
    for _ in range(100):
        recent.on_sequence_end(1.0, 200)
    assert recent.output_tokens == pytest.approx(200, rel=0.01)


def test_sequences_grow_until_each_is_half_as_long_as_it_will_be_on_the_mean() -> None:
    recent = Replica().recent
    for _ in range(1000):
        recent.on_sequence_end(1.0, 200)
    assert recent.growth_tokens(decoding=10, generated=0) == 1000
    assert recent.growth_tokens(decoding=10, generated=400) == 600
    assert recent.growth_tokens(decoding=10, generated=5000) == 0
    assert recent.growth_tokens(decoding=0, generated=0) == 0
