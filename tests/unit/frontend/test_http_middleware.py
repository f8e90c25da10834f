"""Bodies that are too large, streams that begin with an error, and headers that tell of routing."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend import metrics
from app.frontend.authentication import Authentication
from app.frontend.http_middleware import BodyLimit, Deadline, ErrorBeforeStream, RoutingHeaders, error_body
from app.frontend.request_context import begin_request, current_request
from app.frontend.sequence_progress import SequenceProgress
from app.frontend.sequence_record import SequenceRecord
from app.tenant_usage import Accounts
from app.tenants import LOCAL
from tests.unit.decisions import decision
from tests.unit.waiting import until

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


def limited(app: ASGIApp, *, max_inflight_bytes: int = 1000, timeout_s: float = DEADLINE_S) -> ASGIApp:
    return BodyLimit(app, LIMIT, max_inflight_bytes=max_inflight_bytes, timeout_s=timeout_s)


def measuring(**options: Any) -> ASGIApp:
    return limited(Starlette(routes=[Route("/", measure, methods=["POST"])], **options))


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not declared."""
    for start in range(0, len(body), 4):
        yield body[start : start + 4]


@pytest.mark.parametrize("pack", [bytes, in_chunks], ids=["declared", "chunked"])
async def test_a_body_of_exactly_the_limit_is_accepted(pack: Callable[[bytes], Any]) -> None:
    response = await fetch(measuring(), "POST", content=pack(b"x" * LIMIT))
    assert (response.status_code, response.json()) == (200, LIMIT)


@pytest.mark.parametrize("pack", [bytes, in_chunks], ids=["declared", "chunked"])
async def test_a_body_over_the_limit_is_answered_413(pack: Callable[[bytes], Any]) -> None:
    counter = metrics.REFUSED_BODIES.labels("413")
    before = counter._value.get()
    response = await fetch(measuring(), "POST", content=pack(b"x" * (LIMIT + 1)))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413
    assert counter._value.get() == before + 1
    assert f"larger than {LIMIT} bytes" in response.json()["error"]["message"]


async def test_a_body_that_is_declared_too_large_is_never_read() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("the application was called")

    response = await fetch(limited(never), "POST", headers={"content-length": str(LIMIT + 1)})
    assert response.status_code == 413


@pytest.mark.parametrize("declared", ["1", "ten"], ids=["too little", "no number"])
async def test_a_wrong_declaration_does_not_get_a_body_over_the_limit_in(declared: str) -> None:
    response = await fetch(
        measuring(), "POST", content=in_chunks(b"x" * (LIMIT + 1)), headers={"content-length": declared}
    )
    assert response.status_code == 413


async def test_a_body_over_the_limit_is_answered_413_through_another_middleware() -> None:
    app = measuring(middleware=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)])
    response = await fetch(app, "POST", content=in_chunks(b"x" * (LIMIT + 1)))
    assert response.status_code == 413


