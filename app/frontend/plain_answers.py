"""Serves plain answers with little CPU: the text of one sequence and nothing else, streamed or whole, as most
requests want it.

vLLM's server takes some 50 µs for each token of a stream and over a millisecond for each request.  Here a request is
parsed, checked, rendered and turned into sampling parameters by vLLM's own classes, but without FastAPI around them;
its text comes from vLLM's detokenizer without the objects in between, and its answer is bytes around that text.  What
a client gets is the same, byte for byte (tests/unit/frontend/test_plain_answers.py).

A request that asks for anything else, or that is refused before an engine is asked, is served by vLLM's server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BatonError
from app.frontend.answer_frames import AnswerFrames, FrameCache, stream_frames, text_as_json, whole_frames
from app.frontend.answer_text import AnswerText
from app.frontend.engine_client import EngineRequest, PooledEngineClient
from app.frontend.http_middleware import route_path
from app.frontend.request_body import read_body, replay_body
from app.frontend.request_context import current_request
from app.frontend.vllm_answers_surface import LOAD_FORMAT_HEADER, PRIORITY_HEADER, PlainApi
from app.frontend.vllm_surface import GenerationError, create_error_response

logger = logging.getLogger("baton.plain_answers")

SHORT_BYTES = 4 * 1024
"""A body of so many bytes is tokenized at once, which takes about a millisecond; a longer one would keep all other
streams waiting for longer than a switch to a thread and back is worth."""
LONGEST_BYTES = 256 * 1024
"""A longer body is left to vLLM's server: if it were not plain, it would be parsed twice, some milliseconds each."""
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")
_ODD_HEADERS = {PRIORITY_HEADER.lower().encode(), LOAD_FORMAT_HEADER.encode()}


class PlainRequest(msgspec.Struct, frozen=True):
    """A request that is to be served here."""

    api: PlainApi
    is_stream: bool
    frames: FrameCache
    first_frames: AnswerFrames
    """Those of before the sequence's end."""
    request_id: str
    session: str | None
    engine_request: EngineRequest


