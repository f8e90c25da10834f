"""Plain answers, streamed or whole, are what vLLM's server sends, byte for byte, and so is what engines are asked for.

The server is the real one, over an orchestrator that generates what the test wants.  Each request is served twice: once
as it is, and once by vLLM's server alone.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Send

from app.errors import DeadlineExceeded, InvalidRequest, NoReplica, Overloaded
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport, TokenDelta
from app.routing.decision import Decision, RoutingHints
from tests.unit.decisions import decision
from tests.unit.frontend.server import server_over

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = {
    "models": [{"name": "tiny", "source": "baton:tiny", "decode": {"engine": "sim"}}],
    "limits": {"max_field_bytes": 1024},
}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ERRORS = [
    NoReplica("decode"),
    Overloaded(2.0),
    InvalidRequest("it is odd"),
    DeadlineExceeded(),
    TimeoutError(),
    KeyError(),
]
TURNS = 60
"""Turns of the event loop after a delta, in which both servers send all that comes of it."""


class Script(msgspec.Struct):
    """What the engine does: these deltas, at once or one after another, and then perhaps an error."""

    deltas: list[TokenDelta]
    is_burst: bool = False
    error: Exception | None = None
    turns: int = TURNS


class ScriptedOrchestrator:
    def __init__(self) -> None:
        self.script = Script([])
        self.asked: list[tuple[GenerateRequest, RoutingHints]] = []
        self.was_cancelled = False
        self.waits = asyncio.Event()
        """Set when all of a script without an end has been done."""

    async def run(
        self,
        request: GenerateRequest,
        progress: SequenceProgress,
        *,
        hints: RoutingHints,
        on_decision: Callable[[Decision], object],
        deadline: float,
    ) -> None:
        request_id = _without_random_ids(request.request_id.encode()).decode()[:-9]  # vLLM adds eight random digits
        self.asked.append((msgspec.structs.replace(request, request_id=request_id), hints))
        on_decision(decision(others={}))
        try:
            for delta in self.script.deltas:
                progress.take(msgspec.structs.replace(delta, token_ids=list(delta.token_ids)))
                if not self.script.is_burst:
                    await turns(self.script.turns)
            if self.script.error is not None:
                raise self.script.error
            if not self.script.deltas or self.script.deltas[-1].finish_reason is None:
                self.waits.set()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


class Server:
    """vLLM's server, with plain answers or without."""

    def __init__(self, app: ASGIApp, orchestrator: ScriptedOrchestrator) -> None:
        self._app = app
        self.orchestrator = orchestrator

    async def answer(
        self,
        path: str,
        body: bytes,
        headers: dict[str, str],
        script: Script,
        *,
        leaves_after: int | None = None,
        leaves: asyncio.Event | None = None,
        send: Send | None = None,
    ) -> tuple[Any, ...]:
        """Return the answer's status, headers and body, and what the engine was asked for.

        The client leaves after so many messages, in its body if there are none, or when `leaves` is set.
        """
        self.orchestrator.script, self.orchestrator.asked, self.orchestrator.was_cancelled = script, [], False
        self.orchestrator.waits.clear()
        sent: list[Message] = []
        leaves = leaves or asyncio.Event()
        unread = [body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": leaves_after == 0}
            if leaves_after == 0:
                return {"type": "http.disconnect"}
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def keep(message: Message) -> None:
            sent.append(message)
            if len(sent) == leaves_after:
                leaves.set()

        all_headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        await self._app(
            {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "method": "POST",
                "scheme": "http",
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "root_path": "",
                "headers": [(name.encode(), value.encode()) for name, value in all_headers.items()],
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 80),
                "state": {},
            },
            receive,
            send or keep,
        )
        if leaves_after:
            return (self.orchestrator.was_cancelled,)
        start, *rest = sent
        whole = b"".join(message.get("body", b"") for message in rest)
        answered = [(name, re.sub(rb'"ttft_ms":[0-9.]+', b'"ttft_ms":0', value)) for name, value in start["headers"]]
        return start["status"], answered, _normalized(whole), self.orchestrator.asked


def _normalized(body: bytes) -> bytes:
    """Return the body without what differs from one answer to the next: times, and ids that a client does not give."""
    return _without_random_ids(re.sub(rb'"created":\d+', b'"created":0', body))