async def test_an_answer_that_has_output_is_not_begun_again() -> None:
    async def answers_first(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    response = await fetch(limited(answers_first), "POST", content=in_chunks(b"x" * (LIMIT + 1)))
    assert response.status_code == 200


class Connection:
    """A client's side of one request whose body it sends piece by piece."""

    def __init__(self, app: ASGIApp, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        self._pieces: asyncio.Queue[Message] = asyncio.Queue()
        self.answer: list[Message] = []
        scope: Scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers or []}
        self.task = asyncio.ensure_future(app(scope, self._pieces.get, self._take))

    async def _take(self, message: Message) -> None:
        self.answer.append(message)

    def send(self, piece: bytes, *, is_last: bool = False) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": piece, "more_body": not is_last})

    def hang_up(self) -> None:
        self._pieces.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.answer[0]["status"] if self.answer else None

    @property
    def header(self) -> dict[bytes, bytes]:
        return dict(self.answer[0]["headers"])


ENDINGS: dict[str, Callable[[Connection], object]] = {
    "its body is all there": lambda connection: connection.send(b"", is_last=True),
    "its client hangs up": Connection.hang_up,
    "it is cancelled": lambda connection: connection.task.cancel(),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_bodies_are_bounded_together_until_they_have_arrived(ending: str) -> None:
    app = cast(BodyLimit, limited(Starlette(routes=[Route("/", measure, methods=["POST"])]), max_inflight_bytes=15))
    first = Connection(app)
    first.send(b"x" * 9)
    await until(lambda: app.inflight_bytes == 9)
    second = Connection(app)
    second.send(b"x" * 7)
    await asyncio.wait_for(second.task, DEADLINE_S)
    assert second.status == 429
    assert second.header[b"retry-after"] == b"1"
    assert b"connection" not in second.header, "a client that still sends would see only that"
    assert b"limits.max_inflight_body_bytes" in second.answer[1]["body"]
    declared = Connection(app, [(b"content-length", b"7")])
    await asyncio.wait_for(declared.task, DEADLINE_S)
    assert declared.status == 429
    fits = await fetch(app, "POST", content=in_chunks(b"x" * 6))
    assert fits.status_code == 200
    assert app.inflight_bytes == 9
    ENDINGS[ending](first)
    await asyncio.wait([first.task], timeout=DEADLINE_S)
    assert app.inflight_bytes == 0
    again = await fetch(app, "POST", content=in_chunks(b"x" * 10))
    assert again.status_code == 200


async def test_a_body_counts_no_longer_than_until_it_is_all_there() -> None:
    """An answer may take minutes."""
    parsed, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Response:
        await request.body()
        parsed.set()
        await go_on.wait()
        return JSONResponse(None)

    app = cast(BodyLimit, limited(Starlette(routes=[Route("/", slow, methods=["POST"])])))
    answer = asyncio.create_task(fetch(app, "POST", content=in_chunks(b"x" * LIMIT)))
    await asyncio.wait_for(parsed.wait(), DEADLINE_S)
    assert app.inflight_bytes == 0
    go_on.set()
    assert (await answer).status_code == 200


async def test_a_body_that_comes_too_slowly_is_answered_408() -> None:
    """The deadline is for all of it: each piece by itself comes in time."""
    timeout_s = 0.2
    app = cast(BodyLimit, limited(Starlette(routes=[Route("/", measure, methods=["POST"])]), timeout_s=timeout_s))
    began = asyncio.get_running_loop().time()
    connection = Connection(app)
    while not connection.task.done() and asyncio.get_running_loop().time() - began < DEADLINE_S:
        if app.inflight_bytes < LIMIT - 1:
            connection.send(b"x")
        await asyncio.wait([connection.task], timeout=timeout_s / 20)
    assert connection.status == 408
    assert connection.header[b"connection"] == b"close"
    assert b"limits.body_timeout_s" in connection.answer[1]["body"]
    assert app.inflight_bytes == 0


async def test_the_time_for_a_body_is_not_the_time_for_an_answer() -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        leaves = asyncio.ensure_future(receive())
        await asyncio.wait([leaves], timeout=0.2)
        assert not leaves.done()
        leaves.cancel()
        await JSONResponse(None)(scope, receive, send)

    connection = Connection(limited(late, timeout_s=0.05))
    connection.send(b"x", is_last=True)
    await asyncio.wait_for(connection.task, DEADLINE_S)
    assert connection.status == 200


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_not_http_passes(kind: str) -> None:
    passed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append((scope, receive, send))

    async def unused(*_: Any) -> Any:
        raise AssertionError

    await limited(app)({"type": kind}, unused, unused)
    await RoutingHeaders(app)({"type": kind}, unused, unused)
    await Deadline(app, 1.0)({"type": kind}, unused, unused)
    await ErrorBeforeStream(app)({"type": kind}, unused, unused)
    assert [scope for scope, *_ in passed] == [{"type": kind}] * 4
    assert passed[0][1:] == passed[1][1:] == (unused, unused)


# ErrorBeforeStream


def streaming(*chunks: bytes, media_type: str = "text/event-stream", status: int = 200) -> ASGIApp:
    async def stream(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        return StreamingResponse(body(), status, {"x-request-id": "r"}, media_type)

    return ErrorBeforeStream(Starlette(routes=[Route("/", stream)]))


@pytest.mark.parametrize("code", [400, 404, 503, 504])
async def test_a_stream_that_begins_with_an_error_becomes_that_error(code: int) -> None:
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
        (b'data: {"error": {"co', b'de": 400}}\n\n'),
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
        "error in pieces",
        "no JSON",
    ],
)
async def test_any_other_stream_is_left_alone(chunks: tuple[bytes, ...]) -> None:
    response = await fetch(streaming(*chunks))
    assert (response.status_code, response.content) == (200, b"".join(chunks))
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "r"


async def test_an_answer_that_is_no_stream_is_left_alone() -> None:
    response = await fetch(streaming(error_event(400), media_type="application/json", status=202))
    assert (response.status_code, response.content) == (202, error_event(400))


async def test_a_stream_starts_with_its_first_event() -> None:
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
        task = asyncio.create_task(ErrorBeforeStream(app)({"type": "http"}, asyncio.Queue[Message]().get, sent.put))
        assert (await sent.get())["type"] == "http.response.start"
        assert (await sent.get())["body"] == EVENT
        go_on.set()
        assert (await sent.get())["body"] == DONE
        await task


async def test_a_body_message_without_a_body_means_an_empty_one() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(start)
        await send({"type": "http.response.body"})

    response = await fetch(ErrorBeforeStream(app))
    assert (response.status_code, response.content) == (200, b"")


# ErrorBeforeStream, told of the engine by the context

TOO_BUSY = error_body("too busy", "Too Many Requests", 429)
CREATED = b'event: response.created\ndata: {"response": {}}\n\n'
PING = b": keep-alive\n\n"
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


class Client:
    """Follows what an application, step by step, sends through the middlewares."""

    def __init__(self, method: str = "POST", path: str = "/v1/responses", *headers: tuple[bytes, bytes]) -> None:
        self.scope: Scope = {"type": "http", "method": method, "path": path, "headers": headers}
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self, app: ASGIApp) -> None:
        async with asyncio.timeout(DEADLINE_S):
            served = Authentication(RoutingHeaders(ErrorBeforeStream(app)), None, Accounts(), others=LOCAL)
            await served(self.scope, asyncio.Queue[Message]().get, self.send)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


