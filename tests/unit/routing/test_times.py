"""Predicted times to the first token: by replicas' pace at first, then by what requests took."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.routing.learnt_ratio import MOST, PATIENCE, WINDOW
from app.routing.times import (
    BASE_S,
    MIN_MOVED,
    NOTICED_S,
    PULL_PATIENCE,
    S_PER_TOKEN,
    PromptTimes,
    TimePredictor,
)

EXPECTED = PromptTimes(queue_s=0.3, prompt_s=0.1)
UNLEARNT = {"prefill": 1.0, "local": 1.0, "handover": 1.0, "pull": 1.0}
NUM_MOVED = 5000

History = list[tuple[Any, ...]]

seconds = st.floats(-1e3, 1e6)
prompt_times = st.builds(PromptTimes, st.floats(0, 1e4), st.floats(0, 1e4))
histories = st.lists(
    st.one_of(
        st.tuples(prompt_times, seconds, st.none() | seconds, st.integers(0, 10**6), st.booleans()),
        st.tuples(prompt_times, seconds),
    ),
    max_size=60,
)
"""Of remote prefills, with the seconds to the first token and those of prefill, and of local ones."""


def remote(
    predictor: TimePredictor, prefill_s: float, handover_s: float, *, waited_for_kv: bool = False, times: int = 1
) -> None:
    for _ in range(times):
        predictor.learn_remote(
            EXPECTED, prefill_s + handover_s, prefill_s, num_moved=NUM_MOVED, waited_for_kv=waited_for_kv
        )


def test_before_any_request_the_pace_counts_as_it_was_measured() -> None:
    predictor = TimePredictor()
    assert predictor.ratios() == UNLEARNT
    assert predictor.handover_s(NUM_MOVED) == BASE_S


def test_the_parts_of_a_remote_prefill_are_learnt_apart_from_each_other_and_from_local_ones() -> None:
    predictor = TimePredictor()
    remote(predictor, prefill_s=2 * EXPECTED.total_s, handover_s=3 * BASE_S)
    assert predictor.ratios() == {**UNLEARNT, "prefill": pytest.approx(2), "handover": pytest.approx(3)}
    predictor = TimePredictor()
    predictor.learn_local(EXPECTED, 4 * EXPECTED.total_s)
    assert predictor.ratios() == {**UNLEARNT, "local": pytest.approx(4)}


def test_what_waited_before_a_prompt_is_part_of_what_was_expected() -> None:
    predictor = TimePredictor()
    predictor.learn_local(EXPECTED, EXPECTED.queue_s + EXPECTED.prompt_s)
    assert predictor.ratios()["local"] == pytest.approx(1)


def test_the_kv_takes_time_if_first_tokens_lately_waited_for_it() -> None:
    predictor = TimePredictor()
    with_kv_s = BASE_S + S_PER_TOKEN * NUM_MOVED
    remote(predictor, 0.4, with_kv_s, waited_for_kv=True, times=WINDOW)
    assert predictor.handover_s(NUM_MOVED) == pytest.approx(with_kv_s)
    remote(predictor, 0.4, BASE_S, waited_for_kv=False, times=2 * WINDOW)
    assert predictor.handover_s(NUM_MOVED) == pytest.approx(BASE_S)


def test_how_slow_a_handover_was_is_relative_to_what_was_predicted_before_it() -> None:
    predictor = TimePredictor()
    for expected in (3.0, 1.0):
        slowness = predictor.learn_remote(EXPECTED, 0.4 + 3 * BASE_S, 0.4, num_moved=NUM_MOVED, waited_for_kv=False)
        assert slowness == pytest.approx(expected)


@pytest.mark.parametrize("prefill_s", [None, 0.0, -1.0, 0.9, 2.0])
def test_a_time_that_cannot_be_taken_apart_is_prefills_except_for_a_usual_handover(prefill_s: float | None) -> None:
    predictor = TimePredictor()
    ttft_s = 2 * EXPECTED.total_s + BASE_S
    took = predictor.learn_remote(EXPECTED, min(ttft_s, 0.9), prefill_s, num_moved=NUM_MOVED, waited_for_kv=False)
    assert took is None
    learnt = predictor.ratios()
    assert learnt["prefill"] == pytest.approx(2, rel=0.2)
    assert (learnt["handover"], learnt["local"]) == (1, 1)


def test_ways_that_requests_avoid_soon_count_as_they_were_measured() -> None:
    predictor = TimePredictor()
    remote(predictor, 4 * EXPECTED.total_s, 4 * BASE_S, times=WINDOW)
    for _ in range(PATIENCE):
        predictor.learn_local(EXPECTED, 5 * EXPECTED.total_s)
    assert predictor.ratios() == {**UNLEARNT, "local": pytest.approx(5)}
    for _ in range(PATIENCE):
        remote(predictor, 2 * EXPECTED.total_s, BASE_S)
    assert predictor.ratios()["local"] == 1
    assert predictor.ratios()["prefill"] == pytest.approx(2)


def test_a_slow_way_for_kv_is_known_after_its_first_pull_and_counts_by_the_tokens_moved() -> None:
    """As KV of 30,000 tokens came by TCP (docs/benchmarks/2026-11-29-gpu.md)."""
    predictor = TimePredictor()
    assert predictor.pull_s(30_000) == 0
    predictor.learn_pull(30_000, 8.2)
    assert predictor.pull_s(30_000) == pytest.approx(8.2 - NOTICED_S - 30_000 * S_PER_TOKEN)
    assert predictor.pull_s(4_000) == pytest.approx(1.0, rel=0.1)


def test_a_quick_way_for_kv_is_no_reason_against_it() -> None:
    predictor = TimePredictor()
    for _ in range(WINDOW):
        predictor.learn_pull(8192, NOTICED_S + 8192 * S_PER_TOKEN / 4)
    assert predictor.pull_s(8192) == 0


def test_what_few_tokens_took_says_nothing_of_the_way() -> None:
    predictor = TimePredictor()
    assert predictor.learn_pull(MIN_MOVED - 1, 9.0) is None
    assert predictor.ratios() == UNLEARNT


def test_a_pair_on_a_slow_way_is_known_among_quick_ones() -> None:
    """Three of four links are quick, so the median says nothing of the fourth."""
    predictor = TimePredictor()
    for seconds in (NOTICED_S + 0.1, NOTICED_S + 0.1, NOTICED_S + 0.1) * 3:
        predictor.learn_pull(30_000, seconds)
    slowness = predictor.learn_pull(30_000, 8.0)
    assert slowness is not None
    assert predictor.pull_s(30_000, slowness) == pytest.approx(8.0 - 30_000 * S_PER_TOKEN, rel=0.05)
    assert predictor.pull_s(30_000) == 0


def test_what_differs_among_quick_ways_is_no_slowness() -> None:
    predictor = TimePredictor()
    for _ in range(WINDOW):
        assert (predictor.learn_pull(2000, NOTICED_S / 2) or 0) <= 1
    assert (predictor.learn_pull(2000, NOTICED_S + 0.01) or 0) <= 1


def test_one_stall_does_not_make_a_way_slow() -> None:
    predictor = TimePredictor()
    for seconds in (0.1, 0.1, 30.0, 0.1):
        predictor.learn_pull(8192, seconds)
    assert predictor.pull_s(8192) == 0


def test_a_slow_way_is_tried_again_only_after_many_requests_went_another_way() -> None:
    predictor = TimePredictor()
    predictor.learn_pull(8192, 5.0)
    slow_s = predictor.pull_s(8192)
    for _ in range(10 * PATIENCE):
        predictor.learn_local(EXPECTED, EXPECTED.total_s)
    assert predictor.pull_s(8192) > slow_s / 10
    for _ in range(PULL_PATIENCE):
        predictor.learn_local(EXPECTED, EXPECTED.total_s)
    assert predictor.pull_s(8192) == 0


def test_a_pull_that_the_first_token_waits_for_is_part_of_the_handover() -> None:
    predictor = TimePredictor()
    predictor.learn_pull(8192, 5.0)
    remote(predictor, 0.4, 5.0, waited_for_kv=True, times=WINDOW)
    assert predictor.pull_s(8192) == 0


def learn(predictor: TimePredictor, history: History) -> None:
    for expected, ttft_s, *rest in history:
        if rest:
            prefill_s, num_moved, waited_for_kv = rest
            predictor.learn_remote(expected, ttft_s, prefill_s, num_moved, waited_for_kv=waited_for_kv)
        else:
            predictor.learn_local(expected, ttft_s)


@given(histories)
def test_no_history_makes_a_prediction_absurd(
    history: History,
) -> None:
    predictor = TimePredictor()
    learn(predictor, history)
    bound = MOST * (1 + 1e-9)
    assert all(1 / bound <= ratio <= bound for ratio in predictor.ratios().values())
    assert all(0 < predictor.handover_s(num_moved) < inf for num_moved in (0, 1, 10**6))


@given(histories, st.floats(0.25, 4.0), st.floats(0.25, 4.0), st.booleans())
def test_from_any_history_a_machine_that_is_used_is_soon_known(
    history: History, speed: float, hop: float, waits_for_kv: bool
) -> None:
    predictor = TimePredictor()
    learn(predictor, history)
    kv_s = S_PER_TOKEN * NUM_MOVED if waits_for_kv else 0.0
    remote(predictor, speed * EXPECTED.total_s, hop * (BASE_S + kv_s), waited_for_kv=waits_for_kv, times=2 * WINDOW)
    assert predictor.ratios()["prefill"] == pytest.approx(speed)
    assert predictor.handover_s(NUM_MOVED) == pytest.approx(hop * (BASE_S + kv_s))
