"""`baton smoke` against a server that answers as Baton does, but for one flaw at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from app.cli.smoke import CHECKS
from tests.unit.bench.test_prefix_cache import CachingServer, Handler, _tokens_of

Run = Callable[..., tuple[object, str, str]]
ALL = set(CHECKS)


class BatonHandler(Handler):
    """What Baton adds to an OpenAI server; `flaw` of the server breaks one thing."""

    server: Baton

    def do_GET(self) -> None:
        flaw = self.server.flaw
        if self.path == "/health":
            status = {"degraded": "degraded", "unhealthy": "unhealthy"}.get(flaw, "healthy")
            pools = {"decode": {"ready": 2}, "prefill": {"ready": 0 if flaw == "degraded" else 1}}
            models = [{"name": card["id"], "state": "ready", "pools": pools} for card in self.server.models]
            self._answer(503 if flaw == "unhealthy" else 200, {"status": status, "models": models})
        elif self.path == "/stats":
            counts = {"num_transfers": self.server.num_transfers, "transferred_bytes": 4096 * self.server.num_transfers}
            busy = {"replica_id": "d2", "num_transfers": len(self.server.bodies), "transferred_bytes": 7}
            decode = {"replica_id": "d1", "transport": "tcp", **counts}
            self._answer(200, {"replicas": [{"replica_id": "p1", "error": "gone"}, decode, busy]})
        else:
            super().do_GET()

    def _complete(self, body: dict[str, Any]) -> None:
        flaw = self.server.flaw
        if body["model"] not in [card["id"] for card in self.server.models]:
            self._answer(*self._refusal(404, "any model", body["model"]))
        elif body.get("temperature", 0) < 0:
            self._answer(*self._refusal(400, "any input", "temperature must be non-negative"))
        elif flaw == "breaks" and "messages" in body:
            self._answer(500, {"error": "out of\norder"})
        elif body.get("stream"):
            self._stream(body)
        else:
            self._answer_at_once(body)

    def _refusal(self, status: int, flaw: str, says: str) -> tuple[int, dict[str, Any]]:
        if self.server.flaw == flaw:
            return 200, {"choices": []}
        return status, {"error": {"message": "no" if self.server.flaw == f"{flaw}, unnamed" else says}}

    def _answer_at_once(self, body: dict[str, Any]) -> None:
        flaw = self.server.flaw
        tokens = _tokens_of(body)
        cached = self.server.look_up(tokens)
        finish = "stop" if "response_format" in body and flaw != "endless JSON" else "length"
        text = {"no JSON": "{colour", "another colour": '{"colour": "mauve"}'}.get(flaw, ' {"colour":\n"red"}')
        message = {"role": "user" if flaw == "another role" else "assistant", "content": text}
        num_prompt = 3 if flaw == "lost tokens" and len(tokens) > 100 else len(tokens)
        usage = {**self._usage(num_prompt, cached), "completion_tokens": 0 if flaw == "no tokens" else 8}
        answer: dict[str, Any] = {"choices": [{"finish_reason": finish, "message": message}], "usage": usage}
        explained = "prompt" in body and flaw != "no header"
        self._answer(200, answer, self._explain(body) if explained else None)

    def _explain(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = body["vllm_xargs"]["baton_prefill"]
        kind = "remote" if asked == "remote" and self.server.flaw != "local" else "local"
        self.server.num_transfers += kind == "remote" and self.server.flaw != "no transfer"
        reason = "transport_refused" if self.server.flaw == "local" else ""
        actual = {"kind": kind, "reason": reason, "cached_tokens": 0, "ttft_ms": 12.34}
        prefill = {"replica": "p1"} if asked == "remote" else None
        return [{"kind": asked, "reason": "faster", "prefill": prefill, "decode": {"replica": "d1"}, "actual": actual}]

    def _stream(self, body: dict[str, Any]) -> None:
        num_tokens = body["max_tokens"]
        tokens = _tokens_of(body)
        cached = self.server.look_up(tokens)
        usage = {**self._usage(len(tokens), cached), "completion_tokens": num_tokens}
        events = {
            "role": {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            "tokens": self._event_of(body, "one\u2028", None),
            "finish": self._event_of(body, "two", "length"),
            "usage": {"choices": [], "usage": usage},
            "error": {"error": {"message": "the engine died"}},
            "[DONE]": None,
        }
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for name in self.server.order if body.get("ignore_eos") else ["role", "tokens", "finish", "usage", "[DONE]"]:
            self._chunk(f"data: {json.dumps(events[name]) if events[name] else name}\n\n".encode())
        self._chunk(b"")

    def _event_of(self, body: dict[str, Any], text: str, finish: str | None) -> dict[str, Any]:
        if self.server.flaw == "silent" and body.get("ignore_eos"):
            text = ""
        content = {"delta": {"content": text}} if "messages" in body else {"text": text}
        return {"choices": [{**content, "finish_reason": finish}]}

    def _answer(self, status: int, content: dict[str, Any], explained: list[dict[str, Any]] | None = None) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        if explained is not None:
            self.send_header("x-baton-explain", json.dumps(explained))
        self.end_headers()
        self.wfile.write(text)


class Baton(CachingServer):
    """`order` is that of a stream's events."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = BatonHandler
        self.models = [self.card("tiny")]
        self.order = ["role", "tokens", "tokens", "finish", "usage", "[DONE]"]
        self.num_transfers = 5

    @staticmethod
    def card(name: str, **changes: Any) -> dict[str, Any]:
        usual = {"engine": "vllm", "mode": "disaggregated", "state": "ready", "max_model_len": 4096}
        return {"id": name, **usual, **changes}


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch) -> Iterator[Baton]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "200")
    with Baton() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def smoke(baton_command: Run) -> Run:
    return partial(baton_command, "smoke")


