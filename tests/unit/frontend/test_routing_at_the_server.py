"""What a client of vLLM's server gets of routing: explanations, its session's replica, and 429 under overload.

The server is the real one, over an orchestrator that says what the test wants.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from app.background import is_watched
from app.engines.vllm import samples_first_token
from app.errors import Asleep, DeadlineExceeded, InvalidRequest, NoReplica, Overloaded, Quarantined
from app.frontend.http_middleware import error_body
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport, TokenDelta
from app.routing.decision import Candidate, Decision, RoutingHints
from tests.unit.decisions import decision
from tests.unit.frontend.server import server_over

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONFIG = {
    "models": [{"name": "tiny", "source": "baton:tiny", "decode": {"engine": "sim"}, "vllm_xargs": ["other"]}],
}
EXPLAIN = {"x-baton-explain": "1"}
TTFT_S = 0.02
REPORT = PrefillReport("remote", "", "prefill-1", "decode-1", 48, 52, "shm")
OTHER = Candidate("decode-2", 0, 0, {"prefix": 0.0}, 0.0)
MESSAGES = [{"role": "user", "content": "hi"}]
APIS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 2},
}
USER: dict[str, dict[str, Any]] = {
    "/v1/completions": {"user": "ann"},
    "/v1/chat/completions": {"user": "ann"},
    "/v1/responses": {"user": "ann"},
    "/v1/messages": {"metadata": {"user_id": "ann"}},
}
STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class FakeOrchestrator:
    """Serves two tokens, or fails before or between them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.fails: Exception | None = None
        self.is_late = False
        """Whether it fails after the first token."""
        self.num_decisions = 1
        self.hints: list[RoutingHints] = []
        self.deadlines: list[float] = []
        """The seconds until each sequence must have ended."""
        self.requests: list[GenerateRequest] = []

    async def run(
        self,
        request: GenerateRequest,
        progress: SequenceProgress,
        *,
        hints: RoutingHints,
        on_decision: Callable[[Decision], object],
        deadline: float,
    ) -> None:
        self.hints.append(hints)
        self.deadlines.append(deadline - time.monotonic())
        self.requests.append(request)
        if self.fails and not self.is_late:
            raise self.fails
        for _ in range(self.num_decisions):
            on_decision(decision(others={"decode": [OTHER]} if hints.explain else {}))
        await asyncio.sleep(TTFT_S)
        progress.take(TokenDelta([20], report=REPORT))
        await asyncio.sleep(0.001)
        if self.fails:
            raise self.fails
        progress.take(TokenDelta([21], finish_reason="length"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ASGIApp, FakeOrchestrator]]:
    orchestrator = FakeOrchestrator()
    async with server_over(orchestrator, CONFIG) as app:
        yield app, orchestrator


@pytest.fixture
def orchestrator(served: tuple[ASGIApp, FakeOrchestrator]) -> FakeOrchestrator:
    served[1].reset()
    return served[1]


Ask = Callable[..., Any]


