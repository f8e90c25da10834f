"""Measures endpoints in an order that is fair to all of them.

1. Each endpoint is warmed up with a small load of the same kind, whose prompts never come again.
2. Each repetition runs every level once, on all endpoints right after one another, alternately forwards and backwards.
   So a drift of the machine hits all of them alike.
3. At a level all endpoints get the same prompts at the same moments.  No prompt comes twice to the same endpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from app.bench.endpoint import Endpoint
from app.bench.load import LoadClient, LoadFailed
from app.bench.processes import cpu_between, read_tree
from app.bench.report import Level, Measurement, Missing, Report
from app.bench.workload import LoadSpec, Request, RequestPlan, at_speed, fitting
from app.errors import ConfigError

WARM_UP = Level(concurrency=4)
WARM_UP_REQUESTS = 8
REQUESTS_PER_STREAM = 4
"""The least number.  With fewer, most of a closed loop would be its ends, where not all streams are busy."""
OPEN_LOOP_S = 10.0
"""The least duration.  In a shorter one few arrivals are left once the first requests have ended."""


class Workload(msgspec.Struct, frozen=True):
    """What all levels have in common: a load to draw, or a trace."""

    title: str
    drawn: LoadSpec = LoadSpec(concurrency=None, num_requests=1)
    """The load to draw, with at least this number of requests.  The level sets concurrency, rate and seed."""
    trace: list[Request] = []
    """Requests to replay instead of drawing a load, if there are any."""

    def load(self, level: Level, seed: str) -> RequestPlan:
        """Return the load at a level; another seed makes other prompts."""
        if self.trace:
            return RequestPlan(at_speed(self.trace, level.speed or 1.0), level.concurrency or None, seed)
        least = round(level.rate * OPEN_LOOP_S) if level.rate else REQUESTS_PER_STREAM * level.concurrency
        return msgspec.structs.replace(
            self.drawn,
            concurrency=level.concurrency or None,
            rate=level.rate,
            num_requests=max(self.drawn.num_requests, least),
            seed=seed,
        ).load()


class Turn(msgspec.Struct, frozen=True):
    """One load on one endpoint."""

    repetition: int
    level: Level
    endpoint: Endpoint
    load: RequestPlan


class Benchmark:
    """Runs a benchmark and fills its report.  A load that fails is noted there and does not end the benchmark."""

    def __init__(self, client: LoadClient, report: Report, workload: Workload, console: Console) -> None:
        """`report.endpoints` are measured."""
        self._client = client
        self._report = report
        self._workload = workload
        self._console = console

    def run(self, levels: Sequence[Level], repetitions: int) -> None:
        """Measure all levels, `repetitions` times.  Call it once only.

        Raises ConfigError if no request fits a model or a tokenizer cannot be loaded, LoadFailed if an endpoint
        does not even answer the warm-up.
        """
        turns = list(self._turns(levels, repetitions))
        with self._console.status("starting the load's client (it imports vLLM, some 10 s)"):
            self._start_client()
        for endpoint in self._report.endpoints:
            with self._console.status(f"warming up {endpoint.name}"):
                self._client.send(endpoint.url, endpoint.model, endpoint.tokenizer, self._warm_up())
        with _progress(self._console) as progress:
            bar = progress.add_task("", total=sum(len(turn.load.requests) for turn in turns))
            for turn in turns:
                progress.update(bar, description=f"{turn.endpoint.name}, {turn.level}")
                self._measure(turn, progress, bar)

    def _turns(self, levels: Sequence[Level], repetitions: int) -> Iterator[Turn]:
        for number in range(repetitions * len(levels)):
            repetition, index = divmod(number, len(levels))
            drawn = self._workload.load(levels[index], f"{self._report.seed}/{number + 1}")
            load = self._fitting(drawn)
            self._report.num_requests += len(drawn.requests)
            self._report.num_left_out += len(drawn.requests) - len(load.requests)
            endpoints = self._report.endpoints
            for endpoint in endpoints if (repetition + index) % 2 == 0 else reversed(endpoints):
                yield Turn(repetition, levels[index], endpoint, load)

    def _fitting(self, load: RequestPlan) -> RequestPlan:
        """Return the load without requests that are too long for some endpoint's model.  Raises ConfigError."""
        known = [endpoint.max_model_tokens for endpoint in self._report.endpoints if endpoint.max_model_tokens]
        max_tokens = min(known, default=None)
        requests = fitting(load.requests, max_tokens)
        if not requests:
            option = "--trace" if self._workload.trace else "--input"
            raise ConfigError(option, f"no request fits the {max_tokens} tokens that the model takes")
        return msgspec.structs.replace(load, requests=requests)

    def _warm_up(self) -> RequestPlan:
        load = self._fitting(self._workload.load(WARM_UP, f"{self._report.seed}/0"))
        first = [msgspec.structs.replace(request, at_s=0.0) for request in load.requests[:WARM_UP_REQUESTS]]
        return msgspec.structs.replace(load, requests=first)

    def _start_client(self) -> None:
        self._client.start()
        for endpoint in self._report.endpoints:
            try:
                self._client.check_tokenizer(endpoint.tokenizer)
            except LoadFailed as problem:
                raise ConfigError("--tokenizer", f"{endpoint.tokenizer!r} cannot be loaded: {problem}") from None

    def _measure(self, turn: Turn, progress: Progress, bar: TaskID) -> None:
        ended = int(progress.tasks[bar].completed)
        try:
            measurement = self._send(turn, lambda done: progress.update(bar, completed=ended + done))
        except LoadFailed as problem:
            self._report.missing.append(Missing(turn.endpoint.name, turn.repetition, f"{turn.level}: {problem}"))
            line = f"{turn.endpoint.name}, {turn.level}: {problem}"
        else:
            self._report.measurements.append(measurement)
            line = _in_short(measurement)
        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        progress.update(bar, completed=ended + len(turn.load.requests))

    def _send(self, turn: Turn, on_progress: Callable[[int], None]) -> Measurement:
        endpoint, level = turn.endpoint, turn.level
        before = read_tree(*endpoint.pids)
        result = self._client.send(
            endpoint.url, endpoint.model, endpoint.tokenizer, turn.load, self._report.limits_ms, on_progress
        )
        cpu_s = cpu_between(before, read_tree(*endpoint.pids))
        per_request = cpu_s / result.num_completed if endpoint.pids else None
        return Measurement(
            endpoint.name, turn.repetition, level.concurrency, result, per_request, level.rate, level.speed
        )


def _in_short(measurement: Measurement) -> str:
    result = measurement.result
    failed = f", {result.num_failed} failed" if result.num_failed else ""
    return (
        f"{measurement.target}, {measurement.level}: TTFT {result.ttft_ms:.0f} ms, TPOT {result.tpot_ms:.1f} ms, "
        f"{result.requests_per_s:.2f} requests/s{failed}"
    )


def _progress(console: Console) -> Progress:
    """Return a progress bar that is drawn only twice a second, because it runs on the cores that serve."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"))
    return Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2)