def rows(said: str) -> dict[str, str]:
    """The verdict of each check in a table."""
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines() if line.startswith("│")]
    return {check: verdict for check, verdict in cells if check}


def test_what_serves_passes(smoke: Run, baton: Baton) -> None:
    code, said, _ = smoke(baton.url)
    assert code == 0, said
    assert rows(said) == dict.fromkeys(ALL, "ok")
    for words in (
        "ready, 2 decode, 1 prefill",
        "tiny: vllm, disaggregated, up to 4096 tokens",
        "ITL median",
        "2000 tokens from p1 to d1: 0.0 MB by tcp, TTFT 12.3 ms",
        "8 tokens: prefilled local (faster), decoded by d1",
        "1984 of 2000 tokens cached",
        "5 turns, cached 0, ",
        '{"colour": "red"}',
    ):
        assert words in said
    assert said.splitlines()[-1] == "passed"


def test_the_prompts_were_never_sent_before(smoke: Run, baton: Baton) -> None:
    smoke(baton.url)
    smoke(baton.url)
    long = [tuple(prompt) for prompt in baton.prompts if len(prompt) == 2000]
    # Of each run one that is prefilled remotely, and two that are sent twice.
    assert len(long) == 2 * 5
    assert len(set(long)) == 2 * 3


def test_the_conversation_is_one_session_of_its_own(smoke: Run, baton: Baton) -> None:
    code, _, _ = smoke(baton.url)
    assert code == 0
    assert baton.num_connections == 2


@pytest.mark.parametrize(
    ("flaw", "failing", "words"),
    [
        ("degraded", {"health"}, "expected status healthy; came degraded (tiny ready, 2 decode, 0 prefill)"),
        ("unhealthy", {"health"}, 'came 503: {"status": "unhealthy"'),
        ("another role", {"chat"}, "expected a message of the assistant"),
        (
            "silent",
            {"streaming"},
            "expected events in the order role, tokens, finish, usage, [DONE]; came role, finish",
        ),
        ("no tokens", {"chat"}, "expected 1 to 16 tokens; came 0"),
        ("local", {"long prompt, remote prefill"}, "expected remote prefill; came local (transport_refused)"),
        ("no transfer", {"long prompt, remote prefill"}, "expected KV moved to decode replica d1; came 0 transfers"),
        ("lost tokens", {"long prompt, remote prefill"}, "expected usage of 2000 prompt tokens; came 3"),
        ("no header", {"long prompt, remote prefill", "short prompt"}, "expected a response header x-baton-explain"),
        ("no cache", {"cache reuse", "conversation with a session"}, "expected cached tokens when a prompt is sent"),
        ("no report", {"cache reuse", "conversation with a session"}, "expected cached tokens that grow"),
        ("no JSON", {"structured output"}, "came '{colour', ended by stop"),
        ("another colour", {"structured output"}, "expected JSON with a colour of red, green, blue"),
        ("endless JSON", {"structured output"}, "ended by length"),
        ("any model", {"unknown model"}, "expected 404 that names no-such-model"),
        ("any model, unnamed", {"unknown model"}, "expected 404 that names no-such-model"),
        ("any input", {"bad input"}, "expected 400 that names temperature; came 200"),
        ("any input, unnamed", {"bad input"}, "expected 400 that names temperature; came 400"),
        (
            "breaks",
            {"chat", "streaming", "cache reuse", "conversation with a session", "structured output"},
            'expected an answer; came 500: {"error": "out of\\norder"}',
        ),
    ],
)
def test_what_does_not_serve_fails_by_itself(
    smoke: Run, baton: Baton, flaw: str, failing: set[str], words: str
) -> None:
    baton.flaw = flaw
    code, said, _ = smoke(baton.url)
    assert code == 1
    assert {check for check, verdict in rows(said).items() if verdict == "FAILED"} == failing
    reasons = [line for line in said.splitlines() if line.startswith("FAILED tiny, ")]
    assert len(reasons) == len(failing)
    assert any(words in line for line in reasons), reasons
    assert "passed" not in said


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["tokens", "finish", "usage", "[DONE]"], "came tokens, finish, usage, [DONE]"),
        (["role", "finish", "tokens", "usage", "[DONE]"], "came role, finish, tokens, usage, [DONE]"),
        (["role", "tokens", "finish", "[DONE]", "usage"], "came role, tokens, finish, [DONE], usage"),
        (["role", "tokens", "finish", "usage"], "came role, tokens, finish, usage"),
        (["role", "tokens", "finish", "[DONE]"], "came role, tokens, finish, [DONE]"),
        (["role", "tokens", "error", "[DONE]"], "came role, tokens, an error ({'message': 'the engine died'}), [DONE]"),
        (["role", "usage", "[DONE]"], "came role, usage, [DONE]"),
        ([], "came no event"),
    ],
    ids=["no role", "goes on", "usage late", "no end", "no usage", "error", "no tokens", "nothing"],
)
def test_a_stream_in_another_order_fails(smoke: Run, baton: Baton, order: list[str], words: str) -> None:
    baton.order = order
    code, said, _ = smoke(baton.url)
    assert code == 1
    assert f"FAILED tiny, streaming: expected events in the order role, tokens, finish, usage, [DONE]; {words}" in said


