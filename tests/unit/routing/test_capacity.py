"""What a replica takes: as much as keeps the promised time between tokens, and in any case enough to get on."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.messages import ReplicaLoad
from app.pace import Pace
from app.routing.capacity import FILL, MAX_KV_USE, MIN_BATCH, QUEUE_S, Capacity, has_queue_room
from app.routing.pool_state import START_PACE, ReplicaState
from tests.unit.routing.fleet import PACE
from tests.unit.routing.samples import BLOCK_SIZE, replica_info

ITL_S = 0.05
NUM_BLOCKS = 100_000
CAPACITY = Capacity(ITL_S)

paces = st.builds(
    Pace,
    prefill_base_s=st.floats(0, 0.02),
    prefill_s_per_token=st.floats(1e-6, 1e-3),
    step_base_s=st.floats(0, 0.1),
    step_s_per_sequence=st.floats(0, 0.005),
    step_s_per_kv_token=st.floats(0, 1e-6),
)


def replica(
    sequences: int = 0,
    pace: Pace | None = PACE,
    role: str = "decode",
    *,
    num_blocks: int = NUM_BLOCKS,
    max_sequences: int = 0,
    **load: Any,
) -> ReplicaState:
    info = replica_info("r", role, pace=pace, num_blocks=num_blocks, max_sequences=max_sequences)
    state = ReplicaState(info)
    if "queued_tokens" in load:
        load.setdefault("queued_s", state.pace.compute_s(load["queued_tokens"]))
    state.report(ReplicaLoad(sequences, **load))
    return state


# Sequences


def test_a_replica_takes_sequences_until_the_next_one_would_make_its_steps_too_long() -> None:
    most = next(n for n in range(MIN_BATCH, 10_000) if not CAPACITY.has_decode_room(replica(n), 0))
    assert PACE.step_s(most, 0) <= FILL * ITL_S < PACE.step_s(most + 1, 0)


def test_the_kv_of_what_runs_and_of_the_prompt_counts_in_the_step() -> None:
    most = next(n for n in range(MIN_BATCH, 10_000) if not CAPACITY.has_decode_room(replica(n), 0))
    spare_s = FILL * ITL_S - PACE.step_s(most - 9, 0)  # with ten sequences less, one of which is to come
    num_tokens = int(spare_s / PACE.step_s_per_kv_token)
    assert CAPACITY.has_decode_room(replica(most - 10), num_tokens - 1)
    assert not CAPACITY.has_decode_room(replica(most - 10), num_tokens + 1)
    assert CAPACITY.has_decode_room(replica(most - 10, kv_tokens=num_tokens - 2), 1)
    assert not CAPACITY.has_decode_room(replica(most - 10, kv_tokens=num_tokens), 1)
    # A prefix that many share takes few blocks, but each step reads it for each of them.
    assert CAPACITY.has_decode_room(replica(most - 10, used_blocks=num_tokens // BLOCK_SIZE), 1)


@given(paces, st.floats(0.1, 10), st.integers(0, 300), st.integers(1, 10_000), st.integers(0, NUM_BLOCKS // 2))
def test_what_is_taken_beyond_the_least_batch_keeps_the_promise(
    pace: Pace, slowness: float, sequences: int, num_tokens: int, used_blocks: int
) -> None:
    state = replica(sequences, pace, slowness=slowness, used_blocks=used_blocks)
    assume(CAPACITY.is_bounded(state) and sequences >= MIN_BATCH)
    expected = CAPACITY.itl_after_s(state, num_tokens) <= FILL * ITL_S
    assert CAPACITY.has_decode_room(state, num_tokens) is expected


def test_a_few_sequences_are_taken_whatever_was_promised() -> None:
    slow = Pace(prefill_base_s=0.01, prefill_s_per_token=1e-4, step_base_s=ITL_S / 2, step_s_per_sequence=ITL_S / 4)
    assert CAPACITY.is_bounded(replica(pace=slow))
    assert [CAPACITY.has_decode_room(replica(n, slow), 100) for n in (1, MIN_BATCH - 1, MIN_BATCH)] == [
        True,
        True,
        False,
    ]


def test_a_promise_that_cannot_be_kept_bounds_nothing() -> None:
    for state in (
        replica(1000, Pace(prefill_base_s=0.01, prefill_s_per_token=1e-4, step_base_s=1.01 * ITL_S)),
        replica(1000, slowness=1.01 * ITL_S / PACE.step_s(1, 0)),
        replica(1000, pace=None),
    ):
        assert not CAPACITY.is_bounded(state)
        assert CAPACITY.has_decode_room(state, 100)
        assert CAPACITY.has_prefill_budget(state, 1_000_000, 100.0)
    assert CAPACITY.is_bounded(replica(1000))


def test_steps_that_are_slower_than_by_the_pace_let_fewer_sequences_in() -> None:
    assert CAPACITY.has_decode_room(replica(40), 100)
    assert not CAPACITY.has_decode_room(replica(40, slowness=2.5), 100)


@pytest.mark.parametrize("pace", [PACE, None], ids=["bounded", "not bounded"])
def test_no_sequence_is_taken_whose_prompt_would_fill_the_kv_memory(pace: Pace | None) -> None:
    room = int(MAX_KV_USE * 100)
    for sequences in (1, MIN_BATCH, 2 * MIN_BATCH):
        state = replica(sequences, pace, num_blocks=100, used_blocks=40)
        assert CAPACITY.has_decode_room(state, (room - 40) * BLOCK_SIZE)
        assert not CAPACITY.has_decode_room(state, (room - 40) * BLOCK_SIZE + 1)
        assert CAPACITY.has_decode_room(state, (room - 40) * BLOCK_SIZE + 1, cached=1)


def test_no_more_sequences_are_taken_than_the_engine_has_slots_for() -> None:
    for pace in (PACE, None):
        assert CAPACITY.has_decode_room(replica(3, pace, max_sequences=4), 100)
        assert not CAPACITY.has_decode_room(replica(4, pace, max_sequences=4), 100)


def test_sequences_count_with_the_kv_that_they_will_have_on_the_mean() -> None:
    now = CAPACITY.step_s(replica(10, decoding=10), 1, 100)
    grown = CAPACITY.step_s(replica(10, decoding=10, growth_tokens=5000), 1, 100)
    assert grown - now == pytest.approx(5000 * PACE.step_s_per_kv_token)
    # Those that have yet to decode, the one to come among them, grow from their prompts on.
    grown = CAPACITY.step_s(replica(10, decoding=7, output_tokens=200), 1, 100)
    assert grown - now == pytest.approx(4 * 100 * PACE.step_s_per_kv_token)


def test_a_replica_that_serves_nothing_takes_any_sequence() -> None:
    slow = Pace(prefill_base_s=0.01, prefill_s_per_token=1e-4, step_base_s=0.0, step_s_per_kv_token=1.0)
    assert CAPACITY.has_decode_room(replica(0, slow, num_blocks=10), 1_000_000)


def test_what_a_prefill_replica_computes_for_others_is_no_sequence_that_it_serves() -> None:
    assert CAPACITY.has_decode_room(replica(10_000, role="prefill"), 100)
    assert not CAPACITY.has_decode_room(replica(10_000, role="prefill", decoding=10_000), 100)


# Prompts beside sequences


def test_a_replica_without_sequences_may_compute_any_prompt() -> None:
    assert CAPACITY.has_prefill_budget(replica(0, prefill_share=1.0, queued_tokens=10**6), 1_000_000, 1e6)
    assert CAPACITY.has_prefill_budget(replica(9, role="prefill", prefill_share=1.0), 1_000_000, 1e6)


def test_steps_and_prompts_past_waiting_and_new_share_the_promised_time() -> None:
    step_s, num_tokens = PACE.step_s(20, 0), 100

    def fits(prefill_s: float, **load: Any) -> bool:
        return CAPACITY.has_prefill_budget(replica(20, window_s=4.0, **load), num_tokens, prefill_s)

    left_s = 4.0 * (FILL - step_s / ITL_S)
    # The step that computes the prompt gives sequences a token too.
    assert fits(0.99 * left_s + step_s)
    assert not fits(1.01 * left_s + step_s)
    assert fits(0.49 * left_s + step_s, prefill_share=left_s / 4.0 / 2)
    assert not fits(0.51 * left_s + step_s, prefill_share=left_s / 4.0 / 2)
    queued = 5000
    num_steps = ceil((queued + num_tokens) / PACE.chunk_tokens)
    rest_s = num_steps * step_s - replica(20, queued_tokens=queued).queue_s
    assert fits(0.99 * left_s + rest_s, queued_tokens=queued)
    assert not fits(1.01 * left_s + rest_s, queued_tokens=queued)


def test_a_prompt_that_fits_into_the_steps_of_decode_takes_nothing_from_sequences() -> None:
    state = replica(20, prefill_share=0.99 * (FILL - PACE.step_s(20, 0) / ITL_S))
    assert CAPACITY.has_prefill_budget(state, 10, PACE.step_s(20, 0))
    assert not CAPACITY.has_prefill_budget(state, 10, 2 * PACE.step_s(20, 0))


def test_a_sequence_that_is_to_join_needs_budget_for_its_own_prompt() -> None:
    empty, step_s = replica(0, role="prefill"), PACE.step_s(1, 100)
    left_s = (FILL - step_s / ITL_S) * empty.load.window_s
    assert CAPACITY.has_prefill_budget(empty, 100, 0.99 * left_s + step_s, joins=True)
    assert not CAPACITY.has_prefill_budget(empty, 100, 1.01 * left_s + step_s, joins=True)
    assert CAPACITY.has_prefill_budget(empty, 100, 1e6)


@given(
    paces,
    st.integers(1, 100),
    st.floats(0, 1),
    st.floats(0.5, 10),
    st.integers(0, 20_000),
    st.floats(0, 5),
    st.floats(0, 1),
)
def test_what_is_within_the_budget_keeps_the_promise_and_so_does_less(
    pace: Pace, sequences: int, share: float, window_s: float, queued: int, prefill_s: float, part: float
) -> None:
    state = replica(sequences, pace, prefill_share=share, window_s=window_s, queued_tokens=queued)
    assume(CAPACITY.is_bounded(state) and CAPACITY.has_prefill_budget(state, 1000, prefill_s))
    step_s = CAPACITY.step_s(state)
    num_steps = ceil((queued + 1000) / pace.chunk_tokens)
    spent = share + max(0.0, state.queue_s + prefill_s - num_steps * step_s) / window_s
    assert step_s / (1 - spent) <= ITL_S
    assert CAPACITY.has_prefill_budget(state, 1000, part * prefill_s)


# Predicted times between tokens


def test_a_step_is_stretched_by_the_share_of_the_time_in_which_prompts_are_computed() -> None:
    step_s = PACE.step_s(5, 100)
    assert CAPACITY.itl_after_s(replica(4), 100) == pytest.approx(step_s)
    assert CAPACITY.itl_after_s(replica(4, prefill_share=0.5), 100) == pytest.approx(2 * step_s)
    stall_s = 1.0 - step_s  # the step with the prompt gives sequences a token too
    assert CAPACITY.itl_after_s(replica(4, window_s=4.0), 100, 1.0) == pytest.approx(step_s / (1 - stall_s / 4.0))
    queued = replica(4, window_s=4.0, queued_tokens=5000)
    stall_s = 1.0 + queued.queue_s - ceil(5100 / PACE.chunk_tokens) * step_s
    assert CAPACITY.itl_after_s(queued, 100, 1.0) == pytest.approx(step_s / (1 - stall_s / 4.0))


@given(paces, st.integers(0, 1000), st.floats(0, 1), st.floats(0.5, 10), st.floats(0, 1e6))
def test_however_much_is_to_be_prefilled_the_predicted_time_between_tokens_is_finite_and_not_negative(
    pace: Pace, sequences: int, share: float, window_s: float, prefill_s: float
) -> None:
    state = replica(sequences, pace, prefill_share=share, window_s=window_s)
    predicted_s = CAPACITY.itl_after_s(state, 100, prefill_s)
    assert CAPACITY.step_s(state, 1, 100) <= predicted_s < 1e6


# Prompts that wait


def test_an_idle_replica_takes_a_prompt_of_any_length() -> None:
    assert has_queue_room(replica(), 10**7, 0)


@pytest.mark.parametrize("pace", [PACE, START_PACE])
@pytest.mark.parametrize("num_tokens", [1, 2048, 50_000])
def test_a_replica_has_work_for_a_little_longer_than_a_full_step_or_another_such_prompt(
    pace: Pace, num_tokens: int
) -> None:
    longest_s = QUEUE_S + max(pace.prompt_s(num_tokens), pace.prompt_s(pace.chunk_tokens))
    step_tokens = pace.chunk_tokens
    for queued in range(step_tokens // 2, 60 * step_tokens, step_tokens // 2):
        state = replica(3, pace, queued_tokens=queued)
        assert has_queue_room(state, num_tokens, 0) is (state.queue_s <= longest_s)


def test_one_that_overtakes_others_has_room_for_one_prompt_more_and_no_further() -> None:
    for queued in range(1000, 40_000, 1000):
        state, prompt_s = replica(3, queued_tokens=queued), PACE.prompt_s(4000)
        assert has_queue_room(state, 4000, 0, overtakes=True) is (state.queue_s <= QUEUE_S + 2 * prompt_s)


@given(paces, st.integers(1, 50_000), st.integers(1, 200_000), st.floats(0, 0.99))
def test_a_prompt_waits_at_a_replica_if_what_it_has_cached_saves_more_time(
    pace: Pace, num_tokens: int, queued: int, share: float
) -> None:
    state, cached = replica(3, pace, queued_tokens=queued), int(share * num_tokens)
    if state.queue_s <= pace.prompt_s(num_tokens) - pace.prompt_s(num_tokens, cached):
        assert has_queue_room(state, num_tokens, cached)
    if has_queue_room(state, num_tokens, 0):
        assert has_queue_room(state, num_tokens, cached) or not cached


def test_work_that_other_frontends_sent_counts_as_soon_as_the_replica_tells_of_it() -> None:
    state = replica(3, queued_tokens=100_000)
    assert not has_queue_room(state, 100, 0)
    state.report(ReplicaLoad(1, 100, queued_s=PACE.compute_s(100)))
    assert has_queue_room(state, 100, 0)
