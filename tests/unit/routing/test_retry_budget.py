"""Retries stay a small share of the requests, and single ones are always allowed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.routing.retry_budget import FLOOR, SHARE, WINDOW_S, RetryBudget
from tests.unit.routing.fleet import Timers


def test_at_low_load_single_failures_are_tried_again() -> None:
    clock = Timers()
    budget = RetryBudget(clock)
    for _ in range(100):
        budget.count_request()
        assert budget.take()
        clock.advance(2 * WINDOW_S / FLOOR)


def test_what_is_spent_comes_back_with_time() -> None:
    clock = Timers()
    budget = RetryBudget(clock)
    while budget.take():
        pass
    clock.advance(WINDOW_S)
    assert [budget.take() for _ in range(FLOOR)] == [True] * 6 + [False] * 4  # 1 - 1/e of them


def test_what_is_left_is_told() -> None:
    budget = RetryBudget(clock := Timers())
    for _ in range(200):
        budget.count_request()
    assert [budget.take() for _ in range(23)].count(False) == 3
    told = {"recent_requests": 200, "recent_retries": 20, "retries_left": 0, "refused_so_far": 3}
    assert budget.describe() == told
    clock.advance(100 * WINDOW_S)
    assert budget.describe() == {**told, "recent_requests": 0, "recent_retries": 0, "retries_left": FLOOR}


@given(st.integers(1, 200), st.floats(0.001, 0.1))
def test_under_load_no_more_than_a_tenth_is_tried_again(seconds: int, gap_s: float) -> None:
    clock = Timers()
    budget = RetryBudget(clock)
    num_requests, num_retries = int(seconds / gap_s / 10), 0
    for _ in range(num_requests):
        budget.count_request()
        num_retries += budget.take()
        clock.advance(gap_s)
    refilled = FLOOR * (1 + num_requests * gap_s / WINDOW_S)
    assert num_retries <= max(refilled, SHARE * num_requests + FLOOR)