class PlainAnswers:
    """Stands between vLLM's middlewares and its routes."""

    def __init__(
        self, app: ASGIApp, apis: dict[str, PlainApi], engine: PooledEngineClient, *, skips_middlewares: bool
    ) -> None:
        """`apis` holds the APIs with plain answers by their path.

        `skips_middlewares` says that no middleware does anything to the parts of a body between the first and the last.
        """
        self._app = app
        self._apis = apis
        self._engine = engine
        self._skips_middlewares = skips_middlewares
        self._warned_of: set[type[Exception]] = set()
        self._frames = {
            (api, is_stream, includes_usage): FrameCache(
                partial(api.example, is_stream=is_stream, includes_usage=includes_usage),
                partial(stream_frames, num_before=api.num_events_before_text) if is_stream else whole_frames,
            )
            for api in apis.values()
            for is_stream, includes_usage in ((True, False), (True, True), (False, False))
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        api = self._apis.get(route_path(scope)) if _posts_json(scope) else None
        if api is None or (body := await read_body(receive)) is None:
            await self._app(scope, receive, send)
        elif (plain := await self._to_plain(api, Request(scope), body)) is None:
            await self._app(scope, replay_body(body, receive), send)
        else:
            await self._serve(plain, receive, send)

    async def _to_plain(self, api: PlainApi, raw_request: Request, body: bytes) -> PlainRequest | None:
        """Return the request if it is plain.  Whatever is wrong with it, vLLM's server will tell the client."""
        if len(body) > LONGEST_BYTES:
            return None
        try:
            request = api.parse(body)
            if not api.is_plain(request):
                return None
            prompt = await api.render(request, is_short=len(body) <= SHORT_BYTES)
            request_id = api.request_id(request, raw_request)
            engine_request = self._engine.prepare(
                prompt, api.sampling_params(request, prompt), request_id + api.engine_id_suffix
            )
            is_stream = bool(request.stream)
            frames = self._frames[api, is_stream, api.includes_usage(request)]
            first_frames = await frames.get("length", None)
            session = api.session(request, raw_request)
            return PlainRequest(api, is_stream, frames, first_frames, request_id, session, engine_request)
        except (ValueError, BatonError):
            return None
        except Exception as error:
            if type(error) not in self._warned_of:  # without a fault of ours, vLLM's server says the same to the client
                self._warned_of.add(type(error))
                logger.warning("a request is left to vLLM's server, as others like it will be", exc_info=True)
            return None

    async def _serve(self, plain: PlainRequest, receive: Receive, send: Send) -> None:
        text = AnswerText(plain.api.detokenizer(plain.engine_request.core), is_whole=not plain.is_stream)
        gone = asyncio.create_task(_until_disconnected(receive))
        gone.add_done_callback(lambda _: text.fail(_ClientGone()))
        try:
            await (self._stream if plain.is_stream else self._answer)(plain, text, send)
        except _ClientGone:
            pass
        except _NotSent as problem:
            raise problem.reason from None
        finally:
            gone.cancel()

    async def _answer(self, plain: PlainRequest, text: AnswerText, send: Send) -> None:
        """Send a whole answer, or raise the error that vLLM's handlers of errors answer."""
        values = _values(plain)
        try:
            async with self._engine.running(plain.engine_request, text, plain.session):
                values["text"] = text_as_json(await text.get())
                current_request().has_output = True
        except (_ClientGone, asyncio.CancelledError):
            gone = create_error_response("Client disconnected")  # as vLLM's server: nobody gets it, but it is counted
            await _send_json(gone.error.code, gone.model_dump_json().encode(), send)
            raise
        await _send_json(200, await _ending(plain, text, values), send)

    async def _stream(self, plain: PlainRequest, text: AnswerText, send: Send) -> None:
        later = current_request().send if self._skips_middlewares else None
        way = send

        async def deliver(message: Message) -> None:
            nonlocal way
            try:
                await way(message)
            except Exception as error:
                raise _NotSent(error) from error
            way = later or send

        values = _values(plain)
        # A list of its own: vLLM's middlewares add to it.
        await send({"type": "http.response.start", "status": 200, "headers": [EVENT_STREAM]})
        try:
            async with self._engine.running(plain.engine_request, text, plain.session):
                end = await _send_texts(text, plain.first_frames, values, deliver)
            end += await _ending(plain, text, values)
        except (_ClientGone, _NotSent):
            raise
        except Exception as error:  # noqa: BLE001  as in vLLM's generators
            end = _error_events(plain, error)
        await send({"type": "http.response.body", "body": end, "more_body": False})


class _ClientGone(Exception):
    """The client has closed its connection."""


class _NotSent(Exception):
    """The server did not take a part of the answer."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _posts_json(scope: Scope) -> bool:
    """Whether the request has JSON as its body, and no header that only vLLM's server heeds."""
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    content_type = b""
    for name, value in scope["headers"]:
        if name in _ODD_HEADERS:
            return False
        if name == b"content-type":
            content_type = content_type or value
    return content_type.partition(b";")[0].lower() == b"application/json"


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _values(plain: PlainRequest) -> dict[str, bytes]:
    return {"id": text_as_json(plain.request_id), "created": b"%d" % time.time()}


async def _send_json(status: int, body: bytes, send: Send) -> None:
    headers = [(b"content-length", b"%d" % len(body)), JSON]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_texts(stream: AnswerText, frames: AnswerFrames, values: dict[str, bytes], send: Send) -> bytes:
    """Send the events of all texts but the last.  Returns what has to be sent before that."""
    context = current_request()
    waiting = frames.first.fill(values)
    before, after = frames.middle.around_text(values)
    while True:
        values["text"] = text = text_as_json(await stream.get())
        context.has_output = True
        if stream.finish_reason is not None:
            return waiting
        event = waiting + before + text + after if stream.num_tokens else waiting
        if event:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            waiting = b""


async def _ending(plain: PlainRequest, text: AnswerText, values: dict[str, bytes]) -> bytes:
    """Return the events with which a stream ends, from its last text on, or the whole answer."""
    assert text.finish_reason is not None
    frames = await plain.frames.get(text.finish_reason, text.stop_reason)
    num_prompt, num_tokens = len(plain.engine_request.generate.prompt_token_ids), text.num_tokens
    values |= {
        "prompt_tokens": b"%d" % num_prompt,
        "completion_tokens": b"%d" % num_tokens,
        "total_tokens": b"%d" % (num_prompt + num_tokens),
        "cached_tokens": b"%d" % text.cached_tokens,
    }
    return (frames.last.fill(values) if num_tokens else b"") + frames.tail.fill(values)


def _error_events(plain: PlainRequest, error: Exception) -> bytes:
    is_expected = isinstance(error, GenerationError)
    if not is_expected:
        logger.error("request_id=%s failed", plain.request_id, exc_info=error)
    return f"data: {plain.api.error_event(error, is_expected=is_expected)}\n\ndata: [DONE]\n\n".encode()