async def test_events_before_the_first_token_wait_for_it() -> None:
    client = Client()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, part(CREATED), part(CREATED)):
            await send(message)
        assert client.sent == []
        current_request().has_output = True
        await send(part(EVENT))
        assert client.sent[1:] == [part(CREATED), part(CREATED), part(EVENT)]
        await send(part(DONE, more=False))

    await client.run(app)
    assert client.status == 200
    assert client.body == CREATED + CREATED + EVENT + DONE


@pytest.mark.parametrize(
    ("method", "last"),
    [("GET", part(CREATED)), ("POST", part(PING)), ("POST", part(CREATED, more=False))],
    ids=["an earlier answer", "a comment that keeps alive", "the end"],
)
async def test_what_no_token_will_follow_does_not_wait_for_one(method: str, last: Message) -> None:
    client = Client(method)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await send(last)
        assert client.body == last["body"]

    await client.run(app)
    assert client.status == 200


@pytest.mark.parametrize("before", [[], [part(CREATED)]], ids=["at once", "after an event"])
@pytest.mark.parametrize("raises", [False, True], ids=["says so", "raises"])
async def test_a_failure_before_the_first_token_replaces_what_waits(before: list[Message], raises: bool) -> None:
    client = Client()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in (START, *before):
            await send(message)
        current_request().failure = TOO_BUSY["error"]
        if raises:
            raise RuntimeError
        await send(part(b"event: error\ndata: {}\n\n"))
        await send(part(DONE, more=False))
        raise RuntimeError  # nothing to those who have their answer

    await client.run(app)
    assert (client.status, json.loads(client.body)) == (429, TOO_BUSY)


