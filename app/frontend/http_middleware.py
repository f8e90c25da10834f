"""Pure ASGI middlewares that vLLM's server lacks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend.explain import explain_header
from app.frontend.request_context import RequestContext, begin_request, current_request

EXPLAIN_HEADER = b"x-baton-explain"
"""A request with the value ``1`` gets this header in its response; any other value is ignored."""
TIMEOUT_HEADER = b"x-baton-timeout-s"
"""The seconds from a request's arrival to the end of its answer after which its client has no use for it."""
_SECONDS = re.compile(rb"[0-9]+(\.[0-9]+)?")


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error response in the format of OpenAI's API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class BodyLimit:
    """Answers 413 to a body of more than `max_body_bytes`, before anything parses it.

    This holds whether or not the request declares the body's length.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await self._refuse(scope, receive, send)
            return
        received = 0
        is_answering = is_refused = False

        async def counting_receive() -> Message:
            nonlocal received, is_refused
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes and not is_answering and not is_refused:
                is_refused = True
                await self._refuse(scope, receive, send)
            return {"type": "http.disconnect"} if is_refused else message

        async def noting_send(message: Message) -> None:
            nonlocal is_answering
            is_answering = True
            if not is_refused:
                await send(message)

        try:
            await self._app(scope, counting_receive, noting_send)
        except Exception:
            if not is_refused:
                raise

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"The request body is larger than {self._max_body_bytes} bytes."
        response = JSONResponse(error_body(message, "BadRequestError", 413), status_code=413)
        await response(scope, receive, send)


class RoutingHeaders:
    """Adds the headers whose content comes from the engine side of the request (request_context.py).

    They are an explanation, if the request had ``x-baton-explain: 1``, and ``Retry-After`` with a 429.  This middleware
    has to be outside of `ErrorBeforeStream`, which starts an answer only when its first token is there or when none
    will come.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wants_explanation = dict(scope["headers"]).get(EXPLAIN_HEADER) == b"1"
        with begin_request(wants_explanation=wants_explanation) as context:

            async def telling_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    headers = [*message.get("headers", ()), *_headers(context, message["status"])]
                    message = {**message, "headers": headers}
                await send(message)

            await self._app(scope, receive, telling_send)


def _headers(context: RequestContext, status: int) -> Iterator[tuple[bytes, bytes]]:
    if context.sequences:
        yield EXPLAIN_HEADER, explain_header(context.sequences).encode("ascii")
    if context.retry_after_s is not None and status == HTTPStatus.TOO_MANY_REQUESTS:
        yield b"retry-after", str(context.retry_after_s).encode("ascii")


class Deadline:
    """Notes when a request must have ended: `max_request_s` after its arrival, or sooner if its client wants that.

    Whoever serves it keeps to that (engine_client.py).  The header is answered 400 if it is no number of seconds.  What
    other clients send by themselves, such as ``x-stainless-read-timeout`` of OpenAI's, is no deadline: it bounds the
    time between two pieces of an answer, and such a client goes away by itself.
    """

    def __init__(self, app: ASGIApp, max_request_s: float) -> None:
        self._app = app
        self._max_request_s = max_request_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            asked = dict(scope["headers"]).get(TIMEOUT_HEADER)
            if asked is not None and (not _SECONDS.fullmatch(asked) or float(asked) == 0):
                name = TIMEOUT_HEADER.decode()
                error = error_body(f"{name} must be a number of seconds above 0.", "BadRequestError", 400, name)
                await JSONResponse(_shaped(error["error"], scope), status_code=400)(scope, receive, send)
                return
            seconds = self._max_request_s if asked is None else min(self._max_request_s, float(asked))
            current_request().deadline = time.monotonic() + seconds
        await self._app(scope, receive, send)


class ErrorBeforeStream:
    """Replaces a stream that fails before its first token by a plain response with the error's HTTP status.

    vLLM starts a streamed answer with status 200 before it asks the engine.  So an error before the first token would
    come too late for a status of its own.  This middleware holds back the start of a stream until the engine has begun
    or failed, and with it the events that vLLM sends before the first token (``response.created``).  A comment that
    keeps the connection alive ends the waiting.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _HeldResponse(scope, receive, send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            # Some of vLLM's streams raise an error that others send as an event.
            if not await answer.end_with_failure():
                raise


class _HeldResponse:
    """Passes one answer on, but holds back the start of a stream until it is known whether it fails."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._context = current_request()
        self._held: list[Message] = []
        self._is_replaced = False

    async def send(self, message: Message) -> None:
        if self._is_replaced:
            return
        if not self._held and not _is_start_of_event_stream(message):
            await self._send(message)
            return
        self._held.append(message)
        body = message.get("body", b"")
        if (error := self._context.early_failure or _error_in_rendering(body)) is not None:
            await self._replace(error)
        elif message["type"] == "http.response.body" and not self._has_to_wait(message):
            held, self._held = self._held, []
            for each in held:
                await self._send(each)

    async def end_with_failure(self) -> bool:
        """Send the request's failure if no other answer has begun.  Returns whether a failure was sent."""
        if self._held and not self._is_replaced and (error := self._context.early_failure) is not None:
            await self._replace(error)
        return self._is_replaced

    def _has_to_wait(self, message: Message) -> bool:
        """Return whether to hold back `message`: the engine has sent nothing yet, and the stream is not over."""
        asks_an_engine = self._scope.get("method") == "POST"  # a GET repeats the answer to an earlier request
        is_comment = message.get("body", b"").startswith(b":")
        return asks_an_engine and not self._context.has_output and not is_comment and message.get("more_body", False)

    async def _replace(self, error: dict[str, Any]) -> None:
        self._is_replaced = True
        response = JSONResponse(_shaped(error, self._scope), status_code=error["code"])
        await response(self._scope, self._receive, self._send)


def _is_start_of_event_stream(message: Message) -> bool:
    return message["type"] == "http.response.start" and any(
        name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message.get("headers", ())
    )


def _shaped(error: dict[str, Any], scope: Scope) -> dict[str, Any]:
    """Return a response body for `error`: in Anthropic's format for /v1/messages, else in OpenAI's."""
    if scope.get("path", "").endswith("/v1/messages"):
        return {"type": "error", "error": {"type": error["type"], "message": error["message"]}}
    return {"error": error}


def _error_in_rendering(body: bytes) -> dict[str, Any] | None:
    """Return the error in `body` if that is an error event with which vLLM's stream begins.

    One case needs this: vLLM's server cannot render an engine's first output, for example because requested logprobs
    are missing.  Its streams of ``/v1/completions`` and of beam searches then begin with an error event that the server
    itself made.  The engine side has not failed, so `RequestContext.failure` does not hold this error.
    """
    if not body.startswith(b'data: {"error": '):
        return None
    event, _, _ = body.removeprefix(b"data: ").partition(b"\n\n")
    try:
        error = json.loads(event)["error"]
    except ValueError:  # not all of the event
        return None
    has_status = isinstance(error, dict) and isinstance(error.get("code"), int) and 400 <= error["code"] < 600
    return error if has_status else None
