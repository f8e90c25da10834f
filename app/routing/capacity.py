"""What a replica can take so that its sequences keep the promised time between tokens (`slo.itl_ms`).

A sequence's mean time between tokens is that of a step, stretched by the time that the replica computes prompts
meanwhile:

    itl = step / (1 - prefill_share)        hence        step / itl + prefill_share <= 1

The first term is the share of its time that decode needs, and grows with each sequence.  What it leaves is the budget
for prompts that are prefilled beside it.
"""

from __future__ import annotations

import math

from app.routing.pool_state import ReplicaState

FILL = 0.9
"""The share of the promised time that steps and prompts together are to take.  On two H200s sequences took 9.1 ms a
token in the median and 10.7 in the worst tenth where 9.5 were aimed at (docs/benchmarks/2026-11-28-goodput.md)."""
MIN_BATCH = 8
"""A decode replica takes this many sequences whatever was promised: fewer would hardly be quicker, as a step mostly
reads the weights (app/engines/sim/profiles/h200-llama-8b.yaml)."""
MAX_KV_USE = 0.95
"""The share of the KV memory that a new sequence may fill up.  Those that run grow by a token with each step."""
QUEUE_S = 0.05
"""How long the work of a replica that computes prompts has to last beyond a full step or another such prompt, so that
it never runs dry: news of a replica are at most 10 ms old, and a call takes 3 to 5 ms."""
SHORTEST_REST = 0.05
"""The least share of the time that decode gets, in predictions of times between tokens."""


class Capacity:
    """The bounds that follow from a promised time between tokens of `itl_s` seconds."""

    def __init__(self, itl_s: float) -> None:
        self.itl_s = itl_s

    def is_bounded(self, state: ReplicaState) -> bool:
        """Whether the promise bounds anything: not if a replica cannot keep it with one sequence, or if its pace is
        not known."""
        return state.info.pace is not None and state.pace.step_s(1, 0) * state.load.slowness <= self.itl_s

    def step_s(self, state: ReplicaState, more: int = 0, more_tokens: int = 0) -> float:
        """Predict the seconds of a step with `more` sequences than now, of `more_tokens` tokens together.

        It is the mean over the time that they will decode, in which they grow.
        """
        load = state.load
        not_grown = max(0, state.num_served + more - load.decoding)
        grown = load.growth_tokens + not_grown * load.output_tokens / 2
        kv_tokens = state.kv_tokens.value + more_tokens + grown
        return state.pace.step_s(state.num_served + more, kv_tokens) * load.slowness

    def itl_after_s(self, state: ReplicaState, num_tokens: int, prefill_s: float = 0.0) -> float:
        """Predict the mean seconds between tokens with one sequence more, and `prefill_s` of its prompt computed there.

        `num_tokens` are the tokens of its prompt.
        """
        step_s = self.step_s(state, 1, num_tokens)
        prompt_tokens = num_tokens if prefill_s else 0
        share = state.load.prefill_share + self._stall_s(state, step_s, prompt_tokens, prefill_s) / state.load.window_s
        return step_s / max(SHORTEST_REST, 1 - share)

    def _stall_s(self, state: ReplicaState, step_s: float, num_tokens: int, prefill_s: float) -> float:
        """Return the seconds that prompts take from sequences: those that wait, and one of `num_tokens` tokens.

        Each step that computes a part of a prompt also gives sequences a token.
        """
        num_steps = math.ceil((state.queued_tokens.value + num_tokens) / state.pace.chunk_tokens)
        return max(0.0, state.queue_s + prefill_s - num_steps * step_s)

    def has_decode_room(self, state: ReplicaState, num_tokens: int, cached: int = 0) -> bool:
        """Whether a replica can take one sequence more, of whose `num_tokens` prompt tokens it has `cached` already."""
        if not state.num_served:
            return True
        if state.kv_use_after(num_tokens - cached) > MAX_KV_USE or 0 < state.info.max_sequences <= state.num_served:
            return False
        if state.num_served < MIN_BATCH or not self.is_bounded(state):
            return True
        return self.step_s(state, 1, num_tokens) <= FILL * self.itl_s

    def has_prefill_budget(
        self, state: ReplicaState, num_tokens: int, prefill_s: float, *, joins: bool = False
    ) -> bool:
        """Whether the sequences that a replica decodes can bear a prompt of `num_tokens` tokens that takes `prefill_s`.

        The sequence itself may be to join them.
        """
        more = int(joins)
        if not (state.num_served + more and self.is_bounded(state)):
            return True
        step_s = self.step_s(state, more, more * num_tokens)
        spent = state.load.prefill_share + self._stall_s(state, step_s, num_tokens, prefill_s) / state.load.window_s
        return step_s / self.itl_s + spent <= FILL


def has_queue_room(state: ReplicaState, num_tokens: int, cached: int, *, overtakes: bool = False) -> bool:
    """Whether a prompt need not wait in the frontend any longer, from where it can still go to any replica.

    That is so if the replica will soon be free, or if its cached tokens save more than it makes the prompt wait.  For
    one that overtakes others in the engine's queue there is room for one prompt more.
    """
    if not state.queued_tokens.value:
        return True
    pace = state.pace
    prompt_s = pace.prompt_s(num_tokens, cached)
    saved_s = pace.prompt_s(num_tokens) - prompt_s
    full_step_s = pace.queue_s(pace.chunk_tokens, pace.compute_s(pace.chunk_tokens))
    return state.queue_s <= QUEUE_S + (1 + overtakes) * max(full_step_s, prompt_s) + saved_s