def _without_random_ids(text: bytes) -> bytes:
    return re.sub(rb"[0-9a-f]{16}", b"", text)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    orchestrator = ScriptedOrchestrator()
    async with server_over(orchestrator, CONFIG) as app:
        yield Server(app, orchestrator)


Both = Callable[..., Any]


@pytest.fixture(scope="module")
def both(server: Server) -> Both:
    """Return a function that compares both answers to a request, and returns whether it was plain."""
    from app.frontend.plain_answers import PlainAnswers

    to_plain = PlainAnswers._to_plain

    async def ask(
        path: str, body: bytes | dict[str, Any], script: Script, headers: dict[str, str] | None = None, **how: Any
    ) -> bool:
        found: list[object] = []

        async def watched(*arguments: Any) -> Any:
            found.append(await to_plain(*arguments))
            return found[-1]

        async def never(*arguments: Any) -> None:
            return None

        answers = []
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        for method in (watched, never):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(PlainAnswers, "_to_plain", method)
                try:
                    answers.append(await server.answer(path, raw, headers or {}, script, **how))
                except IndexError as error:  # vLLM's, where it asks for logprobs that a script does not have
                    answers.append((repr(error),))
        for ours, vllms in zip(*answers, strict=True):
            assert ours == vllms
        return bool(found and found[0])

    return ask


REPORT = PrefillReport("remote", "", "prefill-1", "decode-1", 48, 52, "shm")
TOKENS = st.lists(st.integers(0, 500), max_size=4)
DELTAS = st.lists(TOKENS.map(TokenDelta), max_size=6)
ENDS = st.sampled_from([("stop", None), ("stop", 7), ("length", None), ("abort", None), ("repetition", None)])


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    deltas = draw(DELTAS)
    has_report = draw(st.booleans())
    if deltas and has_report:
        deltas[0] = msgspec.structs.replace(deltas[0], report=REPORT)
    if draw(st.integers(0, 3)) == 0:
        return Script(deltas, draw(st.booleans()), draw(st.sampled_from(ERRORS)))
    reason, stop = draw(ENDS)
    last = TokenDelta(draw(TOKENS), finish_reason=reason, stop_reason=stop)  # type: ignore[arg-type]
    return Script([*deltas, last], draw(st.booleans()))


TEXT = st.text(max_size=40)
NUMBERS = st.one_of(st.none(), st.integers(-2, 3), st.floats(-1, 2), st.booleans())
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": NUMBERS,
    "min_p": NUMBERS,
    "seed": NUMBERS,
    "stop": st.one_of(st.none(), TEXT, st.lists(st.sampled_from(["a", "e", " t", "the", "", '"'] * 4), max_size=3)),
    "stop_token_ids": st.one_of(st.none(), st.lists(st.integers(0, 1000), max_size=2)),
    "include_stop_str_in_output": st.booleans(),
    "frequency_penalty": NUMBERS,
    "presence_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "ignore_eos": st.booleans(),
    "min_tokens": NUMBERS,
    "skip_special_tokens": st.booleans(),
    "logit_bias": st.one_of(st.none(), st.dictionaries(st.sampled_from(["1", "7", "x"]), NUMBERS, max_size=2)),
    "bad_words": st.lists(TEXT, max_size=2),
    "user": st.one_of(st.none(), TEXT),
    "session_id": st.one_of(st.none(), TEXT),
    "cache_salt": st.one_of(st.none(), TEXT),
    "request_id": TEXT,
    "max_tokens": st.one_of(st.none(), st.integers(-1, 40), st.just(10**6)),
}
ODD: dict[str, st.SearchStrategy[Any]] = {
    "n": st.sampled_from([None, 1, 2]),
    "logprobs": st.sampled_from([None, False, True, 1]),
    "echo": st.booleans(),
    "stream": st.sampled_from([None, False, "yes"]),
    "model": st.sampled_from([None, "tiny", "other"]),
    "stream_options": st.sampled_from([None, {}, {"continuous_usage_stats": True}, {"include_usage": False}, 1]),
    "priority": st.sampled_from([0, 1]),
    "response_format": st.sampled_from([None, {"type": "text"}, {"type": "json_object"}]),
    "tools": st.sampled_from([None, []]),
    "tool_choice": st.sampled_from([None, "none", "auto"]),
    "vllm_xargs": st.sampled_from([None, {}, {"baton_prefill": "local"}, {"session_id": "x"}]),
    "return_token_ids": st.booleans(),
    "suffix": st.sampled_from([None, "x"]),
    "use_beam_search": st.booleans(),
    "truncate_prompt_tokens": st.sampled_from([None, 3]),
    "add_special_tokens": st.booleans(),
    "stream_interval": st.sampled_from([None, 1, 3]),
    "no_such_field": st.just(1),
    "max_completion_tokens": st.sampled_from([None, 5]),
    "reasoning_effort": st.sampled_from([None, "low"]),
    "chat_template_kwargs": st.sampled_from([None, {}, {"enable_thinking": False}]),
}
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "system", "tool", "x"])},
    optional={
        "content": st.one_of(TEXT, TEXT, TEXT, st.none(), st.just([{"type": "text", "text": "part"}])),
        "name": st.just("ann"),
    },
)
PROMPTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    COMPLETIONS: st.fixed_dictionaries(
        {"prompt": st.one_of(TEXT, TEXT, st.lists(st.integers(0, 1000), max_size=4), st.just(["a"]), st.none())}
    ),
    CHAT: st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}),
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from([COMPLETIONS, CHAT]))
    stream = draw(st.sampled_from([{"stream": True}, {"stream": True}, {"stream": False}, {}]))
    body = {"model": "tiny", "max_tokens": 8, **stream, **draw(PROMPTS[path])}
    if body.get("stream") and draw(st.booleans()):
        body["stream_options"] = {"include_usage": True}
    for strategies, most in ((SAMPLING, 3), (ODD, draw(st.sampled_from([0, 0, 1, 2])))):
        for name in draw(st.lists(st.sampled_from(sorted(strategies)), max_size=most)):
            body[name] = draw(strategies[name])
    return path, body


HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "x-request-id": st.sampled_from(["mine", 'a"\\b', "é"]),
        "x-session-id": st.just("s"),
        "x-vllm-priority": st.sampled_from(["0", "3"]),
        "x-baton-timeout-s": st.just("5"),
        "x-baton-explain": st.just("1"),
        "endpoint-load-metrics-format": st.sampled_from(["", "text", "json"]),
        "content-type": st.sampled_from(["application/json; charset=utf-8", "Application/JSON", "text/plain"]),
    },
)
PLAIN = {"model": "tiny", "prompt": "hi", "stream": True, "max_tokens": 4}
WHOLE = {**PLAIN, "stream": False}
TWO = Script([TokenDelta([20], report=REPORT), TokenDelta([21, 22], finish_reason="length")])


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests(), HEADERS, scripts())
async def test_any_request_is_answered_as_by_vllm(
    both: Both, request_: tuple[str, dict[str, Any]], headers: dict[str, str], script: Script
) -> None:
    await both(*request_, script, headers)


PLAIN_BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, PLAIN),
    (COMPLETIONS, {**PLAIN, "prompt": [1, 2, 3], "stream_options": {"include_usage": True}, "temperature": 0, "n": 1}),
    (COMPLETIONS, {**PLAIN, "stop": ["e"], "logprobs": None, "echo": False, "user": "ann"}),
    (COMPLETIONS, {**PLAIN, "prompt": "long " * 5000, "max_tokens": 1}),
    (CHAT, {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]}),
    (
        CHAT,
        {
            "model": "tiny",
            "stream": True,
            "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
            "max_completion_tokens": 3,
            "stream_options": {"include_usage": True},
            "tools": None,
        },
    ),
]


@pytest.mark.parametrize(("path", "body"), PLAIN_BODIES)
async def test_what_most_clients_send_is_plain(both: Both, path: str, body: dict[str, Any]) -> None:
    assert await both(path, body, TWO)
    whole = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    assert await both(path, whole, TWO)
    assert await both(path, {**whole, "stream": False}, TWO)


