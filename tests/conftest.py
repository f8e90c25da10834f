"""What all tests share: one Ray cluster with Serve for the session, on ports of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.ports import free_port
from deployments.cluster import ray_environment

# Read when ray.serve is imported, by this process and by everything that Ray starts from it.
os.environ.update(ray_environment())
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

REPOSITORY = Path(__file__).parent.parent


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str, every_s: float = 0.1) -> Any:
    """The first true value of `condition`; fails the test when `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every_s)
    pytest.fail(f"{what}: not within {timeout_s} s")


async def eventually(condition: Callable[[], Awaitable[Any]], timeout_s: float, what: str) -> Any:
    """`wait_until` for a condition that has to be awaited."""
    import asyncio

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := await condition():
            return value
        await asyncio.sleep(0.05)
    pytest.fail(f"{what}: not within {timeout_s} s")


@pytest.fixture(scope="session")
def serve_url() -> Iterator[str]:
    """Ray and Serve; the base URL of Serve's proxy."""
    import ray
    from ray import serve

    port = free_port()
    # Logical CPUs: what the tests deploy is mostly idle.
    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
