"""Bodies that are too large, and streams that begin with an error."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http_middleware import BodyLimit, ErrorBeforeStream, error_body

LIMIT = 10
EVENT = b'data: {"choices": [{"text": "a"}]}\n\n'
DONE = b"data: [DONE]\n\n"
DEADLINE_S = 5.0


def error_event(code: Any) -> bytes:
    return b"data: " + json.dumps(error_body("went wrong", "SomeError", code)).encode() + b"\n\n"


async def fetch(app: ASGIApp, method: str = "GET", **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        return await client.request(method, "/", **options)


# BodyLimit


async def measure(request: Request) -> Response:
    return JSONResponse(len(await request.body()))


async def pass_on(request: Request, call_next: Callable[[Request], Any]) -> Response:
    response: Response = await call_next(request)
    return response


def measuring(**options: Any) -> ASGIApp:
    return BodyLimit(Starlette(routes=[Route("/", measure, methods=["POST"])], **options), LIMIT)


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not declared."""
    for start in range(0, len(body), 4):
        yield body[start : start + 4]


@pytest.mark.parametrize("pack", [bytes, in_chunks], ids=["declared", "chunked"])
async def test_a_body_of_exactly_the_limit_is_accepted(pack: Callable[[bytes], Any]):
    response = await fetch(measuring(), "POST", content=pack(b"x" * LIMIT))
    assert (response.status_code, response.json()) == (200, LIMIT)


@pytest.mark.parametrize("pack", [bytes, in_chunks], ids=["declared", "chunked"])
async def test_a_body_over_the_limit_is_answered_413(pack: Callable[[bytes], Any]):
    response = await fetch(measuring(), "POST", content=pack(b"x" * (LIMIT + 1)))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413
    assert f"larger than {LIMIT} bytes" in response.json()["error"]["message"]


async def test_a_body_that_is_declared_too_large_is_never_read():
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("the application was called")

    response = await fetch(BodyLimit(never, LIMIT), "POST", headers={"content-length": str(LIMIT + 1)})
    assert response.status_code == 413


@pytest.mark.parametrize("declared", ["1", "ten"], ids=["too little", "no number"])
async def test_a_wrong_declaration_does_not_get_a_body_over_the_limit_in(declared: str):
    response = await fetch(
        measuring(), "POST", content=in_chunks(b"x" * (LIMIT + 1)), headers={"content-length": declared}
    )
    assert response.status_code == 413


async def test_a_body_over_the_limit_is_answered_413_through_another_middleware():
    app = measuring(middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)])
    response = await fetch(app, "POST", content=in_chunks(b"x" * (LIMIT + 1)))
    assert response.status_code == 413


async def test_an_answer_that_has_begun_is_not_begun_again():
    async def answers_first(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    response = await fetch(BodyLimit(answers_first, LIMIT), "POST", content=in_chunks(b"x" * (LIMIT + 1)))
    assert response.status_code == 200


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_not_http_passes(kind: str):
    passed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append((scope, receive, send))

    async def unused(*_: Any) -> Any:
        raise AssertionError

    await BodyLimit(app, 0)({"type": kind}, unused, unused)
    await ErrorBeforeStream(app)({"type": kind}, unused, unused)
    assert [scope for scope, *_ in passed] == [{"type": kind}] * 2
    assert passed[0][1:] == (unused, unused)


# ErrorBeforeStream


def streaming(*chunks: bytes, media_type: str = "text/event-stream", status: int = 200) -> ASGIApp:
    async def stream(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return StreamingResponse(body(), status, {"x-request-id": "r"}, media_type)

    return ErrorBeforeStream(Starlette(routes=[Route("/", stream)]))


@pytest.mark.parametrize("code", [400, 404, 503, 504])
async def test_a_stream_that_begins_with_an_error_becomes_that_error(code: int):
    response = await fetch(streaming(error_event(code), DONE))
    assert response.status_code == code
    assert response.headers["content-type"] == "application/json"
    assert response.json() == error_body("went wrong", "SomeError", code)


@pytest.mark.parametrize(
    "chunks",
    [
        (EVENT, EVENT, DONE),
        (DONE,),
        (),
        (EVENT, error_event(500), DONE),  # too late for a status
        (error_event("rate_limit"), DONE),  # no status
        (error_event(200), DONE),
        (b'data: {"error": "words"}\n\n',),
        (b'data: {"error": null}\n\n',),
        (b": ping\n\n", EVENT),
        (b"event: message_start\n" + EVENT,),
        (b'data: {"choices": [{"te', b'xt": "a"}]}\n\n'),
        (b"data: {not JSON}\n\n",),
    ],
    ids=[
        "events",
        "end only",
        "empty",
        "error later",
        "code in words",
        "code of success",
        "error in words",
        "no error",
        "comment first",
        "named event",
        "event in pieces",
        "no JSON",
    ],
)
async def test_any_other_stream_is_left_alone(chunks: tuple[bytes, ...]):
    response = await fetch(streaming(*chunks))
    assert (response.status_code, response.content) == (200, b"".join(chunks))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "r"


async def test_an_answer_that_is_no_stream_is_left_alone():
    response = await fetch(streaming(error_event(400), media_type="application/json", status=202))
    assert (response.status_code, response.content) == (202, error_event(400))


async def test_a_stream_starts_with_its_first_event():
    sent: asyncio.Queue[Message] = asyncio.Queue()
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(start)
        assert sent.empty()
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async with asyncio.timeout(DEADLINE_S):
        task = asyncio.create_task(ErrorBeforeStream(app)({"type": "http"}, asyncio.Event().wait, sent.put))
        assert (await sent.get())["type"] == "http.response.start"
        assert (await sent.get())["body"] == EVENT
        go_on.set()
        assert (await sent.get())["body"] == DONE
        await task


async def test_a_body_message_without_a_body_means_an_empty_one():
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(start)
        await send({"type": "http.response.body"})

    response = await fetch(ErrorBeforeStream(app))
    assert (response.status_code, response.content) == (200, b"")
