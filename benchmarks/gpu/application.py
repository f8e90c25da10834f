"""Starts one application in a process of its own, and ends all of it again.

``python -m benchmarks.gpu.application CONFIG`` is ``baton run`` without vLLM's thorough check of the configuration:
that takes as long as an engine's start, and here a wrong argument is said by the engine that refuses it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.bench.processes import end_in_order
from app.errors import BatonError
from deployments import haproxy
from deployments.cluster import start_cluster, stop_cluster

READY = "the application serves"
STOP_TIMEOUT_S = 40.0
SHOWN_LINES = 12
"""How many of the log's last lines the error of a failed start shows."""


class NotServing(BatonError):
    """An application did not come up."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


@contextmanager
def serving(document: dict[str, Any], log: Path, timeout_s: float) -> Iterator[float]:
    """Serve `document` while the block runs; yields the seconds that the start took.

    `log` gets the output of all processes, and is kept only if the block or the start fails.  Raises NotServing, with
    the end of the log.
    """
    config = log.with_suffix(".json")
    config.write_text(json.dumps(document, indent=1))
    began = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.application", str(config)],
            env=os.environ | haproxy.environment(),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches only the benchmark, which then ends this in order
        )
    try:
        while READY not in log.read_text():
            if process.poll() is not None:
                raise NotServing(f"the application ended: {_last_lines(log)}")
            if time.monotonic() - began > timeout_s:
                raise NotServing(f"the application does not serve after {timeout_s:.0f} s: {_last_lines(log)}")
            time.sleep(0.2)
        yield time.monotonic() - began
        log.unlink()
    finally:
        config.unlink()
        end_in_order([process], STOP_TIMEOUT_S)  # wholly: the next application needs the GPUs' memory


def _last_lines(log: Path) -> str:
    return " | ".join(log.read_text().splitlines()[-SHOWN_LINES:])


def main(config: Path) -> None:
    """Serve `config` until SIGINT or SIGTERM.  Raises NotServing as soon as a replica fails."""
    from deployments.application import deploy

    document = json.loads(config.read_text())
    began = time.monotonic()
    stop = threading.Event()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)
        if " stopping" in what:  # Serve would try again, twice, and each attempt takes as long as the first
            raise NotServing(f"a replica failed\n{_reasons()}")

    start_cluster(document["http_options"], document["proxy_location"], dashboard=False, verbose=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own handlers
        signal.signal(number, lambda *_: stop.set())
    try:
        deploy(document, say, stop)
        if not stop.is_set():
            say(READY)
        stop.wait()
    except (NotServing, RuntimeError) as problem:
        sys.exit(str(problem))
    finally:
        stop_cluster()


def _reasons() -> str:
    """Return what Serve says of the deployments that do not start."""
    from ray import serve

    deployments = [
        each for application in serve.status().applications.values() for each in application.deployments.values()
    ]
    return "\n".join(deployment.message for deployment in deployments if deployment.message)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
