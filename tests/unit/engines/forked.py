"""Runs programs that patch vLLM or let it change the environment, each in a process of its own.

They are forked from a process that has imported vLLM, because that takes seconds.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler",
        "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker",
        "vllm.engine.arg_utils",
        "vllm.v1.engine.core",
        "vllm.v1.worker.gpu_model_runner",
    ]
)


def run(program: str, environment: Mapping[str, str]) -> Any:
    """Run `program` with these variables added to the environment, and return the JSON that it prints last."""
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(program, environment, theirs))
    process.start()
    theirs.close()
    error, printed = ours.recv()
    process.join()
    ours.close()
    assert not error, error
    return json.loads(printed.splitlines()[-1])


def _run(program: str, environment: Mapping[str, str], connection: Connection) -> None:
    os.environ.update(environment)
    printed = io.StringIO()
    error = ""
    try:
        with redirect_stdout(printed):
            exec(program, {"__name__": "__main__"})
    except Exception:  # noqa: BLE001  the test shows it
        error = traceback.format_exc()
    connection.send((error, printed.getvalue()))