@pytest.mark.parametrize(
    "text",
    [b'"\x01"', b'"\xff"', b'"\\ud800"', b'"\\ud83d\\ude00"', b"NaN", b"1e999", b"[1.0]", b"[true]", b"[-0]", b""],
)
async def test_odd_json_is_answered_as_by_vllm(both: Both, text: bytes) -> None:
    for stream in (b"true", b"false"):
        await both(COMPLETIONS, b'{"model":"tiny","stream":' + stream + b',"prompt":' + text + b"}", TWO)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_error_of_a_whole_answer_is_answered_as_by_vllm(both: Both, path: str, error: Exception) -> None:
    prompt = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    assert await both(path, {"model": "tiny", "max_tokens": 4, **prompt}, Script([TokenDelta([20])], error=error))


@pytest.mark.parametrize("name", ["endpoint-load-metrics-format", "x-vllm-priority"])
async def test_a_header_that_only_vllm_heeds_leaves_the_request_to_it(both: Both, name: str) -> None:
    assert not await both(COMPLETIONS, WHOLE, TWO, {name: "1" if name == "x-vllm-priority" else "text"})


async def test_a_client_that_leaves_cancels_its_sequence(both: Both, server: Server) -> None:
    assert await both(COMPLETIONS, PLAIN, Script([TokenDelta([20])] * 3), leaves_after=2)
    assert server.orchestrator.was_cancelled


async def test_a_client_that_leaves_before_its_whole_answer_cancels_the_sequence(server: Server) -> None:
    leaves = asyncio.Event()
    answer = await _awaited_whole_answer(server, leaves)
    leaves.set()
    assert (await answer)[0] == 400
    assert server.orchestrator.was_cancelled


@pytest.mark.parametrize("is_plain", [True, False])
async def test_a_whole_answer_that_serve_cancels_is_counted_as_by_vllm(server: Server, *, is_plain: bool) -> None:
    from app.frontend.plain_answers import PlainAnswers

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def never(*_: Any) -> None:
        return None

    with pytest.MonkeyPatch.context() as patch:
        if not is_plain:
            patch.setattr(PlainAnswers, "_to_plain", never)
        answer = await _awaited_whole_answer(server, asyncio.Event(), send)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
    assert server.orchestrator.was_cancelled
    assert [message.get("status") for message in sent] == [400, None]
    assert b'"Client disconnected"' in sent[1]["body"]


async def _awaited_whole_answer(
    server: Server, leaves: asyncio.Event, send: Send | None = None
) -> asyncio.Task[tuple[Any, ...]]:
    """Ask for a whole answer that never ends, and return when the engine has done what it does of it."""
    server.orchestrator.waits.clear()
    asking = server.answer(
        COMPLETIONS, json.dumps(WHOLE).encode(), {}, Script([TokenDelta([20])]), leaves=leaves, send=send
    )
    answer = asyncio.create_task(asking)
    await asyncio.wait_for(server.orchestrator.waits.wait(), 60)
    return answer


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_answered_as_by_vllm(both: Both) -> None:
    assert not await both(COMPLETIONS, PLAIN, TWO, leaves_after=0)


@pytest.mark.parametrize(("spaces", "is_plain"), [(1_000, True), (300_000, False)])
async def test_a_body_that_is_too_long_is_left_to_vllm(both: Both, spaces: int, is_plain: bool) -> None:
    assert await both(COMPLETIONS, json.dumps(PLAIN).encode() + b" " * spaces, TWO) == is_plain


async def test_a_server_that_takes_nothing_more_gets_nothing_more_and_is_told_its_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 2:
            raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        await server.answer(COMPLETIONS, json.dumps(PLAIN).encode(), {}, Script([TokenDelta([20])] * 3), send=send)
    assert len(sent) == 2
    assert server.orchestrator.was_cancelled
    assert "failed" not in caplog.text


async def test_an_error_of_ours_is_said_once_and_the_request_is_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from app.frontend.vllm_answers_surface import PlainApi

    monkeypatch.setattr(PlainApi, "sampling_params", lambda *_: vars(PlainApi)["no such"])
    monkeypatch.setattr(logging.getLogger("baton"), "propagate", True)
    for _ in range(2):
        assert (await server.answer(COMPLETIONS, json.dumps(PLAIN).encode(), {}, TWO))[0] == 200
    assert caplog.text.count("a request is left to vLLM's server") == 1


