"""Two pure ASGI middlewares that vLLM's server lacks."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API shapes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class BodyLimit:
    """Answers 413 to a body over `max_body_bytes`, declared or not, before anything parses it."""

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


class ErrorBeforeStream:
    """Turns an event stream whose first event is an error into a plain response with that error's status.

    vLLM starts a streamed answer with 200 before it asks the engine; what fails before the first token could
    still have had its status.  The start of a stream is held back until its first event is there.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: Message | None = None
        is_replaced = False

        async def inspecting_send(message: Message) -> None:
            nonlocal held, is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start" and _is_event_stream(message):
                held = message
                return
            if held is not None and message["type"] == "http.response.body":
                start, held = held, None
                if (error := _first_error(message.get("body", b""))) is not None:
                    is_replaced = True
                    await JSONResponse(error, status_code=error["error"]["code"])(scope, receive, send)
                    return
                await send(start)
            await send(message)

        await self._app(scope, receive, inspecting_send)


def _is_event_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _first_error(body: bytes) -> dict[str, Any] | None:
    """The error in a stream's first bytes, if that is what they are."""
    for line in body.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                event = json.loads(line.removeprefix(b"data: "))
            except ValueError:  # not all of the event, or none of ours
                return None
            error = event.get("error")
            if isinstance(error, dict) and isinstance(error.get("code"), int) and 400 <= error["code"] < 600:
                return {"error": error}
            return None
    return None