@pytest.fixture
def ask(served: tuple[ASGIApp, FakeOrchestrator], orchestrator: FakeOrchestrator) -> Ask:
    async def post(path: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        transport = httpx.ASGITransport(served[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
            body = {"model": "tiny", **APIS[path], **fields}
            return await client.post(path, json=body, headers=headers)

    return post


def explanation(response: httpx.Response) -> list[dict[str, Any]]:
    explanations: list[dict[str, Any]] = json.loads(response.headers["x-baton-explain"])
    return explanations


# Explanations


@STREAM
@pytest.mark.parametrize("path", APIS)
async def test_an_answer_explains_itself_on_request(ask: Ask, path: str, stream: bool) -> None:
    response = await ask(path, EXPLAIN, stream=stream)
    assert response.status_code == 200, response.text
    (said,) = explanation(response)
    assert (said["kind"], said["reason"], said["attempts"], said["decided_us"]) == ("remote", "faster", 1, 120.0)
    assert (said["prefill"]["replica"], said["decode"]["replica"]) == ("prefill-1", "decode-1")
    assert said["expected"]["cached_tokens"] == 64
    assert said["actual"]["cached_tokens"] == 48
    assert said["actual"]["ttft_ms"] >= TTFT_S * 1e3
    assert [other["replica"] for other in said["others"]["decode"]] == ["decode-2"]
    assert response.headers["content-type"].startswith("text/event-stream" if stream else "application/json")


@STREAM
async def test_every_sequence_is_explained(ask: Ask, stream: bool) -> None:
    response = await ask("/v1/completions", EXPLAIN, stream=stream, prompt=["hi", "there"], n=2)
    assert len(explanation(response)) == 4


async def test_only_the_attempt_that_served_is_explained(ask: Ask, orchestrator: FakeOrchestrator) -> None:
    orchestrator.num_decisions = 3
    (said,) = explanation(await ask("/v1/completions", EXPLAIN))
    assert said["attempts"] == 3


@STREAM
@pytest.mark.parametrize("value", [None, "", "0", "true", "11", "1, 1", "yes"])
async def test_nothing_else_asks_for_an_explanation(
    ask: Ask, orchestrator: FakeOrchestrator, value: str | None, stream: bool
) -> None:
    headers = {} if value is None else {"x-baton-explain": value}
    response = await ask("/v1/completions", headers, stream=stream)
    assert response.status_code == 200
    assert "x-baton-explain" not in response.headers
    assert [hints.explain for hints in orchestrator.hints] == [False]


async def test_requests_at_the_same_time_keep_their_explanations_apart(ask: Ask) -> None:
    responses = await asyncio.gather(
        ask("/v1/completions", EXPLAIN, n=2), ask("/v1/completions"), ask("/v1/chat/completions", EXPLAIN, n=3)
    )
    counts = [len(explanation(each)) if "x-baton-explain" in each.headers else 0 for each in responses]
    assert counts == [2, 0, 3]


# Sessions


@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("headers", "has_user", "session"),
    [
        ({}, False, None),
        ({}, True, "ann"),
        ({"X-Session-ID": "s1"}, False, "s1"),
        ({"X-Session-ID": "s1"}, True, "s1"),
    ],
    ids=["none", "user", "header", "header before user"],
)
async def test_the_session_is_the_headers_or_else_the_user(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, headers: dict[str, str], has_user: bool, session: str | None
) -> None:
    response = await ask(path, headers, **(USER[path] if has_user else {}))
    assert response.status_code == 200
    assert [hints.session for hints in orchestrator.hints] == [session]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_vllms_own_field_goes_before_the_user(ask: Ask, orchestrator: FakeOrchestrator, path: str) -> None:
    await ask(path, user="ann", session_id="s2")
    assert [hints.session for hints in orchestrator.hints] == ["s2"]


@pytest.mark.parametrize("metadata", [None, {}, {"user_id": 7}, {"user_id": None}, {"user_id": ""}])
async def test_metadata_without_a_user_is_no_session(ask: Ask, orchestrator: FakeOrchestrator, metadata: Any) -> None:
    response = await ask("/v1/messages", metadata=metadata)
    assert response.status_code == 200
    assert [hints.session for hints in orchestrator.hints] == [None]


# Service classes


@STREAM
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("tier", "service_class"),
    [("priority", "priority"), ("flex", "flex"), ("auto", "default"), ("default", "default"), ("scale", "default")],
)
async def test_the_service_tier_is_the_class_in_which_a_request_waits(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, tier: str, service_class: str, stream: bool
) -> None:
    response = await ask(path, service_tier=tier, stream=stream)
    assert response.status_code == 200
    assert [hints.service_class for hints in orchestrator.hints] == [service_class]


@pytest.mark.parametrize("tier", ["nonsense", 7, ["flex"], {"flex": 1}, None])
async def test_a_tier_that_there_is_not_is_the_default_class(
    ask: Ask, orchestrator: FakeOrchestrator, tier: Any
) -> None:
    response = await ask("/v1/completions", service_tier=tier)
    assert response.status_code == 200
    assert [hints.service_class for hints in orchestrator.hints] == ["default"]


@pytest.mark.parametrize("path", APIS)
async def test_who_asks_for_no_tier_waits_in_the_default_class(
    ask: Ask, orchestrator: FakeOrchestrator, path: str
) -> None:
    await ask(path)
    assert [hints.service_class for hints in orchestrator.hints] == ["default"]


# Failures


def said_error(path: str, response: httpx.Response) -> dict[str, Any]:
    """The error that a body of the API at `path` holds."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    error: dict[str, Any] = body["error"]
    if path == "/v1/messages":
        assert body == {"type": "error", "error": {"type": error["type"], "message": error["message"]}}
    else:
        assert body == error_body(error["message"], error["type"], response.status_code, error["param"])
    return error


@STREAM
@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(("waits_s", "told"), [(0.0, "1"), (0.3, "1"), (2.0, "2"), (2.1, "3")])
async def test_overload_is_a_429_that_says_when_to_come_back(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, stream: bool, waits_s: float, told: str
) -> None:
    orchestrator.fails = Overloaded(waits_s)
    response = await ask(path, stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == told
    assert said_error(path, response)["type"] == "Too Many Requests"


@STREAM
@pytest.mark.parametrize("path", [path for path in APIS if path != "/v1/messages"])  # vLLM logs any failure there
async def test_overload_does_not_fill_the_log(
    ask: Ask, orchestrator: FakeOrchestrator, caplog: pytest.LogCaptureFixture, path: str, stream: bool
) -> None:
    orchestrator.fails = Overloaded(1)
    await ask(path, stream=stream)
    assert not [record for record in caplog.records if record.exc_info]


@STREAM
async def test_of_several_sequences_the_longest_wait_is_told(
    ask: Ask, orchestrator: FakeOrchestrator, stream: bool
) -> None:
    orchestrator.fails = Overloaded(5)
    response = await ask("/v1/completions", stream=stream, n=3)
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")


@STREAM
@pytest.mark.parametrize("path", APIS)
async def test_a_model_that_does_not_wake_in_time_is_a_503_that_says_when_to_come_back(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, stream: bool
) -> None:
    orchestrator.fails = Asleep(41.2)
    response = await ask(path, stream=stream)
    assert (response.status_code, response.headers.get_list("retry-after")) == (503, ["42"])
    assert "still waking up" in said_error(path, response)["message"]


@STREAM
@pytest.mark.parametrize("path", APIS)
@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (NoReplica("decode"), 503),
        (InvalidRequest("bad"), 400),
        (Quarantined(2, 600), 400),
        (TimeoutError(), 504),
        (DeadlineExceeded(), 504),
        (RuntimeError("inside"), 500),
    ],
    ids=["503", "400", "quarantined", "504", "deadline", "500"],
)
async def test_any_failure_before_the_first_token_has_its_status(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, stream: bool, failure: Exception, status: int
) -> None:
    orchestrator.fails = failure
    response = await ask(path, EXPLAIN, stream=stream)
    assert response.status_code == status
    assert response.headers.get("retry-after") == ("5" if status == 503 else None)
    assert "inside" not in said_error(path, response)["message"]


@STREAM
@pytest.mark.parametrize("path", APIS)
async def test_a_first_token_that_cannot_be_processed_is_a_failure_before_any_output(
    ask: Ask, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer

    monkeypatch.setattr(BaseIncrementalDetokenizer, "update", fail)
    response = await ask(path, stream=stream)
    assert response.status_code == 500
    assert "inside" not in said_error(path, response)["message"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"logprobs": 2}),
        ("/v1/completions", {"logprobs": 1, "echo": True}),
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2}),
    ],
    ids=["logprobs", "of the prompt", "beam search"],
)
async def test_a_first_output_that_vllm_fails_to_render_has_its_status(
    ask: Ask, path: str, asked: dict[str, Any]
) -> None:
    """The engine gives no logprobs.  Nothing fails on Baton's side: the status is in the stream's first event only."""
    response = await ask(path, stream=True, **asked)
    assert response.status_code == 500
    assert said_error(path, response)["type"] == "InternalServerError"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(
    ("failure", "said"), [(NoReplica("decode"), "please retry"), (DeadlineExceeded(), "limits.max_request_s")]
)
async def test_a_failure_after_the_first_token_leaves_the_stream_its_status(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, failure: Exception, said: str
) -> None:
    orchestrator.fails, orchestrator.is_late = failure, True
    response = await ask(path, stream=True)
    assert response.status_code == 200
    # vLLM's converter to Anthropic's events does not understand the error's and says so.
    assert ("event: error" if path == "/v1/messages" else said) in response.text


@STREAM
async def test_a_prompt_that_vllm_refuses_has_its_status(ask: Ask, stream: bool) -> None:
    response = await ask("/v1/completions", EXPLAIN, stream=stream, vllm_xargs={"baton_prefill": "nowhere"})
    assert response.status_code == 400
    assert "remote" in said_error("/v1/completions", response)["message"]


async def test_the_prefill_mode_is_batons_and_no_sampling_parameter(ask: Ask, orchestrator: FakeOrchestrator) -> None:
    await ask("/v1/completions", vllm_xargs={"baton_prefill": "local", "other": 1})
    (request,) = orchestrator.requests
    assert request.prefill_mode == "local"
    assert request.sampling["extra_args"] == {"other": 1}


FORCED = {"vllm_xargs": {"baton_prefill": "remote"}}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", FORCED),
        ("/v1/chat/completions", {}),
        ("/v1/chat/completions", FORCED),
        ("/v1/responses", {}),
        ("/v1/messages", {}),
    ],
)
async def test_prefill_may_sample_the_first_token_of_a_usual_request(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, asked: dict[str, Any]
) -> None:
    await ask(path, **asked)
    (request,) = orchestrator.requests
    assert samples_first_token(request.sampling)


async def test_a_responses_stream_begins_with_its_first_event(ask: Ask) -> None:
    response = await ask("/v1/responses", stream=True)
    assert response.text.startswith("event: response.created\n")
    assert response.text.count("event: response.created\n") == response.text.count("event: response.completed\n") == 1


# Deadlines


@STREAM
@pytest.mark.parametrize("path", APIS)
async def test_a_client_may_shorten_the_time_that_its_request_has_in_all(
    ask: Ask, orchestrator: FakeOrchestrator, path: str, stream: bool
) -> None:
    assert (await ask(path, {"x-baton-timeout-s": "12.5"}, stream=stream)).status_code == 200
    assert (await ask(path, {"x-baton-timeout-s": "100000"}, stream=stream)).status_code == 200
    assert (await ask(path, stream=stream)).status_code == 200
    short, long, usual = orchestrator.deadlines
    assert 2.5 < short < 12.5
    assert 3590 < long < 3600
    assert 3590 < usual < 3600


@pytest.mark.parametrize("path", APIS)
async def test_a_deadline_that_is_no_time_is_a_400_that_names_the_header(
    ask: Ask, orchestrator: FakeOrchestrator, path: str
) -> None:
    response = await ask(path, {"x-baton-timeout-s": "soon"})
    assert response.status_code == 400
    assert "x-baton-timeout-s" in said_error(path, response)["message"]
    assert orchestrator.requests == []


async def test_who_killed_engines_is_not_told_to_try_again(ask: Ask, orchestrator: FakeOrchestrator) -> None:
    orchestrator.fails = Quarantined(2, 600)
    message = said_error("/v1/completions", await ask("/v1/completions"))["message"]
    assert "2 engines died" in message
    assert "retry" not in message


async def test_vllms_server_runs_no_task_that_nobody_watches(ask: Ask) -> None:
    await ask("/v1/completions")
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    # The one that waited for the client to leave is cancelled with the answer, and ends in the loop's next turn.
    assert [task for task in tasks if not is_watched(task) and not task.cancelling()] == []
