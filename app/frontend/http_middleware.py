"""Pure ASGI middlewares that vLLM's server lacks."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend import metrics
from app.frontend.explain import explain_header
from app.frontend.request_context import RequestContext, begin_request, current_request
from app.tenants import Tenant

EXPLAIN_HEADER = b"x-baton-explain"
"""A request with the value ``1`` gets this header in its response; any other value is ignored."""
TIMEOUT_HEADER = b"x-baton-timeout-s"
"""The seconds from a request's arrival to the end of its answer after which its client has no use for it."""
_SECONDS = re.compile(rb"[0-9]+(\.[0-9]+)?")


BODY_RETRY_AFTER_S = "1"
"""When to send a body again that did not fit beside others, in seconds: bodies arrive in less than that, mostly."""
REPLACED_S = b"5"
"""When to come again if no replica could serve a request, in seconds: the others are known to be gone by then, and a
replica is replaced no sooner."""


def route_path(scope: Scope) -> str:
    """Return a request's path without the part under which the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error response in the format of OpenAI's API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class BodyLimit:
    """Bounds the bodies of requests before anything parses them: each one, all together, and how long each may take.

    It answers 413 to a body of more than `max_body_bytes`, whether or not the request declares the body's length.  It
    answers 429 to a body that does not fit into `max_inflight_bytes` beside those that are arriving at the same time,
    and 408 to one that has not arrived after `timeout_s`.  A body no longer counts when the application has all of it,
    or when its request has ended in any other way.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, *, max_inflight_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_inflight_bytes = max_inflight_bytes
        self.timeout_s = timeout_s
        self.inflight_bytes = 0
        """What has arrived of bodies that are not all there yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and (refusal := self.refusal(int(declared), int(declared))) is not None:
            await refusal(scope, receive, send)
            return
        body = _ArrivingBody(self, scope, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.is_refused:
                raise
        finally:
            body.discount()

    def refusal(self, body_bytes: int, more_bytes: int) -> JSONResponse | None:
        """Return the answer to a body of so many bytes, if `more_bytes` of it cannot be taken in now."""
        if body_bytes > self._max_body_bytes:
            message = f"The request body is larger than {self._max_body_bytes} bytes (limits.max_body_bytes)."
            return _refusal(message, "BadRequestError", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {})
        if self.inflight_bytes + more_bytes > self._max_inflight_bytes:
            message = (
                f"The bodies of all requests that are arriving are larger than {self._max_inflight_bytes} bytes "
                "(limits.max_inflight_body_bytes); please retry later."
            )
            return _refusal(
                message, "RateLimitError", HTTPStatus.TOO_MANY_REQUESTS, {"retry-after": BODY_RETRY_AFTER_S}
            )
        return None

    def too_slow(self) -> JSONResponse:
        """Return the answer to a body that has not arrived in time."""
        message = f"The request body took longer than {self.timeout_s:g} s to arrive (limits.body_timeout_s)."
        return _refusal(message, "RequestTimeout", HTTPStatus.REQUEST_TIMEOUT, {"connection": "close"})


class _ArrivingBody:
    """The body of one request, between the client and the application."""

    def __init__(self, limit: BodyLimit, scope: Scope, receive: Receive, send: Send) -> None:
        self._limit = limit
        self._scope = scope
        self._receive = receive
        self._send = send
        self._deadline = asyncio.get_running_loop().time() + limit.timeout_s
        self._is_arriving = True
        self._is_answering = False
        self._num_bytes = 0
        """What has arrived."""
        self._num_counted = 0
        """What of it counts in `BodyLimit.inflight_bytes`."""
        self.is_refused = False

    async def receive(self) -> Message:
        if self.is_refused:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline if self._is_arriving else None):
                message = await self._receive()
        except TimeoutError:
            return await self._refuse(self._limit.too_slow())
        num_bytes = len(message.get("body", b""))
        self._num_bytes += num_bytes
        if not self._is_answering and (refusal := self._limit.refusal(self._num_bytes, num_bytes)) is not None:
            return await self._refuse(refusal)
        self._is_arriving = self._is_arriving and message.get("more_body", False)
        if self._is_arriving:
            self._num_counted += num_bytes
            self._limit.inflight_bytes += num_bytes
        else:
            self.discount()
        return message

    async def send(self, message: Message) -> None:
        self._is_answering = True
        if not self.is_refused:
            await self._send(message)

    def discount(self) -> None:
        """Let the body count no longer."""
        self._limit.inflight_bytes -= self._num_counted
        self._num_counted = 0

    async def _refuse(self, refusal: JSONResponse) -> Message:
        """Answer with `refusal`, and return what the application gets instead of the body."""
        self.is_refused = True
        self.discount()
        if not self._is_answering:
            await refusal(self._scope, self._receive, self._send)
        return {"type": "http.disconnect"}


def _refusal(message: str, kind: str, status: HTTPStatus, headers: Mapping[str, str]) -> JSONResponse:
    """Return an answer that comes before the body's end.

    The connection stays, and what still comes of the body is dropped: a client that sends it all before it looks for an
    answer, as OpenAI's does, would otherwise find only that its connection is gone.
    """
    metrics.REFUSED_BODIES.labels(str(status.value)).inc()
    return JSONResponse(error_body(message, kind, status), status_code=status, headers=dict(headers))


class RoutingHeaders:
    """Adds the headers whose content comes from the engine side of the request (request_context.py).

    They are an explanation, if the request had ``x-baton-explain: 1``, and ``Retry-After`` with a 429 or a 503.  This
    middleware has to be outside of `ErrorBeforeStream`, which starts an answer only when its first token is there or
    when none will come.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tenant: Tenant = scope["baton.tenant"]
        may_know = tenant.admin or not tenant.name  # it tells of replicas and of what others wait for
        wants_explanation = may_know and dict(scope["headers"]).get(EXPLAIN_HEADER) == b"1"
        with begin_request(tenant, wants_explanation=wants_explanation) as context:
            context.send = send

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
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        seconds = context.retry_after_s
        yield b"retry-after", REPLACED_S if seconds is None else str(seconds).encode("ascii")


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
                problem = f"{name} must be a number of seconds above 0."
                await error_response(scope, problem, "BadRequestError", 400, param=name)(scope, receive, send)
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


def is_anthropic(scope: Scope) -> bool:
    """Whether a request is one of Anthropic's API."""
    return "/v1/messages" in scope.get("path", "")


def error_response(
    scope: Scope,
    message: str,
    kind: str,
    status: int,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the answer to a request that is refused, in the format of its API."""
    body = _shaped(error_body(message, kind, status, param)["error"], scope)
    return JSONResponse(body, status_code=status, headers=headers)


def _shaped(error: dict[str, Any], scope: Scope) -> dict[str, Any]:
    """Return a response body for `error`: in Anthropic's format for /v1/messages, else in OpenAI's."""
    if is_anthropic(scope):
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
