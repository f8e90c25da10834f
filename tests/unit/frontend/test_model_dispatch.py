"""Which model's application gets a request, and that it notices nothing of the others."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend.http_middleware import BodyLimit
from app.frontend.model_dispatch import ModelDispatch

LIMIT = 4 * 1024 * 1024
DEADLINE_S = 5.0


def server(name: str, *stored: str) -> Starlette:
    """Answers with its name and what it got, as a stream if asked; keeps the responses `stored`."""

    async def post(request: Request) -> Response:
        body = await request.body()
        try:
            fields = json.loads(body)
        except ValueError:
            return JSONResponse({"server": name, "error": "no JSON"}, status_code=400)
        if isinstance(fields, dict) and fields.get("stream"):
            chunks = (f"{name} {number}\n".encode() for number in range(3))
            return StreamingResponse(_each(chunks), media_type="text/event-stream")
        return JSONResponse({"server": name, "body": body.decode()})

    async def get(request: Request) -> Response:
        return JSONResponse({"server": name, "path": request.url.path})

    async def stored_response(request: Request) -> Response:
        is_here = request.path_params["id"] in stored
        body = (await request.body()).decode()
        return JSONResponse({"server": name, "body": body}, status_code=200 if is_here else 404)

    return Starlette(
        routes=[
            Route("/v1/responses/render", post, methods=["POST"]),
            Route("/v1/responses/{id}", stored_response),
            Route("/v1/responses/{id}/cancel", stored_response, methods=["POST"]),
            Route("/{path:path}", post, methods=["POST"]),
            Route("/{path:path}", get),
        ]
    )


async def _each(chunks: Any) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def dispatching() -> ASGIApp:
    dispatch = ModelDispatch({"a": server("a", "resp_a"), "org/b": server("b", "resp_b")})
    return BodyLimit(dispatch, LIMIT, max_inflight_bytes=2 * LIMIT, timeout_s=5.0)


async def fetch(method: str, path: str, app: ASGIApp | None = None, **options: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app or dispatching())
    async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
        return await client.request(method, path, **options)


async def in_chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body whose length is not declared."""
    for start in range(0, len(body), 100_000):
        yield body[start : start + 100_000]


@pytest.mark.parametrize(("model", "server"), [("a", "a"), ("org/b", "b")])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/responses/render", "/tokenize"])
async def test_a_request_goes_to_the_model_that_it_names_unchanged(model: str, server: str, path: str) -> None:
    body = json.dumps({"prompt": [1, 2], "model": model}, indent=3)
    answer = await fetch("POST", path, content=body)
    assert answer.json() == {"server": server, "body": body}


@pytest.mark.parametrize("size", [10, 3_000_000])
async def test_a_body_in_pieces_arrives_whole(size: int) -> None:
    body = json.dumps({"prompt": "x" * size, "model": "org/b"}).encode()
    answer = await fetch("POST", "/v1/completions", content=in_chunks(body))
    assert answer.json() == {"server": "b", "body": body.decode()}


async def test_a_model_that_is_named_inside_another_field_does_not_count() -> None:
    answer = await fetch("POST", "/", json={"metadata": {"model": "a"}, "model": "org/b"})
    assert answer.json()["server"] == "b"


async def test_a_streamed_answer_is_passed_on_as_it_comes() -> None:
    answer = await fetch("POST", "/v1/completions", json={"model": "org/b", "stream": True})
    assert answer.text == "b 0\nb 1\nb 2\n"
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_model_is_a_404_that_names_the_models(stream: bool) -> None:
    answer = await fetch("POST", "/v1/completions", json={"model": "c", "stream": stream})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (404, "model", "NotFoundError")
    for name in ("`c`", "`a`", "`org/b`"):
        assert name in error["message"]


