"""Killing what serves.  Last, since each test leaves replicas behind that are new."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.conftest import wait_until
from tests.engines.conftest import START_TIMEOUT_S, Baton, engine_processes

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(900)]


class Load:
    """Requests, one after another on each of some threads, until told to stop."""

    def __init__(self, baton: Baton, num_threads: int = 4) -> None:
        self._baton = baton
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(num_threads)
        self._workers = [self._pool.submit(self._work, n) for n in range(num_threads)]
        self.num_done = 0

    def _work(self, worker: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            prompt = [300 + worker, 300 + number % 1000, *range(500, 900)]
            answer = self._baton.complete(prompt, max_tokens=16, extra_body={"ignore_eos": True})
            assert answer.usage.completion_tokens == 16
            self.num_done += 1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._pool.shutdown()

    def check(self) -> None:
        """Raise what any request raised."""
        for worker in self._workers:
            worker.result(timeout=60)


def test_prefill_engine_killed_under_load_fails_no_request(baton: Baton) -> None:
    baton.wait_until_healthy()
    replica = baton.replica_process("prefill")
    with Load(baton) as load:
        wait_until(lambda: load.num_done >= 4, 60, "load")
        for process in engine_processes(replica):
            process.kill()
        wait_until(lambda: baton.count_prefills("local", "prefill_failed") > 0, 30, "local prefill")
        wait_until(lambda: not replica.is_running(), 60, "Serve gave the replica up")
        baton.wait_until_healthy()
        remote = baton.count_prefills("remote")
        wait_until(lambda: baton.count_prefills("remote") > remote, START_TIMEOUT_S, "remote prefill again")
    load.check()


def test_killed_decode_replica_takes_its_engine_along_and_comes_back(baton: Baton) -> None:
    baton.wait_until_healthy()
    replica = baton.replica_process("decode")
    engine = engine_processes(replica)
    assert engine
    replica.kill()
    _, alive = psutil.wait_procs(engine, timeout=10)
    assert not alive, "an engine outlives its replica"
    wait_until(lambda: baton.http.get("/health").status_code == 503, 30, "unhealthy without decode")
    refused = baton.post("/v1/completions", prompt="Hello", max_tokens=4)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == 503
    baton.wait_until_healthy()
    assert baton.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 200
    before = baton.count_prefills("remote")
    baton.complete("Hello again")
    assert baton.count_prefills("remote") > before