def test_a_stream_may_have_all_tokens_in_its_last_event(smoke: Run, baton: Baton) -> None:
    baton.order = ["role", "finish", "usage", "[DONE]"]
    code, said, _ = smoke(baton.url)
    assert code == 0, said


def test_what_a_model_has_not_is_skipped_and_said(smoke: Run, baton: Baton) -> None:
    baton.models = [Baton.card("alone", mode="aggregated", engine="sim")]
    code, said, _ = smoke(baton.url)
    assert code == 0
    skipped = {check for check, verdict in rows(said).items() if verdict == "skipped"}
    assert skipped == {"long prompt, remote prefill", "structured output"}
    assert "there is no prefill pool" in said


def test_a_model_that_is_not_ready_fails(smoke: Run, baton: Baton) -> None:
    baton.models = [Baton.card("tiny", state="unavailable")]
    code, said, _ = smoke(baton.url)
    assert code == 1
    assert "FAILED tiny, models: expected tiny ready; came unavailable" in said


def test_each_model_has_its_table_unless_one_is_named(smoke: Run, baton: Baton) -> None:
    baton.models = [Baton.card("one"), Baton.card("two")]
    assert [line.strip() for line in smoke(baton.url)[1].splitlines() if line[:3] in ("one", "two")] == ["one", "two"]
    asked = {body["model"] for body in baton.bodies}
    assert {"one", "two"} < asked
    baton.bodies.clear()
    assert smoke(baton.url, "--model", "two")[0] == 0
    assert {"one", "two"} & {body["model"] for body in baton.bodies} == {"two"}


def test_a_short_model_gets_shorter_prompts(smoke: Run, baton: Baton) -> None:
    baton.models = [Baton.card("tiny", max_model_len=1024)]
    smoke(baton.url)
    assert max(map(len, baton.prompts)) == 1024 - 16


@pytest.mark.parametrize(
    ("url", "words"),
    [("http://127.0.0.1:9", "does not answer"), ("127.0.0.1:8000", "is no URL"), ("http://127.0.0.1:x", "is no URL")],
)
def test_a_url_where_nothing_is_is_one_line(smoke: Run, url: str, words: str) -> None:
    code, _, said = smoke(url)
    assert code == 2
    assert said.startswith("baton: URL: ")
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("models", "options", "words"),
    [
        ([{"id": "gpt"}], (), "/v1/models is not Baton's"),
        ([], (), "the endpoint serves no model"),
        ([Baton.card("tiny")], ("--model", "huge"), "there is no model 'huge'; served are tiny"),
    ],
    ids=["not Baton", "no model", "unknown model"],
)
def test_nothing_to_check_is_one_line(
    smoke: Run, baton: Baton, models: list[dict[str, Any]], options: tuple[str, ...], words: str
) -> None:
    baton.models = models
    code, _, said = smoke(baton.url, *options)
    assert code == 2
    assert words in said
    assert said.count("\n") == 1
    assert baton.bodies == []
