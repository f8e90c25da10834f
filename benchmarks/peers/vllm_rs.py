"""vLLM's Rust front end (vllm-rs) over an engine core that computes nothing: what Baton would cost with it, at least.

This process binds the sockets, starts the engine core as a child, and becomes vllm-rs.  The core speaks vLLM's protocol
over ZMQ (vllm/v1/engine/core.py): it tells its limits, takes each request as token ids, and answers with one token of
every sequence per step, as fast as it can or, if a pace is given, once every so many ms.

``python -m benchmarks.peers.vllm_rs BINARY PORT MODEL_PATH MODEL_NAME TOKEN_MS``
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import setproctitle
import zmq

FIRST_TOKEN, TOKEN_STEP, NUM_TOKENS = 300, 37, 1500
"""The token ids that come out, as those of benchmarks/peers/fake_engine.py."""
ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"
FINISHED_BY_LENGTH = 1
OWNER_CHECK_MS = 500
READY = {
    "max_model_len": 4096,
    "num_gpu_blocks": 1024,
    "block_size": 32,
    "dp_stats_address": None,
    "dtype": "float32",
    "vllm_version": "0.32.0",
    "world_size": 1,
    "data_parallel_size": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "decode_context_parallel_size": 1,
    "data_parallel_rank": 0,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "instance_id": "stand-in",
    "supports_lora": False,
    "max_loras": 0,
}
"""vLLM's EngineCoreReadyResponse."""


class Request(msgspec.Struct, array_like=True):
    """The beginning of vLLM's EngineCoreRequest."""

    request_id: str
    prompt_token_ids: list[int]
    mm_features: None
    sampling_params: dict[str, Any]


class Core:
    """The engine core.  `step_s` is the time of a step in seconds; 0 means none."""

    def __init__(self, folder: Path, step_s: float) -> None:
        self._step_s = step_s
        self._left: dict[str, int] = {}
        """How many tokens each request still gets."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_request = msgspec.msgpack.Decoder(Request).decode
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = context.socket(zmq.DEALER)
        self._requests.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self._requests.connect(f"ipc://{folder}/requests")
        self._outputs = context.socket(zmq.PUSH)
        self._outputs.connect(f"ipc://{folder}/outputs")
        self._requests.send(self._encode(READY))

    def run(self, owner: int) -> None:
        """Serve until the process `owner` is gone."""
        next_step = 0.0
        while os.getppid() == owner:
            until_step_ms = math.ceil(max(0.0, next_step - time.monotonic()) * 1000)
            if self._requests.poll(until_step_ms if self._left else OWNER_CHECK_MS):
                self._take(*self._requests.recv_multipart())
            elif self._left:
                now = time.monotonic()
                self._step()
                next_step = (now // self._step_s + 1) * self._step_s if self._step_s else 0.0

    def _take(self, kind: bytes, payload: bytes, *_: bytes) -> None:
        if kind == ADD:
            request = self._decode_request(payload)
            self._left[request.request_id] = request.sampling_params["max_tokens"]
        elif kind == ABORT:
            for request_id in msgspec.msgpack.decode(payload):
                self._left.pop(request_id, None)
        elif kind == UTILITY:
            _, call_id, _, _ = msgspec.msgpack.decode(payload)
            self._send([], [call_id, None, [None, None]])

    def _step(self) -> None:
        outputs: list[list[Any]] = []
        for request_id, left in self._left.items():
            output = [request_id, [FIRST_TOKEN + left * TOKEN_STEP % NUM_TOKENS]]
            # Between them are logprobs, prompt logprobs and what pooling returns.
            outputs.append(output if left > 1 else [*output, None, None, None, FINISHED_BY_LENGTH])
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        self._send(outputs)

    def _send(self, outputs: list[list[Any]], *utility_output: Any) -> None:
        self._outputs.send(self._encode([0, outputs, None, time.monotonic(), *utility_output]))


def listen_at(path: Path) -> socket.socket:
    """Return a Unix socket that listens, and that the next program of this process inherits."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.set_inheritable(True)
    return listener


def main() -> None:
    binary, port, model_path, model_name, token_ms = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="vllm-rs-"))
    http = socket.create_server(("127.0.0.1", int(port)), backlog=2048)
    http.set_inheritable(True)
    requests, outputs = listen_at(folder / "requests"), listen_at(folder / "outputs")
    owner = os.getpid()
    if os.fork() == 0:
        for listener in (http, requests, outputs):
            listener.close()
        setproctitle.setproctitle("VLLM::EngineCore stand-in")
        Core(folder, float(token_ms) / 1000).run(owner)
        return
    arguments = {
        "model_tag": model_path,
        "served_model_name": [model_name],
        "disable_log_stats": True,
        "engine_ready_timeout_secs": 60,
    }
    flags = {
        "--listen-fd": str(http.fileno()),
        "--input-listener-fd": str(requests.fileno()),
        "--output-listener-fd": str(outputs.fileno()),
        "--args-json": json.dumps(arguments),
    }
    os.execv(binary, [binary, "frontend", *(word for flag in flags.items() for word in flag)])


if __name__ == "__main__":
    main()
