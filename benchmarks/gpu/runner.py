"""Runs the applications one after another, and keeps what was measured when one of them fails."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
from rich.console import Console

from app.bench.client import new_client
from app.errors import BatonError
from app.ports import free_port
from benchmarks.gpu.application import serving
from benchmarks.gpu.measure import Application, Client, Extent, MeasureError, NoAnswer, steps_of
from benchmarks.gpu.peer_copy import measure_peer_copy
from benchmarks.gpu.report import Failure, GpuReport, page, to_json
from benchmarks.gpu.setup import Setup, serve_document

ANSWER_TIMEOUT_S = 120.0
SHORTEST_RUN_S = 150.0
"""An application is not started if less time is left: it would hardly begin to measure."""


class Runner:
    """Fills a report and writes it after each measurement."""

    def __init__(
        self,
        report: GpuReport,
        extent: Extent,
        seed: int | None,
        json: Path,
        markdown: Path,
        time_limit_s: float | None = None,
    ) -> None:
        self._report = report
        self._extent = extent
        self._random = random.Random(seed)
        self._json = json
        self._markdown = markdown
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._began = time.monotonic()
        self._time_limit_s = time_limit_s

    def copy(self, device: str) -> None:
        """Measure plain copies between two GPUs."""
        self._say("plain copies from GPU to GPU")
        try:
            self._report.peer_copies.extend(measure_peer_copy(device))
        except BatonError as problem:
            self._fail("peer-copy", problem)
        self._save()

    def run(self, setup: Setup, start_timeout_s: float) -> None:
        """Start one application, measure it and end it.  A failure is noted in the report."""
        if self._is_late(SHORTEST_RUN_S):
            self._fail(setup.name, "left out for --time-limit")
            return
        self._say(f"{setup.name}: starting")
        application = Application(
            name=setup.name,
            engine=setup.engine,
            mode=setup.mode,
            engine_args=setup.engine_args,
            prefill_args=setup.prefill_args,
            decode_args=setup.decode_args,
            environment=setup.environment,
        )
        self._report.applications.append(application)
        try:
            self._measure(setup, application, start_timeout_s)
        except (BatonError, httpx.HTTPError, msgspec.DecodeError) as problem:
            self._fail(setup.name, problem)
        self._save()

    def _measure(self, setup: Setup, application: Application, start_timeout_s: float) -> None:
        port = free_port()
        document = serve_document(setup, port)
        log = self._json.with_name(f"{self._json.stem}-{setup.name}.log")
        with (
            serving(document, log, start_timeout_s) as ready_after_s,
            new_client(f"http://127.0.0.1:{port}", ANSWER_TIMEOUT_S) as http,
        ):
            application.ready_after_s = ready_after_s
            self._say(f"{setup.name}: serves after {ready_after_s:.0f} s")
            for title, step in steps_of(Client(http, self._random), application, self._extent):
                self._step(f"{setup.name}: {title}", step)
        self._say(f"{setup.name}: ended")

    def _step(self, title: str, step: Callable[[], None]) -> None:
        """Take one measurement.  If it fails, the next one may succeed, unless the application answers no more."""
        if self._is_late(0):
            self._fail(title, "left out for --time-limit")
            return
        try:
            step()
        except NoAnswer:
            raise
        except MeasureError as problem:
            self._fail(title, problem)
        self._say(title)
        self._save()

    def _is_late(self, needed_s: float) -> bool:
        """Return whether `needed_s` more seconds would exceed the time limit."""
        return self._time_limit_s is not None and time.monotonic() - self._began + needed_s > self._time_limit_s

    def _fail(self, part: str, problem: object) -> None:
        self._say(f"{part}: {problem}")
        self._report.failures.append(Failure(part, " ".join(str(problem).split())))
        self._save()

    def _save(self) -> None:
        for path, content in ((self._json, to_json(self._report)), (self._markdown, page([self._report]).encode())):
            partial = path.with_name(f"{path.name}.partial")
            partial.write_bytes(content)
            os.replace(partial, path)

    def _say(self, what: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:5.0f} s  {what}")
