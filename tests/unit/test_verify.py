"""``baton verify``: when two answers count as the same, and when nothing was verified."""

import json
import math
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from app.verify import OUTPUT_TOKENS, Answer, Case, Endpoint, VerifyError, _prompts, verify

TOLERANCE = 0.02
NUM_PROMPTS = 10
"""Prompts that one run prefills remotely: five lengths, three with a shared prefix and one twice."""


def answer(tokens: str, *logprobs: float, margin: float = 5.0) -> Answer:
    return Answer(list(tokens), list(logprobs), [margin] * len(tokens))


# Comparing


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (answer("ab", -1.0, -2.0), answer("ab", -1.0, -2.0), 0.0),
        (answer("ab", -1.0, -2.0), answer("ab", -1.25, -1.5), 0.5),
        (answer("ab", -1.0, -2.0), answer("ac", -1.25, -9.0), 0.25),
        (answer("abc", -1.0, -2.0, -3.0), answer("a", -1.5), 0.5),
        (answer("ab", -1.0, -2.0), answer("xb", -1.0, -2.0), math.inf),
        (answer(""), answer(""), math.inf),
    ],
    ids=["same", "largest", "until tokens differ", "until one ends", "first token differs", "empty"],
)
def test_the_difference_counts_until_the_tokens_differ(ours: Answer, theirs: Answer, difference: float):
    assert ours.max_difference(theirs) == theirs.max_difference(ours) == difference


@pytest.mark.parametrize(
    ("ours", "theirs", "num"),
    [("abc", "abc", 3), ("abx", "abc", 2), ("xbc", "abc", 0), ("axc", "abc", 1), ("ab", "abc", 2), ("", "abc", 0)],
)
def test_equal_tokens_are_counted_until_the_first_that_differs_or_lacks(ours: str, theirs: str, num: int):
    one, other = answer(ours, *[0.0] * len(ours)), answer(theirs, *[0.0] * len(theirs))
    assert one.num_equal(other) == other.num_equal(one) == num


def passes(remote: Answer, margin: float = 5.0, noise: float = 0.0) -> bool:
    return Case("case", 7, remote, answer("ab", -1.0, -2.0, margin=margin), noise).passes(TOLERANCE)


@pytest.mark.parametrize("difference", [0.0, TOLERANCE / 2, -TOLERANCE / 2])
def test_equal_tokens_with_near_logprobs_pass(difference: float):
    assert passes(answer("ab", -1.0, -2.0 + difference))


@pytest.mark.parametrize("difference", [TOLERANCE * 2, -TOLERANCE * 2])
def test_equal_tokens_with_other_logprobs_fail(difference: float):
    assert not passes(answer("ab", -1.0, -2.0 + difference))


def test_noise_raises_what_passes_to_twice_the_noise():
    assert passes(answer("ab", -1.0, -2.5), noise=0.25)
    assert not passes(answer("ab", -1.0, -2.75), noise=0.25)


