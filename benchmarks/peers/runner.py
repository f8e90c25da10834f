"""Runs a benchmark in a fair order.

1. Each repetition measures every target once, alternately forwards and backwards, so that a drift of the machine does
   not always affect the same one.
2. A target is started, warmed up, read at rest, measured at each concurrency, and ended before the next one starts.
   It would be faster to keep them all running.  But idle engines go on using CPU (vLLM's workers busy-wait for a
   second after each step), and after a SIGSTOP, Ray's and Serve's health checks fail.
3. In a repetition all targets get the same prompts.  No prompt comes twice to the same server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec
from rich.console import Console

from app.bench.load import LoadClient, LoadFailed, LoadResult, check_complete
from app.bench.processes import cpu_between, memory_by_role
from app.bench.report import Footprint, Measurement, Missing
from app.bench.workload import LoadSpec
from benchmarks.peers.prompts import as_text
from benchmarks.peers.report import PeersReport, RoleCost, cpu_by_role
from benchmarks.peers.servers import Servers, running
from benchmarks.peers.suites import plan_target
from benchmarks.peers.targets import NotMeasurable, Plan, Setup

WARM_UP = LoadSpec(concurrency=4, num_requests=8)
START_ATTEMPTS = 2
"""Two Rays that start at once on a machine may choose the same port; the second attempt chooses others."""
SETTLE_S = 3.0
"""Longer than vLLM's workers busy-wait after a step."""
REST_S = 5.0


class Schedule(msgspec.Struct, frozen=True):
    """What is measured, and how much."""

    targets: Sequence[str]
    concurrencies: Sequence[int]
    requests: int
    """The least number per load."""
    requests_per_stream: int
    """The least number per load for each concurrent stream."""
    repetitions: int
    is_text: bool = True
    """Whether prompts are sent as text or as token ids."""

    def loads(self) -> list[LoadSpec]:
        """Return the loads for one start of a target.  None shares a prompt with another or with the warm-up."""
        first_prompt = WARM_UP.num_requests
        loads = []
        for concurrency in self.concurrencies:
            num_requests = max(self.requests, self.requests_per_stream * concurrency)
            loads.append(LoadSpec(concurrency, num_requests, first_prompt=first_prompt))
            first_prompt += num_requests
        return loads

    def turns(self) -> list[tuple[int, str]]:
        """Return (repetition, target) in the order in which they are measured."""
        forwards = list(self.targets)
        return [
            (repetition, target)
            for repetition in range(self.repetitions)
            for target in (forwards if repetition % 2 == 0 else reversed(forwards))
        ]


class Runner:
    """Runs a benchmark and fills its report.  A target that fails is noted there and does not end the benchmark."""

    def __init__(self, setup: Setup, schedule: Schedule, report: PeersReport, folder: Path, console: Console) -> None:
        self._setup = setup
        self._schedule = schedule
        self._report = report
        self._folder = folder
        self._console = console
        self._tokenizer = setup.model_path
        self._client = LoadClient(folder / "load.log")

    def run(self) -> None:
        """Measure everything that is scheduled.  Call it only once."""
        with closing(self._client):
            self._client.start()
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
        for attempt in range(1, START_ATTEMPTS + 1):
            logs = self._folder / f"{repetition + 1}-{target}-{attempt}"
            logs.mkdir()
            plan = plan_target(target, self._setup, logs)
            began = time.monotonic()
            is_ready = False
            try:
                with running(plan, self._setup.model.name, logs) as servers:
                    is_ready = True
                    self._measure_ready(target, repetition, plan, servers, time.monotonic() - began)
                return
            except NotMeasurable as problem:
                if is_ready or attempt == START_ATTEMPTS:
                    raise
                self._say(f"    once more: {problem}")

    def _measure_ready(self, target: str, repetition: int, plan: Plan, servers: Servers, ready_after_s: float) -> None:
        self._say(f"    ready after {ready_after_s:.0f} s")
        self._load(plan, WARM_UP)
        self._report.footprints.append(_at_rest(target, repetition, ready_after_s, servers))
        for spec in self._schedule.loads():
            before = servers.tree()
            result = self._load(plan, spec)
            after = servers.tree()
            cpu_s, concurrency = cpu_between(before, after) / result.num_completed, spec.concurrency or 0
            self._report.measurements.append(Measurement(target, repetition, concurrency, result, cpu_s))
            self._report.role_costs += [
                RoleCost(target, repetition, concurrency, role, seconds / result.num_completed * 1000)
                for role, seconds in cpu_by_role(before, after, servers.roots).items()
            ]
            self._say(
                f"    c={concurrency}: TTFT {result.ttft_ms:.1f} ms, TPOT {result.tpot_ms:.2f} ms, "
                f"{result.requests_per_s:.1f} req/s, {cpu_s * 1000:.2f} ms of CPU each"
            )

    def _load(self, plan: Plan, spec: LoadSpec) -> LoadResult:
        load = as_text(spec.load(), self._tokenizer) if self._schedule.is_text else spec.load()
        result = self._client.send(plan.base_url, self._setup.model.name, self._tokenizer, load)
        return check_complete(result, spec.num_requests)

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
