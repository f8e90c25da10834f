"""`baton bench-cache` against a server with a prefix cache of 16-token blocks, where prefill takes its time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from app.bench.prefix_cache import Pair, TimedAnswer, summarize

BLOCK_TOKENS = 16
PREFILL_S = 0.03
"""What a prompt takes that is not cached."""
TEMPLATE = ["<chat>"] * (BLOCK_TOKENS // 2)
"""What every chat begins with: less than a block, so that it is not cached by itself."""


class Handler(BaseHTTPRequestHandler):
    """Answers as `flaw` of its server says."""

    server: CachingServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def do_GET(self) -> None:
        answers: dict[str, dict[str, Any]] = {
            "/v1/models": {"data": self.server.models},
            "/version": {"version": "1.2.3"},
        }
        self._answer(200 if self.path in answers else 404, answers.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._tokenize(body)
        elif self.server.flaw == "refuses":
            self._answer(400, {"error": {"message": "there is\nno chat template"}})
        else:
            self.server.bodies.append(body)
            self._complete(body)

    def _tokenize(self, body: dict[str, Any]) -> None:
        tokens = list(range(1000, 1000 + len(body["prompt"].split())))
        known = {"no /tokenize": (404, {}), "another /tokenize": (200, {"ids": tokens})}
        self._answer(*known.get(self.server.flaw, (200, {"tokens": tokens})))

    def _complete(self, body: dict[str, Any]) -> None:
        flaw = self.server.flaw
        tokens = _tokens_of(body)
        cached = self.server.look_up(tokens)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if "messages" in body:
            self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        time.sleep(0 if cached else PREFILL_S)
        for token in [] if flaw == "no token" else ["one\u2028", "two"]:
            self._event({"choices": [{"delta": {"content": token}} if "messages" in body else {"text": token}]})
        if flaw in ("error", "garbage"):
            self._event({"error": {"message": "the engine died"}} if flaw == "error" else "{")
        if flaw != "no usage":
            self._event({"choices": [], "usage": self._usage(len(tokens), cached)})
        if flaw != "no end":
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _usage(self, num_tokens: int, cached: int) -> dict[str, Any]:
        is_left_out = self.server.flaw == "no report" or (self.server.flaw == "no zeros" and not cached)
        return {
            "prompt_tokens": num_tokens,
            "prompt_tokens_details": None if is_left_out else {"cached_tokens": cached},
        }

    def _event(self, event: dict[str, Any] | str) -> None:
        text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
        self._chunk(f"data: {text}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _tokens_of(body: dict[str, Any]) -> list[Any]:
    if "messages" in body:
        said = [[message["role"], *message["content"].split(" ")] for message in body["messages"]]
        return [*TEMPLATE, *(word for words in said for word in words)]
    prompt = body["prompt"]
    return prompt if isinstance(prompt, list) else prompt.split(" ")


class CachingServer(ThreadingHTTPServer):
    """Keeps what it was sent; `flaw` and `models` change how it answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.flaw = ""
        self.models: list[dict[str, Any]] = [{"id": "other"}, {"id": "served", "max_model_len": 4096}]
        self.bodies: list[dict[str, Any]] = []
        self.blocks: set[tuple[Any, ...]] = set()
        self.num_connections = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves an answer that breaks off is what some tests are about: not worth a traceback."""

    def look_up(self, tokens: list[Any]) -> int:
        """How many tokens are cached; those of whole blocks are from now on."""
        ends = range(BLOCK_TOKENS, len(tokens), BLOCK_TOKENS)
        cached = max((end for end in ends if tuple(tokens[:end]) in self.blocks), default=0)
        if self.flaw != "no cache":
            self.blocks.update(tuple(tokens[:end]) for end in ends)
        return cached

    @property
    def prompts(self) -> list[Any]:
        return [body["prompt"] for body in self.bodies if "prompt" in body]

    @property
    def chats(self) -> list[list[dict[str, str]]]:
        return [body["messages"] for body in self.bodies if "messages" in body]


@pytest.fixture
def server() -> Iterator[CachingServer]:
    with CachingServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def bench_cache(baton_command: Run) -> Run:
    return partial(baton_command, "bench-cache")


class TestMeasured:
    def test_the_cache_shows_in_all_three_parts(self, bench_cache: Run, server: CachingServer, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        code, said, _ = bench_cache(f"{server.url}/v1/", "--model", "served", "--repeat", 3, "--json", path)
        assert code == 0
        for words in ("served at http://", "version 1.2.3", "2000 tokens as token ids", "A conversation", "A shared"):
            assert words in said
        found = json.loads(path.read_text())
        assert (found["url"], found["model"], found["problems"]) == (server.url, "served", [])
        assert found["date"]
        assert "baton" in found["versions"]
        assert [pair["cached"]["cached_tokens"] for pair in found["repeated"]] == [1984] * 3
        assert [pair["uncached"]["cached_tokens"] for pair in found["repeated"]] == [0] * 3
        for part, length in (("conversation", 5), ("shared_system_prompt", 6)):
            first, *others = found[part]
            assert len(others) == length - 1
            assert first["cached_tokens"] == 0
            assert all(answer["cached_tokens"] > 0.8 * answer["prompt_tokens"] for answer in others)
            assert first["ttft_ms"] >= PREFILL_S * 1000, "the event that opens a chat is no token"
        assert f"uncached/cached: {found['summary']['uncached_to_cached']:.2f}" in said

    def test_the_ratio_is_that_of_the_medians(self, bench_cache: Run, server: CachingServer, tmp_path: Path) -> None:
        def pair(uncached: float, cached: float) -> Pair:
            return Pair(TimedAnswer(uncached, 1, 0, ""), TimedAnswer(cached, 1, 1, ""))

        summary = summarize([pair(10, 4), pair(1000, 2), pair(12, 1)])
        assert (summary.uncached_ttft_ms, summary.cached_ttft_ms, summary.uncached_to_cached) == (12, 2, 6)
        bench_cache(server.url, "--repeat", 3, "--json", tmp_path / "out.json")
        found = json.loads((tmp_path / "out.json").read_text())
        times = {each: median(pair[each]["ttft_ms"] for pair in found["repeated"]) for each in ("uncached", "cached")}
        assert found["summary"]["uncached_to_cached"] == pytest.approx(times["uncached"] / times["cached"])

    def test_every_prompt_is_new_and_sent_twice_in_turn(self, bench_cache: Run, server: CachingServer) -> None:
        for _ in range(2):
            bench_cache(server.url, "--repeat", 4, "--tokens", 200)
        assert len(server.prompts) == 2 * 2 * (1 + 4), "the first pair of each run is the warm-up"
        assert server.prompts[::2] == server.prompts[1::2]
        assert len({tuple(prompt[:BLOCK_TOKENS]) for prompt in server.prompts}) == 10, "another run draws others"
        assert {len(prompt) for prompt in server.prompts} == {200}

    def test_a_conversation_grows_with_the_models_answers(self, bench_cache: Run, server: CachingServer) -> None:
        bench_cache(server.url, "--repeat", 1, "--turns", 3)
        _, *conversation = server.chats[:4]
        assert [len(messages) for messages in conversation] == [2, 4, 6]
        assert conversation[2][:4] == [*conversation[1]]
        assert conversation[1][2] == {"role": "assistant", "content": "one\u2028two"}
        assert len(conversation[0][0]["content"].split()) == 300

    def test_a_shared_system_prompt_has_half_the_tokens(self, bench_cache: Run, server: CachingServer) -> None:
        bench_cache(server.url, "--repeat", 1, "--turns", 2, "--tokens", 1000)
        shared = server.chats[-6:]
        assert len({messages[0]["content"] for messages in shared}) == 1
        assert len({messages[1]["content"] for messages in shared}) == 6
        assert len(shared[0][0]["content"].split()) == pytest.approx(500, rel=0.05)

    @pytest.mark.parametrize("flaw", ["no /tokenize", "another /tokenize"])
    def test_without_a_tokenizer_prompts_are_text(self, bench_cache: Run, server: CachingServer, flaw: str) -> None:
        server.flaw = flaw
        code, said, _ = bench_cache(server.url, "--repeat", 2)
        assert code == 0
        assert "as text" in said
        assert {type(prompt) for prompt in server.prompts} == {str}
        assert len(server.prompts[0].split()) == pytest.approx(2000, rel=0.05)

    def test_all_goes_over_one_connection(self, bench_cache: Run, server: CachingServer) -> None:
        bench_cache(server.url, "--repeat", 1)
        assert server.num_connections == 1, "or each TTFT has the making of a connection in it"


class TestProblems:
    @pytest.mark.parametrize("flaw", ["no report", "no usage"])
    def test_a_server_that_does_not_report_cached_tokens(
        self, bench_cache: Run, server: CachingServer, flaw: str
    ) -> None:
        server.flaw = flaw
        code, said, _ = bench_cache(server.url, "--repeat", 1)
        assert code == 1
        assert "uncached/cached: " in said, "TTFT is known nevertheless"
        last_line = said.splitlines()[-1]
        assert "--enable-prompt-tokens-details" in last_line
        assert "--enable-cache-report" in last_line

    def test_a_server_that_caches_nothing(self, bench_cache: Run, server: CachingServer, tmp_path: Path) -> None:
        server.flaw = "no cache"
        code, said, _ = bench_cache(server.url, "--repeat", 3, "--json", tmp_path / "out.json")
        assert code == 1
        problems = json.loads((tmp_path / "out.json").read_text())["problems"]
        assert said.splitlines()[-3:] == problems
        beginnings = ("3 of 3 prompts", "4 of 4 turns", "5 of 5 questions")
        assert all(problem.startswith(words) for problem, words in zip(problems, beginnings, strict=True))

    def test_a_zero_may_be_left_out_where_nothing_can_be_cached(self, bench_cache: Run, server: CachingServer) -> None:
        server.flaw = "no zeros"
        assert bench_cache(server.url, "--repeat", 1)[0] == 0


class TestMistakes:
    @pytest.mark.parametrize(
        ("flaw", "words"),
        [
            ("refuses", '/v1/chat/completions answered 400: {"error": {"message": "there is'),
            ("error", "the engine died"),
            ("garbage", "broke off an answer"),
            ("no end", "no [DONE] came"),
            ("no token", "no token came"),
        ],
    )
    def test_an_answer_that_breaks_off_ends_it(
        self, bench_cache: Run, server: CachingServer, flaw: str, words: str
    ) -> None:
        server.flaw = flaw
        self.check(bench_cache(server.url), words)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--model", "huge"), "--model: there is no model 'huge'; served are other, served"),
            (("--model", "served", "--tokens", "4090"), "--tokens: 4090 and 8 of output are more than the 4096"),
            (("--json", "nowhere/out.json"), "--json: the folder of nowhere/out.json does not exist"),
        ],
    )
    def test_each_names_its_option(
        self, bench_cache: Run, server: CachingServer, options: tuple[str, ...], words: str
    ) -> None:
        self.check(bench_cache(server.url, *options), words)
        assert server.bodies == []

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:8000", "http://127.0.0.1:port"])
    def test_a_url_where_nothing_is(self, bench_cache: Run, url: str) -> None:
        self.check(bench_cache(url), f"baton: URL: {url}" if url.endswith(":9") else f"baton: URL: '{url}' is no URL")

    @staticmethod
    def check(outcome: tuple[object, str, str], words: str) -> None:
        code, _, said = outcome
        assert code == 2
        assert said.startswith("baton: ")
        assert words in said
        assert said.count("\n") == 1
