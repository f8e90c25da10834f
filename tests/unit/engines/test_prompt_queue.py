"""What waits to be computed, in tokens and in seconds."""

from __future__ import annotations

import time

import pytest

from app.engines.prompt_queue import PromptQueue
from app.messages import GenerateRequest, TransferDescriptor
from app.pace import Pace

PACE = Pace(prefill_base_s=1.0, prefill_s_per_token=0.1, prefill_s_per_token_squared=0.01, step_base_s=1.0)
DESCRIPTOR = TransferDescriptor(
    engine="sim",
    replica_id="p",
    request_id="r",
    prompt_tokens=10,
    cached_tokens=0,
    ready_at=time.time(),
    lease_s=30.0,
    params={},
)


def prompt(num_tokens: int, cached: int = 0) -> GenerateRequest:
    return GenerateRequest(
        request_id="r", prompt_token_ids=[1] * num_tokens, sampling={}, expected_cached_tokens=cached
    )


def test_what_waits_counts_by_the_pace_from_the_cached_tokens_on() -> None:
    queue = PromptQueue()
    queue.pace = PACE
    leave_first, leave_second = queue.enter(prompt(10)), queue.enter(prompt(20, cached=10))
    assert queue.queued_tokens == 20
    assert queue.queued_s == pytest.approx(1 + 1 + 1 + 3)
    leave_first(is_computed=True)
    leave_first()
    assert queue.queued_tokens == 10
    assert queue.queued_s == pytest.approx(1 + 3)
    leave_second()
    assert (queue.queued_tokens, queue.queued_s) == (0, 0.0)


def test_prompts_that_need_no_computing_take_no_time() -> None:
    queue = PromptQueue()
    queue.pace = PACE
    queue.enter(prompt(10), DESCRIPTOR)
    queue.enter(prompt(10, cached=10))
    assert (queue.queued_tokens, queue.queued_s) == (0, 0.0)


def test_many_prompts_leave_nothing_behind() -> None:
    """A rest of a rounding error would make an idle replica look busy."""
    queue = PromptQueue()
    queue.pace = PACE
    for leave in [queue.enter(prompt(length)) for length in range(1, 100)]:
        leave(is_computed=True)
    assert queue.queued_s == 0.0


def test_a_prompt_that_came_before_the_pace_was_known_takes_no_time() -> None:
    queue = PromptQueue()
    leave = queue.enter(prompt(10))
    queue.pace = PACE
    queue.enter(prompt(10))
    leave()
    assert queue.queued_tokens == 10
    assert queue.queued_s == pytest.approx(2)