async def test_a_failure_after_the_first_token_replaces_nothing() -> None:
    client = Client()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        current_request().has_output = True
        current_request().failure = TOO_BUSY["error"]
        await send(part(EVENT))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await client.run(app)
    assert (client.status, client.body) == (200, EVENT)


async def test_an_error_that_nobody_told_of_is_raised() -> None:
    client = Client()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await client.run(app)
    assert client.sent == []


async def test_anthropics_api_has_errors_of_its_own_shape() -> None:
    client = Client("POST", "/v1/messages")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        current_request().failure = TOO_BUSY["error"]
        await send(part(b""))

    await client.run(app)
    error = {"type": "Too Many Requests", "message": "too busy"}
    assert json.loads(client.body) == {"type": "error", "error": error}


# RoutingHeaders


def answering(status: int, *waits_s: float) -> ASGIApp:
    """A request with one sequence for each of `waits_s`, all of them refused for so long."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        context = current_request()
        for seconds in waits_s:
            context.refuse_for(seconds)
        if context.wants_explanation:
            context.sequences.append(SequenceRecord(SequenceProgress(lambda delta: None), "m", "r", 1))
            context.sequences[-1].on_decision(decision())
        await asyncio.ensure_future(send({"type": "http.response.start", "status": status}))

    return app


@pytest.mark.parametrize(
    ("waits_s", "told"),
    [((0.0,), b"1"), ((0.2,), b"1"), ((1.0,), b"1"), ((1.2,), b"2"), ((3.5, 9.1, 2.0), b"10"), ((), None)],
)
async def test_whole_seconds_to_wait_are_told(waits_s: tuple[float, ...], told: bytes | None) -> None:
    client = Client()
    await client.run(answering(429, *waits_s))
    assert client.headers.get(b"retry-after") == told


async def test_an_answer_is_not_told_to_wait() -> None:
    client = Client()
    await client.run(answering(200, 5.0))
    assert b"retry-after" not in client.headers


@pytest.mark.parametrize("value", [b"1", b"0", b"", b"01", b"true"])
async def test_only_1_asks_for_an_explanation(value: bytes) -> None:
    client = Client("POST", "/", (b"x-baton-explain", value))
    await client.run(answering(200))
    assert (b"x-baton-explain" in client.headers) == (value == b"1")


async def test_a_request_context_ends_with_its_request() -> None:
    with begin_request(LOCAL, wants_explanation=True) as outer:
        await Client().run(answering(200, 5.0))
        assert current_request() is outer
        assert outer.retry_after_s is None
    assert current_request() is not outer
    assert current_request() is not current_request()


# Deadline


async def remaining_s(request: Request) -> Response:
    return JSONResponse(current_request().deadline - time.monotonic())


TIMED = Authentication(
    RoutingHeaders(Deadline(Starlette(routes=[Route("/", remaining_s)]), 100.0)), None, Accounts(), others=LOCAL
)


@pytest.mark.parametrize(("asked", "seconds"), [(None, 100), ("50", 50), ("7.5", 7.5), ("1000", 100), ("9" * 400, 100)])
async def test_the_smaller_of_both_limits_counts(asked: str | None, seconds: float) -> None:
    response = await fetch(TIMED, headers={} if asked is None else {"x-baton-timeout-s": asked})
    assert response.status_code == 200
    assert seconds - 5 < response.json() <= seconds


@pytest.mark.parametrize(
    "asked", ["", "0", "0.0", "-1", "+1", "nan", "inf", "1e3", "1_0", "10s", " ", "\u0663".encode()]
)
async def test_a_limit_that_is_no_number_of_seconds_is_refused(asked: str | bytes) -> None:
    response = await fetch(TIMED, headers={"x-baton-timeout-s": asked})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-baton-timeout-s"
    assert "x-baton-timeout-s must be a number of seconds" in response.json()["error"]["message"]
