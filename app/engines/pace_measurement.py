"""Measures how fast an engine computes, when it has started and before anybody uses it.

1. Prompts of growing length run twice each.  The first run is warm-up, in which kernels are chosen or compiled for the
   shape, and counts for nothing.  The second one gives the time of a prompt of that length, and by the tokens that
   follow, the time of a step with so much KV.
2. A batch of short prompts gives the time of a step with several sequences.

Nothing that others do at the same time disturbs this, and real requests then find an engine that has been warmed up.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from app.engines.base import Engine, EngineInfo
from app.engines.probe_request import probe_request
from app.errors import EngineFailed
from app.least_squares import fit_non_negative
from app.messages import TokenDelta
from app.pace import Pace

LENGTHS = (32, 256, 1024, 4096, 16384)
"""The prompts' lengths, as far as the engine has room for them."""
NUM_TOKENS = 12
"""The tokens of each answer."""
BATCH = 8
LONGEST_PROMPT_S = {"cuda": 1.5, "cpu": 0.25}
"""A prompt that is predicted to take longer is not run; on a CPU replicas are to start quickly, and nobody needs more
than a rough idea of their pace."""
MIN_LENGTHS = 2
"""So many lengths are run however long they take: from a single one a prompt's fixed time cannot be told."""
LENGTHS_FOR_SQUARES = 4
"""With fewer lengths, a prompt's time is taken to grow in proportion: the square would only follow the noise, and give
nonsense for longer prompts."""
MIN_GAPS = 3
"""The fewest gaps between tokens of which the median counts."""
SHORTEST_S, SHORTEST_PER_TOKEN_S = 1e-6, 1e-9
"""No time is taken to be shorter, as others divide by it; a sim engine at full speed takes none at all."""

Prompt = tuple[int, float]
"""A prompt's tokens, and its seconds to the first token."""
Step = tuple[int, float, float]
"""The sequences of a step, the tokens of KV that they have together, and its seconds."""


class _Run:
    """One request, and when its tokens came."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.began_at = 0.0
        self.arrivals: list[tuple[float, int]] = []
        """When each delta came, and its number of tokens."""

    def take(self, delta: TokenDelta) -> None:
        self.arrivals.append((time.perf_counter(), len(delta.token_ids)))

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.began_at

    async def run(self, engine: Engine, num_tokens: int = NUM_TOKENS) -> _Run:
        request = probe_request("pace", self.length, num_tokens)
        self.began_at = time.perf_counter()
        await engine.generate(request, None, self.take)
        return self


async def measure_pace(engine: Engine, info: EngineInfo, device: Literal["cpu", "cuda"]) -> Pace:
    """Measure an engine that has nothing else to do, in a few seconds.

    Raises what `Engine.generate` raises, in an exception group if it was in the batch, and EngineFailed if the engine
    gave too few single tokens to tell its steps.
    """
    prompts: list[Prompt] = []
    steps: list[Step] = []
    for length in _lengths(info):
        if len(prompts) >= MIN_LENGTHS and _predict_s(prompts[-1], length) > LONGEST_PROMPT_S[device]:
            break
        await _Run(length).run(engine, num_tokens=1)
        run = await _Run(length).run(engine)
        prompts.append((length, run.first_s))
        steps += _step_of([run])
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_Run(prompts[0][0]).run(engine)) for _ in range(BATCH)]
    steps += _step_of([task.result() for task in tasks])
    return fit_pace(prompts, steps, info.chunk_tokens)


def _lengths(info: EngineInfo) -> list[int]:
    """Return the lengths for which the engine has room, and of whose KV it has plenty."""
    longest = min(info.max_model_len - NUM_TOKENS, info.num_blocks * info.block_size_tokens // 4)
    lengths = [length for length in LENGTHS if length <= longest]
    if not lengths or 2 * lengths[-1] <= longest < LENGTHS[-1]:
        lengths.append(max(1, longest))  # what longer prompts take cannot be foretold from much shorter ones
    return lengths


def _predict_s(measured: Prompt, length: int) -> float:
    num_tokens, seconds = measured
    return seconds * length / num_tokens


def _step_of(runs: Sequence[_Run]) -> list[Step]:
    """Return how long a step took while all of `runs` decoded; nothing if that were too few.

    It is a median, which leaves out the first steps of a shape as warm-up.
    """
    began, ended = max(run.arrivals[0][0] for run in runs), min(run.arrivals[-1][0] for run in runs)
    gaps = [
        (now - before) / num_tokens
        for (before, _), (now, num_tokens) in pairwise(runs[0].arrivals)
        if began <= before and now <= ended and num_tokens
    ]
    if len(gaps) < MIN_GAPS:
        return []
    num_kv_tokens = sum(run.length + NUM_TOKENS / 2 for run in runs)
    return [(len(runs), num_kv_tokens, statistics.median(gaps))]


def fit_pace(prompts: Sequence[Prompt], steps: Sequence[Step], chunk_tokens: int) -> Pace:
    """Return the pace that comes closest to what was measured.  Raises EngineFailed if there are no `steps`."""
    if not steps:
        raise EngineFailed("the engine gave too few single tokens")
    rows = [[float(-(-length // chunk_tokens)), length, length**2] for length, _ in prompts]
    if len(prompts) < LENGTHS_FOR_SQUARES:
        rows = [row[:2] for row in rows]
    base_s, per_token_s, *squared = fit_non_negative(rows, [max(SHORTEST_S, seconds) for _, seconds in prompts])
    step_s, per_sequence_s, per_kv_token_s = fit_non_negative(
        [[1.0, sequences, kv_tokens] for sequences, kv_tokens, _ in steps],
        [max(SHORTEST_S, seconds) for *_, seconds in steps],
    )
    return Pace(
        prefill_base_s=max(SHORTEST_S, base_s),
        prefill_s_per_token=max(SHORTEST_PER_TOKEN_S, per_token_s),
        prefill_s_per_token_squared=squared[0] if squared else 0.0,
        step_base_s=max(SHORTEST_S, step_s),
        step_s_per_sequence=per_sequence_s,
        step_s_per_kv_token=per_kv_token_s,
        chunk_tokens=chunk_tokens,
    )
