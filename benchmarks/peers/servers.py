"""Starts a target, waits until it serves, and ends all of its processes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from app.bench.client import describe, new_client
from app.bench.processes import Process, end_in_order, read_tree
from benchmarks.peers.targets import Command, NotMeasurable, Plan, last_line

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0
ISOLATED_FROM = ("RAY_ADDRESS", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING", "RAY_SERVE_ENABLE_HA_PROXY", "PYTHONPATH")
"""Environment variables with which a target would join another cluster or be another target."""


class Servers:
    """The processes of one target."""

    def __init__(self) -> None:
        self._started: list[tuple[Command, subprocess.Popen[bytes], Path]] = []

    def start(self, command: Command, logs: Path) -> None:
        """Start one process.  Its output goes into a file in `logs`."""
        inherited = {name: value for name, value in os.environ.items() if name not in ISOLATED_FROM}
        log = logs / f"{command.role.replace(' ', '-')}.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command.argv,
                env=inherited | command.environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches only the benchmark, which then ends them in order
            )
        self._started.append((command, process, log))

    @property
    def roots(self) -> dict[int, str]:
        """The roles of the processes that were started here, by process id."""
        return {process.pid: command.role for command, process, _ in self._started}

    def tree(self) -> list[Process]:
        return read_tree(*self.roots)

    def check_alive(self) -> None:
        """Raise NotMeasurable, with the end of the log, if one of the processes has ended."""
        for command, process, log in self._started:
            if process.poll() is not None:
                raise NotMeasurable(f"{command.role} ended with {process.returncode}: {last_line(log)}")

    def stop(self) -> None:
        """Ask the processes to end, then kill those that are left, children included."""
        end_in_order([process for _, process, _ in reversed(self._started)], STOP_TIMEOUT_S)


@contextmanager
def running(plan: Plan, model: str, logs: Path) -> Iterator[Servers]:
    """Start a target and yield it once it serves.  Raises NotMeasurable if it does not; ends all of it in any case."""
    servers = Servers()
    try:
        for command in plan.commands:
            servers.start(command, logs)
        _wait_until_ready(plan, model, servers)
        yield servers
    finally:
        servers.stop()


def _wait_until_ready(plan: Plan, model: str, servers: Servers) -> None:
    """Return once a completion succeeds.  Ray Serve LLM answers other requests long before it can serve."""
    request = {"model": model, "prompt": "Ready?", "max_tokens": 1}
    said = "no answer"
    deadline = time.monotonic() + START_TIMEOUT_S
    with new_client(plan.base_url, ANSWER_TIMEOUT_S) as client:
        while time.monotonic() < deadline:
            servers.check_alive()
            try:
                answer = client.post("/v1/completions", json=request)
                if answer.is_success:
                    return
                said = describe(answer)
            except httpx.TransportError:
                pass  # not listening yet, or holding the request until it can serve
            time.sleep(0.5)
    raise NotMeasurable(f"not ready within {START_TIMEOUT_S:.0f} s: {said}")