@pytest.mark.parametrize("is_safe", [True, False])
async def test_a_tokenizer_that_is_for_one_thread_is_used_in_vllms_thread_alone(*, is_safe: bool) -> None:
    """Encoding with another `truncate_prompt_tokens` changes what vLLM's other tokenizers do next."""
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

    from app.frontend.vllm_answers_surface import PlainCompletions

    class Renderer:
        tokenizer = ThreadSafeHFTokenizerMixin() if is_safe else object()

        def render_cmpl(self, *_: Any, **__: Any) -> list[str]:
            return ["here"]

        async def render_cmpl_async(self, *_: Any, **__: Any) -> list[str]:
            return ["there"]

    api = PlainCompletions(SimpleNamespace(renderer=Renderer(), model_config=SimpleNamespace(is_encoder_decoder=False)))
    request = SimpleNamespace(prompt=[1], cache_salt=None, build_tok_params=lambda _: None)
    assert await api.render(request, is_short=True) == ("here" if is_safe else "there")


class Shouts:
    """A middleware of a user's that changes every part of a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        async def shout(message: Message) -> None:
            await send({**message, "body": message["body"].upper()} if "body" in message else message)

        await self._app(scope, receive, shout)


async def test_a_users_middleware_gets_every_part_of_a_stream() -> None:
    orchestrator = ScriptedOrchestrator()
    model = {**CONFIG["models"][0], "server_args": {"middleware": [f"{__name__}.Shouts"]}}  # type: ignore[index]
    deltas = [TokenDelta([20]), TokenDelta([21]), TokenDelta([22]), TokenDelta([23], finish_reason="length")]
    async with server_over(orchestrator, {"models": [model]}) as app:
        body = json.dumps({**PLAIN, "max_tokens": 4}).encode()
        _, _, answered, _ = await Server(app, orchestrator).answer(COMPLETIONS, body, {}, Script(deltas))
    assert answered.count(b"DATA: ") == 5
    assert answered == answered.upper()


# What a plain answer costs, in instructions of Python's interpreter: the same on every machine

COSTS = {"3.11": {"stream": {"request": 19525, "token": 1497}, "whole": {"request": 19202, "token": 1065}}}
"""By version of Python: what the frontend's side of a plain answer takes, the router and the channel apart.  A change
that makes it cheaper lowers the number here too."""
NUM_TOKENS = 64


def _counted(count: list[int]) -> Any:
    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "/prometheus_" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count[0] += event == "opcode"
        return trace

    return trace


async def _instructions(server: Server, fields: dict[str, Any], script: Script) -> int:
    """Return how many instructions the answer takes."""
    body = json.dumps({**fields, "max_tokens": NUM_TOKENS}).encode()
    for _ in range(2):  # the first time some things are made that later ones find
        count = [0]
        before = sys.gettrace()
        gc.disable()
        sys.settrace(_counted(count))
        try:
            await server.answer(COMPLETIONS, body, {}, script)
        finally:
            sys.settrace(before)
            gc.enable()
    return count[0]


@pytest.mark.parametrize(
    ("kind", "fields"), [("stream", {**PLAIN, "stream_options": {"include_usage": True}}), ("whole", WHOLE)]
)
async def test_a_plain_answer_takes_no_more_instructions_than_before(
    server: Server, request: pytest.FixtureRequest, kind: str, fields: dict[str, Any]
) -> None:
    """The instructions of the stand-ins for engine and client are among them, and do not change.

    Log lines and metrics are not counted: which there are depends on what other tests have set up in this process.
    """
    logging.disable(logging.CRITICAL)
    request.addfinalizer(partial(logging.disable, logging.NOTSET))
    deltas = [TokenDelta([20]) for _ in range(NUM_TOKENS - 1)]
    one_by_one = Script([*deltas, TokenDelta([20], finish_reason="length")], turns=3)
    at_once = Script([TokenDelta([20] * NUM_TOKENS, finish_reason="length")], turns=3)
    all_tokens = await _instructions(server, fields, at_once)
    token = (await _instructions(server, fields, one_by_one) - all_tokens) / (NUM_TOKENS - 1)
    now = {"request": all_tokens, "token": round(token)}
    print(now)
    costs = COSTS.get(f"{sys.version_info.major}.{sys.version_info.minor}")
    if costs is None:
        pytest.skip(f"no costs are known for this version of Python; now they are {now}")
    before = costs[kind]
    changes = [number / before[what] for what, number in now.items()]
    assert all(0.95 <= change <= 1.05 for change in changes), f"it took {before} instructions, and now takes {now}"
