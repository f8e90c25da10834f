"""What is learnt of a way follows requests, withstands absurd ones, and never locks a way out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.routing.learnt_ratio import MOST, PATIENCE, WINDOW, LearntRatio

SECONDS = st.floats(min_value=1e-9, max_value=1e9)
HISTORIES = st.lists(st.one_of(st.tuples(SECONDS, SECONDS), st.none()), max_size=200)
"""Requests that took this way, expected and actual seconds, and such as took another one."""
RECOVERY = 20
"""The number of requests after which the choice has to be right again."""


def after(history: Sequence[tuple[float, float] | None]) -> LearntRatio:
    ratio = LearntRatio()
    for sample in history:
        if sample is None:
            ratio.avoid()
        else:
            ratio.learn(*sample)
    return ratio


def test_nothing_is_off_before_anything_was_learnt() -> None:
    assert LearntRatio().value == 1.0


def test_a_few_absurd_requests_change_nothing() -> None:
    ratio = after([(1.0, 2.0)] * WINDOW + [(1.0, 1000.0)] * (WINDOW // 2))
    assert ratio.value == pytest.approx(2.0)


@given(HISTORIES, st.floats(min_value=1 / MOST, max_value=MOST))
def test_from_any_history_a_way_that_is_taken_is_soon_known(
    history: list[tuple[float, float] | None], truth: float
) -> None:
    ratio = after(history)
    for _ in range(WINDOW // 2 + 1):
        ratio.learn(1.0, truth)
    assert ratio.value == pytest.approx(truth)


@given(HISTORIES)
def test_from_any_history_a_way_that_is_avoided_soon_counts_as_it_was_measured(
    history: list[tuple[float, float] | None],
) -> None:
    ratio = after(history)
    for _ in range(PATIENCE):
        ratio.avoid()
    assert ratio.value == 1.0


@given(
    HISTORIES,
    HISTORIES,
    st.floats(min_value=0.5, max_value=2.0),
    st.floats(min_value=0.5, max_value=2.0),
    st.floats(min_value=0.02, max_value=50.0),
)
def test_from_any_history_of_two_ways_the_better_one_is_taken_within_20_requests(
    first: list[tuple[float, float] | None],
    second: list[tuple[float, float] | None],
    first_truth: float,
    second_truth: float,
    second_expected: float,
) -> None:
    ways = [after(first), after(second)]
    expected, truths = [1.0, second_expected], [first_truth, second_truth]
    costs = [e * t for e, t in zip(expected, truths, strict=True)]
    better = costs.index(min(costs))
    if max(costs) < 4.5 * min(costs):
        return  # a prior that is wrong by 2 for each way may decide between ways that are within 4 of each other
    choices = []
    for _ in range(RECOVERY + 10):
        predicted = [e * way.value for e, way in zip(expected, ways, strict=True)]
        chosen = predicted.index(min(predicted))
        choices.append(chosen)
        ways[chosen].learn(expected[chosen], expected[chosen] * truths[chosen])
        ways[1 - chosen].avoid()
    assert choices[RECOVERY:] == [better] * 10


def test_a_way_that_is_hopeless_is_tried_by_a_bounded_share_of_requests() -> None:
    hopeless, other = after([(1.0, 8.0)] * WINDOW), 0
    for _ in range(10 * (PATIENCE + 1)):
        if hopeless.value <= 1.5:
            other += 1
            hopeless.learn(1.0, 8.0)
        else:
            hopeless.avoid()
    assert other <= 14
