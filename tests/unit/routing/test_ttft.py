"""Predicted times to the first token: what they start from, what they learn, and that nothing throws them off."""

from __future__ import annotations

from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.least_squares import fit_non_negative
from app.routing.ttft import (
    MAX_AGE_S,
    REFIT_EVERY,
    RETRY_REQUESTS,
    RETRY_S,
    WINDOW,
    HandoverWork,
    PromptWork,
    TtftPredictor,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def truth(work: PromptWork, speed: float) -> float:
    """A machine that a prefill takes so long on."""
    uncached = work.num_tokens - work.cached
    squares = work.num_tokens**2 - work.cached**2
    return speed * (0.01 + 5e-5 * uncached + 2e-9 * squares + 6e-5 * work.queued)


def draw(random: Random) -> PromptWork:
    num_tokens = round(10 ** random.uniform(1.5, 4.2))
    return PromptWork(num_tokens, random.choice([0, 0, num_tokens // 2]), random.choice([0, 0, 3000, 20000]))


def teach(predictor: TtftPredictor, count: int, speed: float, noise: float = 0.0, seed: int = 0) -> None:
    random = Random(seed)
    for _ in range(count):
        work = draw(random)
        prefill_s = truth(work, speed) * random.lognormvariate(0, noise)
        predictor.learn_remote(
            work, HandoverWork(work.num_tokens), prefill_s + 0.02 + 2e-6 * work.num_tokens, prefill_s
        )


def test_nothing_is_predicted_before_anything_was_measured() -> None:
    predictor = TtftPredictor(Clock())
    assert predictor.predict((PromptWork(100, 0, 0), HandoverWork(100)), PromptWork(100, 0, 0), 0.0).remote_s is None
    assert predictor.local_s(PromptWork(100, 0, 0)) is None


def test_after_one_measurement_other_lengths_follow_the_start_values_proportions() -> None:
    predictor = TtftPredictor(Clock())
    work = PromptWork(1000, 0, 0)
    predictor.learn_remote(work, HandoverWork(1000), 5.0, 4.0)
    assert predictor.remote_s(work, HandoverWork(1000)) == pytest.approx(5.0, rel=0.25)
    longer = predictor.remote_s(PromptWork(8000, 0, 0), HandoverWork(8000))
    assert longer is not None
    assert 10 < longer < 60
    # Nothing else is known of a local prefill than what prefill takes.
    assert predictor.local_s(work) == pytest.approx(4.0, rel=0.25)


@given(st.floats(0.01, 100), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_machine_of_any_speed_is_learnt(speed: float, seed: int) -> None:
    predictor = TtftPredictor(Clock())
    teach(predictor, 100, speed, noise=0.05, seed=seed)
    random = Random(seed + 1)
    for _ in range(20):
        work = draw(random)
        wanted = truth(work, speed) + 0.02 + 2e-6 * work.num_tokens
        assert predictor.remote_s(work, HandoverWork(work.num_tokens)) == pytest.approx(wanted, rel=0.25)


def test_one_stall_hardly_moves_it() -> None:
    predictor = TtftPredictor(Clock())
    teach(predictor, 60, 1.0)
    work = PromptWork(2000, 0, 0)
    before = predictor.remote_s(work, HandoverWork(2000))
    for _ in range(8):  # until the next fit
        predictor.learn_remote(work, HandoverWork(2000), 30.0, 29.0)
        teach(predictor, 7, 1.0)
    assert before is not None
    assert predictor.remote_s(work, HandoverWork(2000)) == pytest.approx(before, rel=0.25)


def test_it_follows_a_machine_that_gets_slower() -> None:
    predictor = TtftPredictor(Clock())
    teach(predictor, 128, 1.0)
    teach(predictor, WINDOW + REFIT_EVERY, 4.0)
    work = PromptWork(2000, 0, 0)
    assert predictor.remote_s(work, HandoverWork(2000)) == pytest.approx(truth(work, 4.0) + 0.024, rel=0.1)


def test_what_was_measured_long_ago_counts_as_not_measured() -> None:
    clock = Clock()
    predictor = TtftPredictor(clock)
    teach(predictor, 50, 1.0)
    clock.now = MAX_AGE_S + 1
    assert predictor.remote_s(PromptWork(100, 0, 0), HandoverWork(100)) is None
    teach(predictor, 1, 9.0)
    work = PromptWork(2000, 0, 0)
    assert predictor.remote_s(work, HandoverWork(2000)) == pytest.approx(truth(work, 9.0), rel=0.6)


def test_what_made_handovers_slow_may_have_passed_so_they_are_tried_again_and_the_past_is_forgotten() -> None:
    """A wave that decode had no slots for, after which every prompt went to decode, and nobody saw it end."""
    clock = Clock()
    predictor = TtftPredictor(clock)
    work, handover = PromptWork(4000, 0, 0), HandoverWork(4000)
    for _ in range(WINDOW):
        predictor.learn_remote(work, handover, 10.3, 0.3)
    slow = predictor.remote_s(work, handover)
    assert slow is not None
    assert slow > 5
    clock.now += RETRY_S + 1
    for _ in range(RETRY_REQUESTS - 1):
        predictor.learn_local(work, 0.4)
    assert predictor.remote_s(work, handover) == slow
    predictor.learn_local(work, 0.4)
    assert predictor.remote_s(work, handover) is None
    predictor.learn_remote(work, handover, 0.35, 0.3)
    assert predictor.remote_s(work, handover) == pytest.approx(0.35, rel=0.1)


def test_many_requests_in_a_moment_do_not_make_the_other_way_unknown() -> None:
    predictor = TtftPredictor(Clock())
    work, handover = PromptWork(4000, 0, 0), HandoverWork(4000)
    predictor.learn_remote(work, handover, 0.35, 0.3)
    for _ in range(2 * RETRY_REQUESTS):
        predictor.learn_local(work, 0.1)
    assert predictor.remote_s(work, handover) is not None


def test_an_engine_that_tells_no_time_of_prefill_alone_is_learnt_as_a_whole() -> None:
    predictor = TtftPredictor(Clock())
    for num_tokens in (100, 1000, 10000) * 10:
        predictor.learn_remote(PromptWork(num_tokens, 0, 0), HandoverWork(num_tokens), 0.05 + 1e-4 * num_tokens, None)
    assert predictor.remote_s(PromptWork(3000, 0, 0), HandoverWork(3000)) == pytest.approx(0.35, rel=0.15)


def test_local_prefill_is_learnt_apart_and_slows_with_the_batch() -> None:
    predictor = TtftPredictor(Clock())
    teach(predictor, 50, 1.0)
    for num_tokens in (100, 1000, 10000) * 10:
        for sequences in (0, 20):
            work = PromptWork(num_tokens, 0, 0, sequences)
            predictor.learn_local(work, 3 * truth(work, 1.0) + 0.002 * sequences)
    work = PromptWork(3000, 0, 0)
    assert predictor.local_s(work) == pytest.approx(3 * truth(work, 1.0), rel=0.15)
    assert predictor.local_s(PromptWork(3000, 0, 0, 20)) == pytest.approx(3 * truth(work, 1.0) + 0.04, rel=0.15)


def test_interference_is_what_exceeds_the_budget_for_every_sequence() -> None:
    predictor = TtftPredictor(Clock())
    for num_tokens in (100, 1000, 10000) * 10:
        predictor.learn_local(PromptWork(num_tokens, 0, 0, 5), 0.5 + 1e-4 * num_tokens)
    work = PromptWork(5000, 1000, 0, 5)
    assert predictor.interference_s(work, 0.1) == pytest.approx(5 * (0.4 - 0.1), rel=0.2)
    assert predictor.interference_s(work, 1.0) == 0
    assert predictor.interference_s(PromptWork(5000, 1000, 0, 0), 0.1) == 0


def test_a_waiting_queue_is_predicted_at_the_measured_speed() -> None:
    predictor = TtftPredictor(Clock())
    for num_tokens in (100, 1000, 10000) * 10:
        predictor.learn_remote(
            PromptWork(num_tokens, 0, 0), HandoverWork(num_tokens), 1e-3 * num_tokens + 0.01, 1e-3 * num_tokens
        )
    assert predictor.queue_s(5000) == pytest.approx(5.0, rel=0.2)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(-1e3, 1e4), st.floats(0, 1)),
        min_size=1,
        max_size=30,
    )
)
@settings(deadline=None)
def test_no_measurement_makes_a_prediction_negative_or_infinite(samples: list[tuple[int, int, float, float]]) -> None:
    predictor = TtftPredictor(Clock())
    for num_tokens, queued, seconds, share in samples:
        work = PromptWork(num_tokens, num_tokens // 3, queued)
        predictor.learn_remote(work, HandoverWork(num_tokens), seconds, seconds * share)
        predictor.learn_local(work, seconds)
    for num_tokens in (1, 1000, 10**6):
        work = PromptWork(num_tokens, 0, 0, 10)
        predicted = predictor.predict((work, HandoverWork(num_tokens)), work, 0.05)
        assert predicted.remote_s is not None
        assert predicted.local_s is not None
        assert all(0 <= seconds < inf for seconds in (predicted.remote_s, predicted.local_s, predicted.interference_s))


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1000), st.floats(0.001, 100)), min_size=1, max_size=20))
def test_least_squares_find_no_negative_coefficient_and_no_worse_fit_than_each_column_alone(
    samples: list[tuple[float, float, float]],
) -> None:
    rows = [[1.0, a, b] for a, b, _ in samples]
    values = [value for *_, value in samples]

    def error(coefficients: list[float]) -> float:
        fitted = [sum(c * x for c, x in zip(coefficients, row, strict=True)) for row in rows]
        return sum((f / v - 1) ** 2 for f, v in zip(fitted, values, strict=True))

    found = fit_non_negative(rows, values)
    assert min(found) >= 0
    mean = sum(1 / v for v in values) / sum(1 / v**2 for v in values)
    assert error(found) <= error([mean, 0.0, 0.0]) * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize(
    "busy", [HandoverWork(1000, decoding=8), HandoverWork.after(PromptWork(1000, 0, 0), 1000, 0, 5000)]
)
def test_a_handover_to_a_busy_replica_is_predicted_to_take_longer_as_soon_as_some_did(busy: HandoverWork) -> None:
    predictor = TtftPredictor(Clock())
    for n in (100, 1000, 10000) * 10:
        predictor.learn_remote(PromptWork(n, 0, 0), HandoverWork(n), 1e-4 * n + 0.02, 1e-4 * n)
    work = PromptWork(1000, 0, 0)
    for _ in range(REFIT_EVERY):
        predictor.learn_remote(work, busy, 0.1 + 0.1, 0.1)
    assert predictor.remote_s(work, busy) == pytest.approx(0.2, rel=0.15)
    assert predictor.remote_s(work, HandoverWork(1000)) == pytest.approx(0.12, rel=0.15)


def test_what_waits_on_decode_delays_a_handover_only_if_it_lasts_longer_than_prefill() -> None:
    prefill = PromptWork(num_tokens=1000, cached=200, queued=500)
    assert HandoverWork.after(prefill, 1000, 3, queued=1300).row() == (1.0, 1000, 3, 0)
    assert HandoverWork.after(prefill, 1000, 3, queued=1400).row() == (1.0, 1000, 3, 100)
