"""How many requests a machine could serve in time that knows them all beforehand: an optimistic estimate.

It is one fluid machine.  All replicas together compute one prompt after another, in the order of arrival, without loss
at the seams, and a prefix is computed only once.  A token costs what a sequence adds to a step, and in addition one
replica spends its time on steps that are as slow as the SLO allows, in which all sequences get their tokens.  Knowing
the future, it refuses just those requests without which the most others are in time (H. Kise, T. Ibaraki and H. Mine,
"A solvable case of the one-machine scheduling problem with ready and due times", 1978: release times and deadlines have
the same order here).

No fleet reaches this: its replicas share no prompt, KV has to be moved or computed twice, several of them decode, and
it does not know what comes.  How far all contenders are below it says how hard a load is, and nothing of who is best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from app.bench.workload import Request
from app.pace import Pace
from benchmarks.routing.scenarios import Scenario


class Job(msgspec.Struct):
    """One request on the fluid machine."""

    arrived_at: float
    work_s: float
    """The seconds that one replica would take."""
    begins_at: float = 0.0


def oracle_num_good(scenario: Scenario, requests: Sequence[Request], pace: Pace) -> int:
    """Return how many of `requests`, in the order of arrival, the fluid machine serves in time."""
    ttft_s, tpot_s = scenario.slo.ttft_ms / 1e3, scenario.slo.itl_ms / 1e3
    decodes = any(request.output_tokens > 1 for request in requests)
    speed = scenario.num_prefill + scenario.num_decode - (pace.step_base_s / tpot_s if decodes else 0.0)
    accepted: list[Job] = []
    num_finished = 0
    for request, cached in zip(requests, cached_tokens(requests), strict=True):
        if pace.prompt_s(request.input_tokens, cached) > ttft_s:
            continue
        job = Job(request.at_s, _work_s(request, cached, pace))
        if _free_at(accepted, speed) <= job.arrived_at:  # what came before no longer matters
            num_finished += len(accepted)
            accepted.clear()
        accepted.append(job)
        _schedule(accepted, len(accepted) - 1, speed)
        if _free_at(accepted, speed) > job.arrived_at + ttft_s:
            refused = _best_to_refuse(accepted, speed)
            del accepted[refused]
            _schedule(accepted, refused, speed)
    return num_finished + len(accepted)


def _work_s(request: Request, cached: int, pace: Pace) -> float:
    """Return what a request adds to the time of steps that are full of others."""
    num_tokens, num_gaps = request.input_tokens, request.output_tokens - 1
    prompt_s = pace.compute_s(num_tokens, cached) + pace.prefill_base_s * (num_tokens - cached) / pace.chunk_tokens
    mean_length = num_tokens + request.output_tokens / 2
    return prompt_s + num_gaps * (pace.step_s_per_sequence + pace.step_s_per_kv_token * mean_length)


def _free_at(jobs: Sequence[Job], speed: float) -> float:
    return jobs[-1].begins_at + jobs[-1].work_s / speed if jobs else 0.0


def _schedule(jobs: Sequence[Job], first: int, speed: float) -> None:
    """Set when the jobs from `first` on begin."""
    free_at = _free_at(jobs[:first], speed)
    for job in jobs[first:]:
        job.begins_at = max(free_at, job.arrived_at)
        free_at = job.begins_at + job.work_s / speed


def _best_to_refuse(jobs: Sequence[Job], speed: float) -> int:
    """Return the index of the job without which the last one ends first."""
    best, most, slack = len(jobs) - 1, -1.0, float("inf")
    for index in range(len(jobs) - 1, -1, -1):
        gain = min(jobs[index].work_s / speed, slack)
        if gain > most:
            best, most = index, gain
        slack = min(slack, jobs[index].begins_at - jobs[index].arrived_at)
    return best


def cached_tokens(requests: Iterable[Request]) -> list[int]:
    """Return how many tokens of each prompt began an earlier one, in whole pieces and without the prompt's last one."""
    seen: set[int] = set()
    found = []
    for request in requests:
        cached = length = parent = 0
        for piece in request.pieces:
            parent = hash((parent, piece))
            length += piece[1]
            if parent in seen:
                cached = length
            seen.add(parent)
        found.append(min(cached, length - 1))
    return found
