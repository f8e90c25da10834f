"""Calls vLLM's benchmark client, in the process that sends load (app/bench/load.py).

This is the only module of app/bench that imports vLLM, which takes seconds.  It works with vLLM 0.32.
"""

from __future__ import annotations

import functools
import time
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import uvloop

from app.bench.client import key_headers
from app.bench.workload import RequestPlan
from app.upstream import check_attributes, check_parameters, needed

with needed("vllm", "send a benchmark's load"):
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.tokenizers import get_tokenizer
    from vllm.utils.gc_utils import freeze_gc_heap

    check_parameters(serve.ASYNC_REQUEST_FUNCS["openai"], "request_func_input", "session", "pbar")
    check_parameters(SampleRequest, "prompt", "prompt_len", "expected_output_len", "timestamp")
    check_attributes(serve.TaskType, "GENERATION")


def count_requests(done: Synchronized[int]) -> None:
    """Register vLLM's function for /v1/completions a second time, in a form that counts the requests that ended."""
    send = serve.ASYNC_REQUEST_FUNCS["openai"]

    async def counted(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        output = await send(request_func_input, session, pbar)
        done.value += 1
        return output

    serve.ASYNC_REQUEST_FUNCS["counted"] = counted


@functools.cache
def vocabulary(tokenizer: str) -> list[int]:
    """Return every token id except the special ones."""
    loaded = get_tokenizer(tokenizer)
    return sorted(set(loaded.get_vocab().values()) - set(loaded.all_special_ids))


def run(base_url: str, model: str, tokenizer: str, load: RequestPlan) -> dict[str, Any]:
    """Send the load and wait for all answers.  Returns what `benchmark` returns, and the CPU seconds that this took."""
    token_ids = vocabulary(tokenizer)
    samples = [
        SampleRequest(
            prompt=request.prompt(token_ids, load.seed),
            prompt_len=request.input_tokens,
            expected_output_len=request.output_tokens,
            timestamp=request.at_s,
        )
        for request in load.requests
    ]
    freeze_gc_heap()  # as `vllm bench serve` does: prompts are many objects, and none of them is garbage
    began_s = time.process_time()
    report: dict[str, Any] = uvloop.run(serve.benchmark(**client_arguments(base_url, model, load, samples)))
    del report["generated_texts"]
    return {**report, "client_cpu_s": time.process_time() - began_s}


def client_arguments(base_url: str, model: str, load: RequestPlan, samples: list[Any]) -> dict[str, Any]:
    """Return the arguments of vLLM's `benchmark`: each request is sent when it is due, greedy, to its full length."""
    return {
        "task_type": serve.TaskType.GENERATION,
        "endpoint_type": "counted",
        "api_url": f"{base_url}/v1/completions",
        "base_url": base_url,
        "model_id": model,
        "model_name": model,
        "tokenizer": None,
        "input_requests": samples,
        "self_timed": True,
        "max_concurrency": load.concurrency,
        "ignore_eos": True,
        "extra_body": {"temperature": 0},
        "ready_check_timeout_sec": 0,
        "disable_tqdm": True,
        "extra_headers": key_headers() or None,
        # What follows is for statistics of the client's own, and for other kinds of load.
        "selected_percentile_metrics": [],
        "selected_percentiles": [],
        "goodput_config_dict": {},
        "logprobs": None,
        "request_rate": float("inf"),
        "burstiness": 1.0,
        "num_warmups": 0,
        "profile": False,
        "lora_modules": None,
    }
