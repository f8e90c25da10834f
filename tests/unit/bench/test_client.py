"""The HTTP client of the tools: where streams are split, and who may not have a client of its own."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from app.bench.client import API_KEY, EventParser, new_async_client, new_client, read_events
from tests.conftest import REPOSITORY

TOKENS = ["one\u2028", "\u2029two\x85", "thr\x0bee\x1c", "\u00e9"]
"""Each with characters that end a line for Python and not for an event stream."""


def stream(line_end: bytes) -> bytes:
    events = [json.dumps({"text": token}, ensure_ascii=False).encode() for token in TOKENS]
    return b"".join(b"data: " + event + 2 * line_end for event in [*events, b"[DONE]"])


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_token_with_another_line_end_stays_whole(line_end: bytes, size: int) -> None:
    parser, sent = EventParser(), stream(line_end)
    events = [data for at in range(0, len(sent), size) for data in parser.feed(sent[at : at + size])]
    assert [json.loads(data)["text"] for data in events[:-1]] == TOKENS
    assert events[-1] == b"[DONE]"


def test_what_is_no_data_is_left_out() -> None:
    assert EventParser().feed(b": a comment\nevent: error\ndata:{}\nid: 1\n\ndata: unfinished") == [b"{}"]


def test_the_events_of_an_answer() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=stream(b"\n")))
    with httpx.Client(transport=transport) as client, client.stream("GET", "http://test") as response:
        assert len(list(read_events(response))) == len(TOKENS) + 1


async def test_every_client_sends_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "secret")
    with new_client("http://test", 1.0) as client:
        assert client.headers["Authorization"] == "Bearer secret"
    async with new_async_client("http://test", 1.0) as other:
        assert other.headers["Authorization"] == "Bearer secret"


def test_nobody_else_makes_a_client_or_splits_a_stream() -> None:
    own = re.compile(
        r"httpx\.(?:Async)?Client\(|httpx\.(?:get|post|request|stream)\(|\.a?iter_lines\(|startswith\(b?\"data:"
    )
    files = [file for folder in ("app", "benchmarks", "cluster") for file in (REPOSITORY / folder).rglob("*.py")]
    found = {str(file.relative_to(REPOSITORY)) for file in files if own.search(file.read_text())}
    servers = {"app/frontend/http_middleware.py"}  # which reads what it sends itself
    assert found - servers == {"app/bench/client.py"}
