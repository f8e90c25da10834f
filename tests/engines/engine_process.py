"""Engines of a test, each in a process of its own as in an application, but without Ray.

This is imported in the environment of each engine, so nothing here needs pytest.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import msgspec
import psutil

from app.engines import progress
from app.engines.base import EngineSpec
from app.engines.registry import create_engine
from app.messages import GenerateRequest, Role, TokenDelta, TransferDescriptor
from app.models.source import local_path
from app.ports import free_port

STOP_TIMEOUT_S = 20.0
LEASE_S = 12
"""The shortest that a configuration may ask for."""
MAX_MODEL_LEN = 1536
BLOCK_SIZE = 32
NUM_BLOCKS = 64
"""Room for two prompts of 1024 tokens, so that prefill soon uses the blocks of one for another."""


def vllm_spec(role: Role, **engine_args: Any) -> EngineSpec:
    """Return a vLLM engine of prefill or decode, in float32: tokens do not depend on what else it computes."""
    sizes = {"max_model_len": MAX_MODEL_LEN, "block_size": BLOCK_SIZE, "num_gpu_blocks_override": NUM_BLOCKS}
    return EngineSpec(
        role=role,
        is_disaggregated=True,
        replica_id=role,
        model_path=local_path("baton:tiny"),
        device="cpu",
        tensor_parallel_size=1,
        engine_args={**sizes, "dtype": "float32", **engine_args},
        kv_host="127.0.0.1",
        kv_port=free_port(),
        transfer_backends=["UCX"],
        transfer_lease_s=LEASE_S,
        transfer_checksum_rate=1.0,
    )


class EngineProcess:
    """An engine that is called one call at a time.  Calls block, and raise what the engine raises."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self._process = process
        self._connection = connection

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a coroutine function of the engine, or of an attribute of it (``attribute.method``)."""
        self._connection.send((method, arguments))
        result = self._connection.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        found: TransferDescriptor = self.call("prefill", request)
        return found

    def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None) -> list[TokenDelta]:
        deltas: list[TokenDelta] = self.call("generate", request, descriptor)
        return deltas

    def engine_processes(self) -> list[psutil.Process]:
        """The processes that the engine itself has started, without Python's helpers."""
        return [
            process
            for process in psutil.Process(self._process.pid).children(recursive=True)
            if "VLLM" in " ".join(process.cmdline())
        ]


@contextmanager
def engine_process(engine: str, spec: EngineSpec) -> Iterator[EngineProcess]:
    """Begin to start an engine, and stop it when the block ends.  The first call waits until it has started."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(engine, msgspec.msgpack.encode(spec), theirs))
    process.start()
    theirs.close()
    found = EngineProcess(process, ours)
    try:
        yield found
    finally:
        for each in found.engine_processes():
            each.resume()
        ours.close()
        process.join(STOP_TIMEOUT_S)
        process.kill()


def _run(engine: str, spec: bytes, connection: Connection) -> None:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    # Tests stop engines for longer than a replica would wait before it kills them.
    progress.IDLE_FLOOR_S = progress.IDLE_CEILING_S = float("inf")
    asyncio.run(_serve(engine, msgspec.msgpack.decode(spec, type=EngineSpec), connection))


async def _serve(name: str, spec: EngineSpec, connection: Connection) -> None:
    engine = create_engine(name, spec)  # type: ignore[arg-type]
    try:
        await engine.start()
        while True:
            method, arguments = await asyncio.to_thread(connection.recv)
            try:
                result: Any = []
                if method == "generate":
                    request, descriptor = arguments
                    await engine.generate(request, descriptor, result.append)
                else:
                    result = await attrgetter(method)(engine)(*arguments)
            except Exception as error:  # noqa: BLE001  the test gets it
                result = error
            connection.send(result)
    except EOFError:  # the test is done
        pass
    finally:
        await engine.stop()
