"""The sim engine's scheduler: any order of adding, stepping and cancelling keeps its books right."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from app.engines.sim.blocks import MAX_WAITING_EVENTS, BlockPool
from app.engines.sim.profile import PrefillTimes, SimProfile, StepTimes, TransferTimes
from app.engines.sim.scheduler import ScheduledSequence, Scheduler, SchedulerLimits, Step
from app.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

PROFILE = SimProfile(
    source="made up",
    prefill=PrefillTimes(base_s=0.010, per_token_s=1e-4, per_token_squared_s=1e-8),
    step=StepTimes(base_s=0.005, per_sequence_s=1e-4, per_kv_token_s=1e-6),
    transfer=TransferTimes(base_s=0.001, bytes_per_s=1e9),
    kv_bytes_per_token=1000,
)
VOCABULARY = range(10, 1010)


def make_scheduler(seed: int = 0, **limits: Any) -> Scheduler:
    defaults = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return Scheduler(SchedulerLimits(**{**defaults, **limits}), PROFILE, VOCABULARY, seed)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(VOCABULARY, k=num_tokens)


def run(
    scheduler: Scheduler, *sequences: ScheduledSequence, on_step: Callable[[Step], None] = lambda step: None
) -> float:
    """Add `sequences` and step until they have ended; the modelled seconds.  KV to be pulled arrives, and is right."""
    for sequence in sequences:
        scheduler.add(sequence)
    seconds = 0.0
    while any(sequence.state not in ("ended", "held") for sequence in sequences):
        step = scheduler.step()
        assert step is not None, "nothing can run, but not all have ended"
        seconds += step.duration_s
        on_step(step)
        for sequence in step.pulls:
            scheduler.end_transfer(sequence, sequence.digest)
    return seconds


def output(sequence: ScheduledSequence) -> list[int]:
    return sequence.tokens[sequence.prompt_tokens :]


def replay(events: list[KvEvent], cached: set[int | bytes]) -> set[int | bytes]:
    """What a consumer of `events` takes the cache to hold.  Checks that each event fits what came before."""
    for event in events:
        if isinstance(event, AllBlocksCleared):
            cached = set()
        elif isinstance(event, BlockStored):
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            assert cached.isdisjoint(event.block_hashes)
            cached |= set(event.block_hashes)
        else:
            assert isinstance(event, BlockRemoved)
            assert cached >= set(event.block_hashes)
            cached -= set(event.block_hashes)
    return cached


class AnyOrder(RuleBasedStateMachine):
    """Sequences of all kinds come, run, arrive and are cancelled; blocks are few, so that some are preempted."""

    alive = Bundle("alive")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_blocks=16, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=12)
        self.sequences: list[ScheduledSequence] = []
        self.transferring: list[ScheduledSequence] = []
        self.cached = replay(self.scheduler.pool.take_events(), set())

    @rule(
        target=alive,
        num_tokens=st.integers(1, 40),
        kind=st.integers(0, 3),
        max_tokens=st.integers(1, 30),
        way=st.sampled_from(["generate", "handoff", "pull"]),
        salt=st.sampled_from([None, None, "salt"]),
    )
    def add(self, num_tokens: int, kind: int, max_tokens: int, way: str, salt: str | None) -> ScheduledSequence:
        sequence = ScheduledSequence(
            prompt(40, kind)[:num_tokens],
            max_tokens=max_tokens,
            cache_salt=salt,
            is_handoff=way == "handoff",
            is_pulled=way == "pull",
        )
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    @rule(times=st.integers(1, 5))
    def step(self, times: int) -> None:
        for _ in range(times):
            before = {id(s): len(s.tokens) for s in self.sequences}
            step = self.scheduler.step()
            if step is None:
                return
            assert step.duration_s > 0 or not step.outputs
            self.transferring += step.pulls
            grown = {id(s) for s in self.sequences if len(s.tokens) > before[id(s)]}
            assert grown == {id(s) for s in step.outputs if not s.is_handoff}
            assert all(len(s.tokens) - before[id(s)] == 1 for s in self.sequences if id(s) in grown)

    @precondition(lambda self: self.transferring)
    @rule(arrives=st.sampled_from(["right", "wrong", "nothing"]), data=st.data())
    def end_transfer(self, arrives: str, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.transferring) - 1))
        sequence = self.transferring.pop(at)
        digest = {"right": sequence.digest, "wrong": sequence.digest + 1, "nothing": None}[arrives]
        self.scheduler.end_transfer(sequence, digest)

    @rule(sequence=consumes(alive))
    def cancel(self, sequence: ScheduledSequence) -> None:
        self.scheduler.cancel(sequence)
        assert sequence.state == "ended"
        self.scheduler.cancel(sequence)

    @invariant()
    def every_block_is_held_by_those_who_have_it_or_free(self) -> None:
        pool = self.scheduler.pool
        held = [block for s in self.sequences for block in s.blocks]
        assert all(pool.num_holders(block) == held.count(block) for block in range(pool.num_blocks))
        assert self.scheduler.num_used_blocks == len(set(held)) <= pool.num_blocks

    @invariant()
    def who_runs_has_room_for_what_is_computed(self) -> None:
        for sequence in self.sequences:
            assert sequence.computed <= len(sequence.blocks) * 4 or sequence.state == "ended"

    @invariant()
    def events_tell_what_the_cache_holds(self) -> None:
        self.cached = replay(self.scheduler.pool.take_events(), self.cached)
        assert self.cached == self.scheduler.pool.cached_hashes

    def teardown(self) -> None:
        """Whatever happened, all that was added ends, and no block is missing then."""
        for sequence in self.transferring:
            self.scheduler.end_transfer(sequence, None)
        for _ in range(10_000):
            for sequence in self.sequences:
                if sequence.state == "held":
                    self.scheduler.cancel(sequence)
            step = self.scheduler.step()
            if step is None:
                break
            for sequence in step.pulls:
                self.scheduler.end_transfer(sequence, sequence.digest)
        assert all(sequence.state == "ended" for sequence in self.sequences)
        assert self.scheduler.num_used_blocks == self.scheduler.num_running == self.scheduler.num_waiting == 0


AnyOrder.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_prompt_takes_as_long_as_the_profile_says_and_each_token_one_step() -> None:
    durations: list[float] = []
    sequence = ScheduledSequence(prompt(40), max_tokens=3)
    run(make_scheduler(), sequence, on_step=lambda step: durations.append(step.duration_s))
    assert durations == pytest.approx([PROFILE.prefill_s(40), PROFILE.step_s(1, 41), PROFILE.step_s(1, 42)])


def test_a_step_takes_longer_with_more_sequences_and_more_kv() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    durations: list[float] = []
    sequences = [ScheduledSequence(prompt(20, seed), max_tokens=2) for seed in range(3)]
    run(scheduler, *sequences, on_step=lambda step: durations.append(step.duration_s))
    # All three prompts share one step, its base and each prompt's own squares; then all decode together.
    per_token = 60 * PROFILE.prefill.per_token_s + 3 * 20**2 * PROFILE.prefill.per_token_squared_s
    assert durations == pytest.approx([PROFILE.prefill.base_s + per_token, PROFILE.step_s(3, 3 * 21)])


def test_a_long_prompt_is_computed_in_chunks_that_cost_the_same_squares() -> None:
    durations: list[float] = []
    scheduler = make_scheduler(max_num_batched_tokens=64)
    run(scheduler, ScheduledSequence(prompt(200), max_tokens=1), on_step=lambda step: durations.append(step.duration_s))
    assert len(durations) == 4
    assert sum(durations) == pytest.approx(PROFILE.prefill_s(200) + 3 * PROFILE.prefill.base_s)


def test_sequences_that_decode_do_not_wait_for_a_long_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    first, long = ScheduledSequence(prompt(8), max_tokens=30), ScheduledSequence(prompt(200, 1), max_tokens=1)
    scheduler.add(first)
    scheduler.step()
    scheduler.add(long)
    for expected in range(2, 8):
        step = scheduler.step()
        assert step is not None
        assert first in step.outputs
        assert len(output(first)) == expected
        assert step.duration_s < PROFILE.prefill_s(64)
    assert long.computed == 6 * 31


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    first, again = ScheduledSequence(prompt(41), max_tokens=1), ScheduledSequence(prompt(41), max_tokens=1)
    cold = run(scheduler, first)
    assert first.cached_tokens == 0
    warm = run(scheduler, again)
    assert again.cached_tokens == 40
    assert warm == pytest.approx(PROFILE.step_s(1, 41))
    assert warm < cold
    shared = ScheduledSequence(prompt(41)[:24] + prompt(17, 5), max_tokens=1)
    run(scheduler, shared)
    assert shared.cached_tokens == 24


def test_the_last_token_is_computed_even_if_all_of_the_prompt_is_cached() -> None:
    scheduler = make_scheduler()
    run(scheduler, ScheduledSequence(prompt(40), max_tokens=4))
    again = ScheduledSequence(prompt(40), max_tokens=4)
    run(scheduler, again)
    assert again.cached_tokens == 36


def test_another_salt_or_no_caching_shares_nothing() -> None:
    scheduler = make_scheduler()
    run(scheduler, ScheduledSequence(prompt(41), max_tokens=1, cache_salt="one"))
    salted = ScheduledSequence(prompt(41), max_tokens=1, cache_salt="two")
    run(scheduler, salted)
    assert salted.cached_tokens == 0
    without = make_scheduler(enable_prefix_caching=False)
    for _ in range(2):
        sequence = ScheduledSequence(prompt(41), max_tokens=1)
        run(without, sequence)
        assert sequence.cached_tokens == 0
    assert not without.pool.cached_hashes


def test_what_was_used_longest_ago_is_evicted_first_and_never_served_again() -> None:
    scheduler = make_scheduler(num_blocks=20, max_model_len=80)
    a, b = prompt(33, 1), prompt(33, 2)
    run(scheduler, ScheduledSequence(a, max_tokens=1))
    run(scheduler, ScheduledSequence(b, max_tokens=1))
    run(scheduler, ScheduledSequence(a, max_tokens=1))  # a is the younger one now
    run(scheduler, ScheduledSequence(prompt(30, 3), max_tokens=1))
    again_a, again_b = ScheduledSequence(a, max_tokens=1), ScheduledSequence(b, max_tokens=1)
    run(scheduler, again_a)
    assert again_a.cached_tokens == 32
    run(scheduler, again_b)
    assert again_b.cached_tokens < 32


def test_sequences_are_preempted_where_blocks_run_out_and_their_output_stays() -> None:
    def serve(num_blocks: int) -> tuple[list[list[int]], int]:
        preempted = 0

        def count(step: Step) -> None:
            nonlocal preempted
            preempted += step.num_preempted

        sequences = [ScheduledSequence(prompt(20, seed), max_tokens=40) for seed in range(4)]
        run(make_scheduler(num_blocks=num_blocks, max_model_len=64), *sequences, on_step=count)
        return [output(sequence) for sequence in sequences], preempted

    plenty, no_preemption = serve(64)
    scarce, preemptions = serve(24)
    assert no_preemption == 0
    assert preemptions > 0
    assert scarce == plenty


def test_output_depends_on_prompt_and_seed_and_not_on_batching() -> None:
    sequences = [ScheduledSequence(prompt(50, seed), max_tokens=20) for seed in range(6)]
    run(make_scheduler(), *sequences)
    for seed, together in enumerate(sequences):
        alone = ScheduledSequence(prompt(50, seed), max_tokens=20)
        run(make_scheduler(max_num_batched_tokens=8), alone)
        assert output(alone) == output(together)
    outputs = {tuple(output(sequence)) for sequence in sequences}
    assert len(outputs) == 6
    another = ScheduledSequence(prompt(50, 0), max_tokens=20)
    run(make_scheduler(seed=1), another)
    assert output(another) != output(sequences[0])
    assert len(set(output(another))) > 15  # no token over and over


def test_output_is_the_same_in_another_process() -> None:
    sequence = ScheduledSequence([1, 2, 3], max_tokens=5, cache_salt="salt", sampling_seed=4)
    run(make_scheduler(), sequence)
    program = (
        "from tests.unit.engines.test_sim_scheduler import *;"
        "s = ScheduledSequence([1, 2, 3], max_tokens=5, cache_salt='salt', sampling_seed=4);"
        "run(make_scheduler(), s); print(output(s))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(output(sequence))


def test_a_sampling_seed_changes_the_output() -> None:
    outputs = set()
    for seed in (None, 0, 1):
        sequence = ScheduledSequence(prompt(10), max_tokens=10, sampling_seed=seed)
        run(make_scheduler(), sequence)
        outputs.add(tuple(output(sequence)))
    assert len(outputs) == 3


def test_output_ends_with_max_tokens_a_stop_token_or_max_model_len() -> None:
    free = ScheduledSequence(prompt(10), max_tokens=20)
    run(make_scheduler(), free)
    assert (len(output(free)), free.finish_reason) == (20, "length")
    stop = output(free)[7]
    stopped = ScheduledSequence(prompt(10), max_tokens=20, stop_token_ids=[stop])
    run(make_scheduler(), stopped)
    assert output(stopped) == output(free)[: output(free).index(stop) + 1]
    assert stopped.finish_reason == "stop"
    patient = ScheduledSequence(prompt(10), max_tokens=20, min_tokens=12, stop_token_ids=[stop])
    run(make_scheduler(), patient)
    assert len(output(patient)) > 12
    bounded = ScheduledSequence(prompt(10), max_tokens=10_000)
    run(make_scheduler(max_model_len=32), bounded)
    assert len(bounded.tokens) == 32


def test_a_pulled_prompt_is_not_computed_and_its_output_is_that_of_the_aggregated_one() -> None:
    aggregated = ScheduledSequence(prompt(50), max_tokens=10)
    run(make_scheduler(), aggregated)
    durations: list[float] = []
    pulled = ScheduledSequence(prompt(50), max_tokens=10, is_pulled=True)
    run(make_scheduler(), pulled, on_step=lambda step: durations.append(step.duration_s))
    assert pulled.transferred_tokens == 50
    assert output(pulled) == output(aggregated)
    assert durations[:2] == pytest.approx([0.0, PROFILE.step_s(1, 50)])


def test_only_what_decode_has_not_cached_is_pulled() -> None:
    scheduler = make_scheduler()
    run(scheduler, ScheduledSequence(prompt(50)[:21], max_tokens=1))
    partly = ScheduledSequence(prompt(50), max_tokens=1, is_pulled=True)
    run(scheduler, partly)
    assert (partly.cached_tokens, partly.transferred_tokens) == (20, 30)
    run(scheduler, ScheduledSequence(prompt(45, 9), max_tokens=1))
    wholly = ScheduledSequence(prompt(45, 9), max_tokens=1, is_pulled=True)
    run(scheduler, wholly)
    assert (wholly.cached_tokens, wholly.transferred_tokens) == (44, 0)


def pull(scheduler: Scheduler, tokens: list[int], digest: int | None, salt: str | None = None) -> ScheduledSequence:
    sequence = ScheduledSequence(tokens, max_tokens=10, is_pulled=True, cache_salt=salt)
    scheduler.add(sequence)
    while sequence.state != "ended":
        step = scheduler.step()
        assert step is not None
        for pulled in step.pulls:
            scheduler.end_transfer(pulled, digest)
    return sequence


def test_kv_of_another_prompt_changes_the_output_and_goes_on_doing_so_from_the_cache() -> None:
    right = ScheduledSequence(prompt(50), max_tokens=10)
    run(make_scheduler(), right)
    scheduler = make_scheduler()
    wrong = pull(scheduler, prompt(50), right.digest + 1)
    assert output(wrong) != output(right)
    again = pull(scheduler, prompt(50), right.digest + 1)  # mostly from the cache this time
    assert again.cached_tokens == 48
    assert output(again) != output(right)
    longer = ScheduledSequence(prompt(50) + prompt(20, 3), max_tokens=10)
    run(scheduler, longer)
    honest = ScheduledSequence(prompt(50) + prompt(20, 3), max_tokens=10)
    run(make_scheduler(), honest)
    assert output(longer) != output(honest)
    elsewhere = pull(scheduler, prompt(50), right.digest, salt="salt")
    assert output(elsewhere) == output(right)


def test_blocks_that_held_wrong_kv_are_clean_once_they_hold_something_else() -> None:
    scheduler = make_scheduler(num_blocks=16, max_model_len=64)
    pull(scheduler, prompt(50), prompt(50)[0])
    for seed in (1, 2):
        run(scheduler, ScheduledSequence(prompt(50, seed), max_tokens=10))
    again, elsewhere = ScheduledSequence(prompt(50, 2), max_tokens=10), ScheduledSequence(prompt(50, 2), max_tokens=10)
    run(scheduler, again)
    run(make_scheduler(), elsewhere)
    assert again.cached_tokens == 48
    assert output(again) == output(elsewhere)


def test_a_transfer_that_fails_is_computed_here() -> None:
    right = ScheduledSequence(prompt(50), max_tokens=10)
    run(make_scheduler(), right)
    recomputed = pull(make_scheduler(), prompt(50), None)
    assert recomputed.transferred_tokens == 0
    assert output(recomputed) == output(right)


def test_a_handoff_keeps_its_blocks_until_it_is_cancelled() -> None:
    scheduler = make_scheduler(num_blocks=20, max_model_len=80)
    handoff = ScheduledSequence(prompt(50), max_tokens=1, is_handoff=True)
    run(scheduler, handoff)
    assert handoff.state == "held"
    assert (scheduler.num_used_blocks, scheduler.num_running) == (13, 0)
    waiting = ScheduledSequence(prompt(50, 1), max_tokens=1, is_handoff=True)
    scheduler.add(waiting)
    assert scheduler.step() is None
    scheduler.cancel(handoff)
    assert scheduler.step() is not None
    assert waiting.state == "held"
    scheduler.cancel(waiting)
    assert scheduler.num_used_blocks == 0


@given(st.lists(st.integers(-2, 2), max_size=12))
def test_those_that_wait_go_by_priority_and_then_by_their_arrival(priorities: list[int]) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    waiting = [ScheduledSequence(prompt(8, i), max_tokens=1, priority=each) for i, each in enumerate(priorities)]
    ended: list[ScheduledSequence] = []
    run(scheduler, *waiting, on_step=lambda step: ended.extend(step.outputs))
    assert [waiting.index(each) for each in ended] == sorted(range(len(waiting)), key=lambda i: (priorities[i], i))


def test_where_blocks_run_out_the_one_that_would_go_last_gives_up_its_own() -> None:
    scheduler = make_scheduler(num_blocks=5, max_model_len=20)
    first, second = (ScheduledSequence(prompt(8, i), max_tokens=9, priority=1 - i) for i in range(2))
    scheduler.add(first)
    scheduler.step()
    scheduler.add(second)
    while not ((step := scheduler.step()) and step.num_preempted):
        assert step is not None
    assert (first.state, second.state) == ("preempted", "running")


def test_no_more_sequences_run_than_may() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for seed in range(5):
        scheduler.add(ScheduledSequence(prompt(8, seed), max_tokens=3))
    scheduler.step()
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 3)


def test_events_describe_chains_of_blocks() -> None:
    scheduler = make_scheduler()
    assert scheduler.pool.take_events() == [AllBlocksCleared()]
    tokens = prompt(13)
    run(scheduler, ScheduledSequence(tokens, max_tokens=4))
    first, second = scheduler.pool.take_events()
    assert isinstance(first, BlockStored)
    assert isinstance(second, BlockStored)
    assert (first.parent_block_hash, first.token_ids, first.block_size) == (None, tokens[:12], 4)
    assert second.parent_block_hash == first.block_hashes[-1]
    assert second.token_ids[0] == tokens[12]
    assert scheduler.pool.take_events() == []
    run(scheduler, ScheduledSequence(tokens, max_tokens=1, cache_salt="salt"))
    (salted,) = scheduler.pool.take_events()
    assert isinstance(salted, BlockStored)
    assert (first.cache_salt, salted.cache_salt) == (None, "salt")


def test_events_that_nobody_takes_are_not_kept_for_ever() -> None:
    pool = BlockPool(1, 1)
    pool.take_events()
    for number in range(2 * MAX_WAITING_EVENTS):
        blocks = pool.acquire([], 1)
        assert blocks is not None
        pool.store(blocks, [number], None, [number])
        pool.free(blocks)
    assert pool.take_events() == [AllBlocksCleared()]
    assert pool.take_events() == []


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), seed=st.integers(0, 3))
@settings(max_examples=30)
def test_the_same_work_gives_the_same_steps(lengths: list[int], seed: int) -> None:
    def serve() -> list[Any]:
        scheduler = make_scheduler(seed, num_blocks=24, max_model_len=96)
        steps: list[Any] = []
        sequences = [ScheduledSequence(prompt(length, length), max_tokens=25) for length in lengths]
        run(scheduler, *sequences, on_step=lambda s: steps.append((s.duration_s, [x.tokens[-1] for x in s.outputs])))
        return steps

    assert serve() == serve()
