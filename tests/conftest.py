"""What all tests share: one Ray cluster with Serve for the session, with its own ports."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.engine_defaults import cpu_dtype
from app.ports import free_port
from deployments import haproxy
from deployments.cluster import ray_environment

# Read when ray.serve is imported, by this process and by everything that Ray starts from it.
os.environ.update(haproxy.environment())
for name, value in ray_environment().items():
    os.environ.setdefault(name, value)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Engines compute in float32 on every host: in bfloat16, which those with AMX would take, an answer depends on what else
# its steps compute, and nothing could be compared with an answer given alone (docs/decisions/0043).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
# Tests wait for what Ray exports: every two seconds instead of ten.
os.environ.setdefault("RAY_metrics_report_interval_ms", "2000")

REPOSITORY = Path(__file__).parent.parent


def describe_processor() -> str:
    """Return the processor's name, the number of its cores, and the dtype in which engines compute on it."""
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "name" in line
    ]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}, engines compute in {cpu_dtype()}"


def pytest_collection_finish() -> None:
    """Exclude what is imported by now from garbage collection during the tests, because it stays anyway."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo the freeze; otherwise extension modules complain at exit that their objects leaked."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the processor: the times of the slowest tests (`--durations` in pyproject.toml) mean little without it."""
    terminalreporter.write_line(f"processor: {describe_processor()}")


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str, every_s: float = 0.1) -> Any:
    """Return the first true value of `condition`.  Fails the test when `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    pytest.fail(f"{what}: not within {timeout_s} s")


async def eventually(condition: Callable[[], Awaitable[Any]], timeout_s: float, what: str) -> Any:
    """Do the same as `wait_until` for a condition that has to be awaited."""
    import asyncio

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := await condition():
            return value
        await asyncio.sleep(0.05)
    pytest.fail(f"{what}: not within {timeout_s} s")


BOUND_TO_ALL = ("ray::ServeReplica", "sglang::scheduler")
"""Processes with one port on ``[::]`` that nothing moves: Serve's calls of replicas, and torch's TCPStore of SGLang."""


def open_to_others() -> list[str]:
    """Return where this process, and all that it has started, listens to other machines, without BOUND_TO_ALL."""
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            reachable = [address for address in listening if not _is_loopback(address.ip)]
            if not (command.startswith(BOUND_TO_ALL) and [address.ip for address in reachable] == ["::"]):
                found += [f"{address.ip}:{address.port} of {command}" for address in reachable]
    return found


def _is_loopback(ip: str) -> bool:
    return ip_address(ip.removeprefix("::ffff:")).is_loopback  # Python looks into such addresses from 3.13 on


@pytest.fixture(scope="session")
def serve_url() -> Iterator[str]:
    """Start Ray and Serve, and yield the base URL of Serve's proxy."""
    import ray
    from ray import serve

    port = free_port()
    # More logical CPUs than there are, because what the tests deploy is mostly idle.
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
