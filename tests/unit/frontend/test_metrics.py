"""Each frontend's metrics at a port of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import Counter

from app.errors import ConfigError
from app.frontend.metrics import MetricsServer

BATCHES = Counter("test_batches", "For this test.")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("", 0)) as taken:
        yield taken.getsockname()[1]


def test_the_first_free_port_serves_what_this_process_counts(taken_port: int) -> None:
    first, second = MetricsServer(taken_port), MetricsServer(taken_port)
    try:
        assert taken_port < first.port < second.port
        BATCHES.inc(3)
        for server in (first, second):
            assert "test_batches_total 3.0" in httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    finally:
        first.close()
        second.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{first.port}/metrics")


def test_no_free_port_is_an_error_that_names_the_setting() -> None:
    with socket.create_server(("", 65535)), pytest.raises(ConfigError, match=r"frontend\.metrics_port"):
        MetricsServer(65535)