@pytest.mark.parametrize("fields", [{}, {"model": None}])
async def test_without_a_model_it_is_a_400_that_names_the_field(fields: dict[str, Any]) -> None:
    answer = await fetch("POST", "/v1/completions", json={"prompt": "x", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (400, "model", "BadRequestError")
    assert "`model`" in error["message"]


@pytest.mark.parametrize("body", ["{nope", "", '{"model": "org/b"'])
async def test_what_is_no_json_is_refused_by_an_application(body: str) -> None:
    answer = await fetch("POST", "/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json() == {"server": "a", "error": "no JSON"}


@pytest.mark.parametrize("body", ["[]", '{"model": 5}'])
async def test_what_has_the_wrong_shape_is_left_to_an_application(body: str) -> None:
    assert (await fetch("POST", "/v1/completions", content=body)).json() == {"server": "a", "body": body}


@pytest.mark.parametrize("path", ["/metrics", "/docs", "/version", "/v1/models"])
async def test_a_request_without_a_body_goes_to_the_first_model(path: str) -> None:
    assert (await fetch("GET", path)).json() == {"server": "a", "path": path}


@pytest.mark.parametrize(("response_id", "server"), [("resp_a", "a"), ("resp_b", "b")])
@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("POST", "/cancel")])
async def test_a_stored_response_is_found_at_the_model_that_made_it(
    response_id: str, server: str, method: str, suffix: str
) -> None:
    answer = await fetch(method, f"/v1/responses/{response_id}{suffix}", content=b"rest")
    assert (answer.status_code, answer.json()) == (200, {"server": server, "body": "rest"})


async def test_a_stored_response_that_no_model_has_is_a_404() -> None:
    answer = await fetch("GET", "/v1/responses/resp_c")
    assert (answer.status_code, answer.json()["server"]) == (404, "b")


async def test_a_stored_response_is_found_below_a_route_prefix() -> None:
    app = Starlette()
    app.mount("/prefix", dispatching())
    answer = await fetch("GET", "/prefix/v1/responses/resp_b", app)
    assert (answer.status_code, answer.json()["server"]) == (200, "b")


@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_answered_413(is_declared: bool) -> None:
    body = json.dumps({"model": "a", "prompt": "x" * LIMIT}).encode()
    answer = await fetch("POST", "/v1/completions", content=body if is_declared else in_chunks(body))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == 413


# What a client that goes away causes


class Client:
    """Sends a POST to an ASGI application piece by piece."""

    def __init__(self, app: ASGIApp) -> None:
        self.received: asyncio.Queue[Message] = asyncio.Queue()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        self.task = asyncio.ensure_future(app(scope, self._sent.get, self.received.put))

    def send(self, body: bytes, more: bool = False) -> None:
        self._sent.put_nowait({"type": "http.request", "body": body, "more_body": more})

    def leave(self) -> None:
        self._sent.put_nowait({"type": "http.disconnect"})


async def test_a_disconnection_reaches_the_application() -> None:
    got: list[Message] = []

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        got.append(await receive())

    async with asyncio.timeout(DEADLINE_S):
        client = Client(ModelDispatch({"a": waiting, "b": server("b")}))
        client.send(b'{"model": ', more=True)
        client.send(b'"a"}')
        await client.received.get()
        assert not client.task.done()
        client.leave()
        await client.task
    assert got == [
        {"type": "http.request", "body": b'{"model": "a"}', "more_body": False},
        {"type": "http.disconnect"},
    ]


async def test_a_disconnection_stops_a_stream() -> None:
    stopped = asyncio.Event()

    async def endless(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"data: {}\n\n"
                    await asyncio.sleep(0.001)
            finally:
                stopped.set()

        return StreamingResponse(body())

    app = Starlette(routes=[Route("/v1/completions", endless, methods=["POST"])])
    async with asyncio.timeout(DEADLINE_S):
        client = Client(ModelDispatch({"a": server("a"), "b": app}))
        client.send(b'{"model": "b"}')
        while (await client.received.get())["type"] != "http.response.body":
            pass
        assert not stopped.is_set()
        client.leave()
        await client.task
    assert stopped.is_set()


async def test_a_client_that_leaves_before_the_end_of_its_body_reaches_no_application() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        pytest.fail("the application was called")

    async with asyncio.timeout(DEADLINE_S):
        client = Client(ModelDispatch({"a": never, "b": never}))
        client.send(b'{"model": "a", ', more=True)
        client.leave()
        await client.task
    assert client.received.empty()


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_not_http_goes_to_the_first_model(kind: str) -> None:
    passed: list[Any] = []

    async def first(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append((scope, receive, send))

    async def unused(*_: Any) -> Any:
        raise AssertionError

    await ModelDispatch({"a": first, "b": unused})({"type": kind}, unused, unused)
    assert passed == [({"type": kind}, unused, unused)]