def test_a_token_may_differ_where_noise_can_flip_it():
    assert passes(answer("ax", -1.0, -2.0), margin=TOLERANCE / 2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_token_that_noise_cannot_flip_must_not_differ(noise: float):
    assert not passes(answer("ax", -1.0, -2.0), margin=5.0, noise=noise)


def test_the_first_token_must_not_differ():
    assert not passes(answer("xb", -1.0, -2.0), margin=0.0)


def test_an_answer_that_ends_early_fails():
    assert not passes(answer("a", -1.0))


def test_noise_without_bounds_does_not_make_everything_pass():
    # The engine's own answers differ from the first token on: nothing can be told from a comparison.
    assert not passes(answer("ax", -1.0, -9.0), noise=math.inf)


# Against an application


class FakeBaton(ThreadingHTTPServer):
    """Answers like Baton; what a prefill mode does to the answer is up to the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeBatonHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.max_model_len = 4096
        self.token_by_mode: dict[str, str] = {}
        self.logprob_by_mode: dict[str, float] = {}
        self.num_local = 0
        """How many of the next prompts decode prefills itself although it should not."""
        self.num_transfers = 100
        self.completions: list[dict[str, Any]] = []
        self.fixed: dict[str, tuple[int, str]] = {}
        """Status and body of what some paths answer instead."""

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": self.max_model_len}]}
        if path == "/tokenize":
            return {"tokens": [3, 4, 5]}
        if path == "/stats":
            counted = {"num_transfers": self.num_transfers, "transferred_bytes": 0, "transport": "tcp"}
            return {"replicas": [{"role": "prefill", **counted}, {"role": "decode", **counted}]}
        return self.complete(body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.completions.append(body)
        mode = body["vllm_xargs"]["baton_prefill"]
        if mode != "local":
            self.num_local -= 1
            self.num_transfers += self.num_local < 0
        tokens = [self.token_by_mode.get(mode, "token_id:7")] * body["max_tokens"]
        logprobs = [self.logprob_by_mode.get(mode, -1.0)] * body["max_tokens"]
        candidates = [{token: logprob, "token_id:1": -6.0} for token, logprob in zip(tokens, logprobs, strict=True)]
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": candidates}}]}


class FakeBatonHandler(BaseHTTPRequestHandler):
    server: FakeBaton
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        status, text = self.server.fixed.get(self.path) or (200, json.dumps(self.server.reply(self.path, body)))
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(server: FakeBaton) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBaton]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeBaton() as server, serving(server):
        yield server


def verified(url: str, spoil: bool = False) -> bool:
    return verify(url, spoil=spoil, tolerance=TOLERANCE, seed=0)


def test_equal_output_passes(baton: FakeBaton, capsys: pytest.CaptureFixture[str]):
    assert verified(baton.url)
    assert f"KV of {NUM_PROMPTS} of {NUM_PROMPTS} prompts moved" in capsys.readouterr().out


def test_other_tokens_fail(baton: FakeBaton):
    baton.token_by_mode["auto"] = "token_id:8"
    assert not verified(baton.url)


def test_other_logprobs_fail(baton: FakeBaton):
    baton.logprob_by_mode["auto"] = -1.0 - 2 * TOLERANCE
    assert not verified(baton.url)


def test_spoiling_asks_for_wrong_kv_and_fails_if_it_arrives(baton: FakeBaton):
    baton.token_by_mode["spoiled"] = "token_id:8"
    assert not verified(baton.url, spoil=True)


def test_a_spoiled_run_that_still_passes_is_not_hidden(baton: FakeBaton):
    assert verified(baton.url, spoil=True)


@pytest.mark.parametrize("num_local", [1, NUM_PROMPTS])
def test_prompts_that_were_prefilled_locally_verify_nothing(baton: FakeBaton, num_local: int):
    baton.num_local = num_local
    with pytest.raises(VerifyError, match=f"only {NUM_PROMPTS - num_local} of {NUM_PROMPTS} prompts"):
        verified(baton.url)


def test_no_serving_can_reuse_the_kv_of_another(baton: FakeBaton):
    verified(baton.url)
    modes_by_salt: dict[str, set[str]] = {}
    for body in baton.completions:
        modes_by_salt.setdefault(body["cache_salt"], set()).add(body["vllm_xargs"]["baton_prefill"])
    # seven groups of prompts, served three times each: once remotely and twice locally
    assert sorted(sorted(modes) for modes in modes_by_salt.values()) == [["auto"]] * 7 + [["local"]] * 14


@pytest.mark.parametrize("max_model_len", [128, 512, 1024, 2048, 4096])
def test_every_prompt_leaves_room_for_the_output(baton: FakeBaton, max_model_len: int):
    baton.max_model_len = max_model_len
    with httpx.Client(base_url=baton.url) as client:
        groups = _prompts(Endpoint(client), random.Random(0))
    assert max(len(prompt) for _, prompts in groups for prompt in prompts) + OUTPUT_TOKENS <= max_model_len


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://127.0.0.1:80x"])
def test_a_url_where_nothing_answers_is_named(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = url.format(port=closed_port())
    with pytest.raises(VerifyError) as caught:
        verified(url)
    assert url in str(caught.value)


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/v1/completions", "/stats"])
def test_an_error_in_an_answer_is_passed_on_with_its_path(baton: FakeBaton, path: str):
    baton.fixed[path] = 500, "no engine"
    with pytest.raises(VerifyError, match=f"{path} answered 500: no engine"):
        verified(baton.url)


def test_a_url_where_something_else_answers_is_an_error(baton: FakeBaton):
    baton.fixed["/v1/models"] = 200, "<html>welcome</html>"
    with pytest.raises(VerifyError, match="/v1/models"):
        verified(baton.url)
