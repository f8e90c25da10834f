"""The order of a benchmark.

1. In each repetition every target once, in turn forwards and backwards, so that drift of the machine does not
   always hit the same one.
2. A target is started, warmed up, read at rest, measured at each concurrency, and ended before the next starts.
   Keeping them all up would be faster, but idle engines go on using CPU (vLLM's workers busy-wait for a second
   after each step), and stopped with SIGSTOP they come back with Ray's and Serve's health checks failed.
3. All targets get the same prompts in a repetition; no prompt comes twice to the same server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console

from app.bench.load import LoadClient, LoadFailed, LoadResult, LoadSpec
from app.bench.processes import cpu_between, memory_by_role
from app.bench.report import Footprint, Measurement, Missing, Report
from app.bench.servers import Servers, running
from app.bench.targets import NotMeasurable, Plan, Setup, plan_target

WARM_UP = LoadSpec(concurrency=4, num_requests=8)
SETTLE_S = 3.0
"""Longer than vLLM's workers busy-wait after a step."""
REST_S = 5.0
REQUESTS_PER_STREAM = 4
"""At least; with fewer, most of a load would be its ends, where not all streams are busy."""


class Schedule(msgspec.Struct, frozen=True):
    """How much is measured."""

    targets: Sequence[str]
    concurrencies: Sequence[int]
    requests: int
    """At least so many per load."""
    repetitions: int

    def loads(self) -> list[LoadSpec]:
        """The loads of one start of a target: none shares a prompt with another or with the warm-up."""
        first_prompt = WARM_UP.num_requests
        loads = []
        for concurrency in self.concurrencies:
            num_requests = max(self.requests, REQUESTS_PER_STREAM * concurrency)
            loads.append(LoadSpec(concurrency, num_requests, first_prompt=first_prompt))
            first_prompt += num_requests
        return loads

    def turns(self) -> list[tuple[int, str]]:
        """(repetition, target) in the order in which they are measured."""
        forwards = list(self.targets)
        return [
            (repetition, target)
            for repetition in range(self.repetitions)
            for target in (forwards if repetition % 2 == 0 else reversed(forwards))
        ]


class Runner:
    """Fills a report; a target that fails is noted there and does not end the benchmark."""

    def __init__(self, setup: Setup, schedule: Schedule, report: Report, folder: Path, console: Console) -> None:
        self._setup = setup
        self._schedule = schedule
        self._report = report
        self._folder = folder
        self._console = console
        self._tokenizer = setup.model_path
        self._client = LoadClient(folder / "load.log")

    def run(self) -> None:
        """Measure everything that is scheduled; once only."""
        with closing(self._client):
            self._run()

    def _run(self) -> None:
        turns = self._schedule.turns()
        for number, (repetition, target) in enumerate(turns, start=1):
            self._say(f"[{number}/{len(turns)}] {target}, repetition {repetition + 1}")
            try:
                self._measure(target, repetition)
            except (NotMeasurable, LoadFailed) as problem:
                self._report.missing.append(Missing(target, repetition, str(problem)))
                self._say(f"    not measured: {problem}")

    def _measure(self, target: str, repetition: int) -> None:
        logs = self._folder / f"{repetition + 1}-{target}"
        logs.mkdir()
        plan = plan_target(target, self._setup, logs)
        began = time.monotonic()
        with running(plan, self._setup.model.name, logs) as servers:
            ready_after_s = time.monotonic() - began
            self._say(f"    ready after {ready_after_s:.0f} s")
            self._load(plan, servers, WARM_UP)
            footprint = _at_rest(target, repetition, ready_after_s, servers)
            self._report.footprints.append(footprint)
            for spec in self._schedule.loads():
                result, cpu_s = self._load(plan, servers, spec)
                per_request = cpu_s / result.num_completed
                self._report.measurements.append(Measurement(target, repetition, spec.concurrency, result, per_request))
                self._say(
                    f"    c={spec.concurrency}: TTFT {result.ttft_ms:.0f} ms, TPOT {result.tpot_ms:.1f} ms, "
                    f"{result.requests_per_s:.2f} req/s"
                )

    def _load(self, plan: Plan, servers: Servers, spec: LoadSpec) -> tuple[LoadResult, float]:
        """The load's result and the CPU seconds that the target used for it."""
        before = servers.tree()
        result = self._client.run(plan.base_url, self._setup.model.name, self._tokenizer, spec)
        return result, cpu_between(before, servers.tree())

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _at_rest(target: str, repetition: int, ready_after_s: float, servers: Servers) -> Footprint:
    time.sleep(SETTLE_S)
    before = servers.tree()
    time.sleep(REST_S)
    after = servers.tree()
    return Footprint(
        target=target,
        repetition=repetition,
        ready_after_s=ready_after_s,
        idle_cores=cpu_between(before, after) / REST_S,
        memory=memory_by_role(after, servers.roots),
    )
