"""``baton profile`` against a server of known speed, and against servers that cannot be measured."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.bench.engine_profile import TimedOutput, choose_extent, step_time
from app.engines.sim.profile import load_profile

STEP_S = 0.004
PREFILL_S_PER_TOKEN = 0.0005
OVERHEAD_S = 0.02


class Handler(BaseHTTPRequestHandler):
    """Answers a model list and streamed completions; how it misbehaves stands on its server."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "served", "max_model_len": self.server.max_model_len}]})  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        flaw = self.server.flaw  # type: ignore[attr-defined]
        if flaw == "refuses":
            self._answer(400, {"error": {"message": "token ids are not served here"}})
            return
        prompt = tuple(body["prompt"])
        is_cached = prompt in self.server.cached  # type: ignore[attr-defined]
        self.server.cached.add(prompt)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        num = body["max_tokens"] - (flaw == "stops early")
        prefill_s = STEP_S if is_cached or len(prompt) == 1 else PREFILL_S_PER_TOKEN * len(prompt)
        time.sleep(0.1 / len(prompt) if flaw == "is too fast" else OVERHEAD_S + prefill_s)
        for token in range(num):
            if token:
                time.sleep(STEP_S)
            # U+2028 ends a line for Python's splitlines, and not for an event stream.
            choice = {"index": 0, "text": "a\u2028b"}
            self._event({"choices": [choice], "usage": {"completion_tokens": token + 1}})
        if flaw == "breaks off":
            self._event({"error": {"message": "the engine died"}})
        self._event({"choices": [], "usage": {"completion_tokens": num}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode())

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.flaw, server.cached, server.max_model_len = "", set(), 4096
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def profile(baton_command: Any) -> Any:
    return partial(baton_command, "profile")


def test_it_writes_a_profile_that_says_what_was_measured(profile: Any, server: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    options = ["--max-prompt", 256, "--max-batch", 2, "--repeat", 1, "--kv-bytes-per-token", 77, "--about", "a clock"]
    code, out, said = profile(path, "--url", server.url, *options)
    assert code == 0
    assert f"written to {path}" in said.replace("\n", "")
    assert "round 1: a step of 2 x 64 tokens takes" in said
    assert "difference" in out
    found = load_profile(str(path))
    for words in ("a clock", "model served", server.url, "baton profile", "not measured"):
        assert words in found.source
    assert found.kv_bytes_per_token == 77
    # Threads on a busy machine are late, never early.
    assert STEP_S <= found.step_s(1, 100) < 2.5 * STEP_S
    assert 0.9 <= found.prefill_s(256) / (256 * PREFILL_S_PER_TOKEN) < 2


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ("refuses", "answered 400: "),
        ("stops early", "47 of 48 tokens came"),
        ("breaks off", "the engine died"),
        ("is too fast", "too fast to be seen"),
    ],
)
def test_a_server_that_cannot_be_measured_is_said_in_one_line(
    profile: Any, server: Any, tmp_path: Path, flaw: str, words: str
) -> None:
    server.flaw = flaw
    options = ["--max-prompt", 128, "--max-batch", 1, "--repeat", 1]
    code, _, said = profile(tmp_path / "x.yaml", "--url", server.url, *options)
    assert code == 2
    last_line = said.strip().splitlines()[-1]
    assert last_line.startswith("baton: ")
    assert words in last_line
    assert not (tmp_path / "x.yaml").exists()


def test_an_endpoint_or_a_model_that_is_not_there_is_said(profile: Any, server: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for url in ("http://127.0.0.1:1", "htp://x", "http://127.0.0.1:port"):
        code, _, said = profile(path, "--url", url)
        assert (code, said.count("\n")) == (2, 1)
        assert url.split("/")[-1] in said
    code, _, said = profile(path, "--url", server.url, "--model", "other")
    assert code == 2
    assert "there is no model 'other'" in said
    assert "served are served" in said
    server.max_model_len = 100
    code, _, said = profile(path, "--url", server.url)
    assert code == 2
    assert "100 tokens: too few" in said


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    profile: Any, server: Any, tmp_path: Path
) -> None:
    code, _, said = profile(tmp_path / "no folder" / "x.yaml", "--url", server.url)
    assert code == 2
    assert "no folder" in said
    assert not server.cached


def test_steps_count_from_when_all_streams_run_to_when_the_first_ends() -> None:
    early = TimedOutput(0.0, [(1.0 + 0.1 * step, step + 1) for step in range(48)])
    late = TimedOutput(0.0, [(2.0 + 0.1 * step, step + 1) for step in range(48)])
    step = step_time([early, late], 100)
    assert step is not None
    assert step.num_sequences == 2
    assert step.seconds == pytest.approx(0.1, rel=0.03)
    assert step.num_kv_tokens == pytest.approx(200 + (11 + 48) / 2 + (1 + 38) / 2, abs=2)
    one_after_another = TimedOutput(0.0, [(9.0 + 0.1 * step, step + 1) for step in range(48)])
    assert step_time([early, one_after_another], 100) is None


def test_tokens_that_share_an_event_count_all() -> None:
    merged = TimedOutput(0.0, [(1.0, 1), (1.3, 4), (1.6, 7), *((2.0 + 0.1 * step, 11 + step) for step in range(38))])
    step = step_time([merged], 64)
    assert step is not None
    assert step.seconds == pytest.approx(0.1, rel=0.01)


def test_lengths_and_batches_double() -> None:
    extent = choose_extent(1000, 12, 3)
    assert extent.prompt_lengths == [64, 128, 256, 1000]
    assert extent.batches == [1, 2, 4, 12]
    assert extent.contexts == [64, 250, 500]
