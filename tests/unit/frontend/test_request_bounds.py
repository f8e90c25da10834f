"""What one request may ask for, at vLLM's own server: more is refused by name, before anything is done for it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

import httpx
import pytest
import pytest_asyncio
from starlette.types import ASGIApp

from app.config import LimitsConfig
from app.errors import InvalidRequest, Overloaded
from app.frontend.request_bounds import SCHEMA_THREADS, RequestBounds
from app.frontend.request_context import RequestContext
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, TokenDelta
from app.routing.decision import Decision, RoutingHints
from tests.unit.decisions import decision
from tests.unit.frontend.server import server_over

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMITS = {
    "max_sequences_per_request": 8,
    "max_prompt_tokens_per_request": 100,
    "max_field_bytes": 4096,
    "max_prompt_logprobs": 200,
    "schema_timeout_s": 0.2,
}
MODEL = {"name": "tiny", "source": "baton:tiny", "decode": {"engine": "sim"}, "vllm_xargs": ["a"]}
CONFIG = {"models": [MODEL], "limits": LIMITS}
SLOW_PATTERN = "((a{1,30}){1,30}b{1,30}){1,30}"
"""A few bytes from which xgrammar makes a grammar for 0.1 to 0.4 s."""
SLOW_SCHEMA = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": SLOW_PATTERN} for i in range(9)}}
SLOW_TAG = json.dumps(
    {"structures": [{"begin": "<f>", "schema": SLOW_SCHEMA, "end": "</f>"}], "triggers": ["<f>"]},
)
DEADLINE_S = 20.0


class FakeOrchestrator:
    def __init__(self) -> None:
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
        self.requests.append(request)
        on_decision(decision())
        await asyncio.sleep(0)
        progress.take(TokenDelta([20], finish_reason="length"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ASGIApp, FakeOrchestrator]]:
    orchestrator = FakeOrchestrator()
    async with server_over(orchestrator, CONFIG) as app:
        yield app, orchestrator


Ask = Callable[..., Any]


@pytest.fixture
def orchestrator(served: tuple[ASGIApp, FakeOrchestrator]) -> FakeOrchestrator:
    served[1].requests.clear()
    return served[1]


@pytest.fixture
def ask(served: tuple[ASGIApp, FakeOrchestrator], orchestrator: FakeOrchestrator) -> Ask:
    async def post(
        headers: dict[str, str] | None = None, path: str = "/v1/completions", **fields: Any
    ) -> httpx.Response:
        transport = httpx.ASGITransport(served[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://baton") as client:
            content = json.dumps({"model": "tiny", "prompt": "hi", "max_tokens": 1, **fields})
            return await client.post(
                path, content=content, headers={"content-type": "application/json", **(headers or {})}
            )

    return post


def prompt(num_tokens: int) -> list[int]:
    return [300] * num_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("most", "more", "setting"),
    [
        ({"n": 8}, {"n": 9}, "max_sequences_per_request"),
        ({"n": 2, "prompt": ["hi"] * 4}, {"n": 2, "prompt": ["hi"] * 5}, "max_sequences_per_request"),
        ({"n": 2, "prompt": prompt(50)}, {"n": 2, "prompt": prompt(51)}, "max_prompt_tokens_per_request"),
        ({"prompt": [prompt(50)] * 2}, {"prompt": [prompt(51)] * 2}, "max_prompt_tokens_per_request"),
        ({"stop": ["a" * 4000]}, {"stop": ["a" * 1100] * 4}, "max_field_bytes"),
        ({"bad_words": ["a"]}, {"bad_words": ["a" * 5000]}, "max_field_bytes"),
        ({"vllm_xargs": {"a": "b"}}, {"vllm_xargs": {"a": "b" * 5000}}, "max_field_bytes"),
        ({"structured_outputs": {"regex": "a"}}, {"structured_outputs": {"regex": "a" * 5000}}, "max_field_bytes"),
    ],
)
async def test_what_is_too_much_is_refused_by_name_before_anything_is_done_for_it(
    ask: Ask, orchestrator: FakeOrchestrator, most: dict[str, Any], more: dict[str, Any], setting: str, stream: bool
) -> None:
    response = await ask(stream=stream, **more)
    assert response.status_code == 400, response.text
    assert f"limits.{setting}" in response.json()["error"]["message"]
    assert orchestrator.requests == []
    response = await ask(stream=stream, **most)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "fields", [{"n": 1, "prompt": prompt(50)}, {"n": 5, "prompt": prompt(10)}, {"prompt": [prompt(25)] * 2}]
)
async def test_log_probabilities_of_prompts_are_bounded_in_sum(
    ask: Ask, orchestrator: FakeOrchestrator, fields: dict[str, Any]
) -> None:
    await ask(prompt_logprobs=4, **fields)
    assert len(orchestrator.requests) == fields.get("n", 2)
    orchestrator.requests.clear()
    response = await ask(prompt_logprobs=5, **fields)
    assert response.status_code == 400, response.text
    assert "limits.max_prompt_logprobs" in response.json()["error"]["message"]
    assert orchestrator.requests == []


async def test_one_sequence_may_have_as_long_a_prompt_as_the_model_takes(ask: Ask) -> None:
    assert (await ask(prompt=prompt(500))).status_code == 200


async def test_what_has_ended_counts_no_longer(ask: Ask, orchestrator: FakeOrchestrator) -> None:
    for _ in range(3):
        assert (await ask(n=8)).status_code == 200
    assert len(orchestrator.requests) == 24


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**31},
        {"top_k": 10**30},
        {"stream_interval": 10**30},
        {"repetition_penalty": 1e-320},
        {"logit_bias": {str(token): 1.0 for token in range(1025)}},
        {"allowed_token_ids": list(range(1025))},
        {"stop_token_ids": list(range(129))},
        {"seed": 2**63 - 1, "n": 2},
        {"cache_salt": "\ud800"},
        {"repetition_detection": {"max_pattern_size": 10**30, "min_count": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_no_engine_can_hold_is_refused_by_name(
    ask: Ask, orchestrator: FakeOrchestrator, fields: dict[str, Any]
) -> None:
    response = await ask(**fields)
    assert response.status_code == 400, response.text
    assert next(iter(fields)) in response.json()["error"]["message"]
    assert orchestrator.requests == []


@pytest.mark.parametrize("priority", [10**30, -(10**30), 2**63])
async def test_a_priority_in_a_header_has_its_range_too(
    ask: Ask, orchestrator: FakeOrchestrator, priority: int
) -> None:
    response = await ask({"X-Vllm-Priority": str(priority)})
    assert response.status_code == 400, response.text
    assert "priority" in response.json()["error"]["message"]
    assert orchestrator.requests == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("value", [1, 0.5, "a", [], [1]])
async def test_a_field_of_another_type_is_the_clients_fault(ask: Ask, path: str, value: Any) -> None:
    response = await ask(path=path, structured_outputs=value, messages=[{"role": "user", "content": "hi"}])
    assert response.status_code == 400, response.text


# Schemas


async def longest_stall(during: asyncio.Task[Any]) -> float:
    """The longest time for which the loop ran nothing else."""
    longest, last = 0.0, time.monotonic()
    while not during.done():
        await asyncio.sleep(0.001)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest


def translation_s() -> float:
    """How long it takes to translate the schema."""
    from vllm.v1.structured_output.backend_xgrammar import xgr

    began = time.monotonic()
    xgr.Grammar.from_json_schema(json.dumps(SLOW_SCHEMA))
    return time.monotonic() - began


@pytest.mark.parametrize(
    "constraint",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SLOW_SCHEMA}}},
        {"structured_outputs": {"json": SLOW_SCHEMA}},
        {"structured_outputs": {"structural_tag": SLOW_TAG}},
        {"response_format": {"type": "structural_tag", **json.loads(SLOW_TAG)}},
    ],
    ids=["response_format", "json", "structural_tag", "response_format tag"],
)
async def test_a_schema_that_takes_long_is_refused_and_nobody_waits_for_it(
    ask: Ask, constraint: dict[str, Any]
) -> None:
    assert (await ask()).status_code == 200  # what is set up with the first request
    alone_s = await asyncio.to_thread(translation_s)
    assert alone_s > 2 * LIMITS["schema_timeout_s"], "the schema is not slow enough for this test"
    answer = asyncio.create_task(ask(**constraint))
    stall_s = await longest_stall(answer)
    response = await answer
    assert response.status_code == 400, response.text
    assert "limits.schema_timeout_s" in response.json()["error"]["message"]
    assert stall_s < alone_s / 3


async def test_the_schemas_of_one_request_have_one_thread_and_one_deadline() -> None:
    bounds, context = RequestBounds(LimitsConfig(schema_timeout_s=1.5), 100), RequestContext()
    running, most = 0, 0

    def translate() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(1)
        running -= 1

    results = await asyncio.gather(
        *(bounds.beside_the_loop(context, translate) for _ in range(3)), return_exceptions=True
    )
    assert most == 1
    assert results[0] is None
    assert isinstance(results[1], InvalidRequest)
    assert isinstance(results[2], InvalidRequest)
    bounds.close()


async def test_a_request_whose_schema_is_late_gets_no_second_thread_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if its thread began late, and has not had all of the request's time when that is over."""
    bounds, context, go_on = RequestBounds(LimitsConfig(schema_timeout_s=0.3), 100), RequestContext(), threading.Event()
    submit, num_begun = bounds._threads.submit, 0

    def submit_late(timed: Callable[[], None]) -> Future[None]:
        def late() -> None:
            time.sleep(0.1)
            timed()

        return submit(late)

    def translate() -> None:
        nonlocal num_begun
        num_begun += 1
        go_on.wait(DEADLINE_S)

    monkeypatch.setattr(bounds._threads, "submit", submit_late)
    try:
        late = [bounds.beside_the_loop(context, translate) for _ in range(3)]
        results = await asyncio.gather(*late, return_exceptions=True)
    finally:
        go_on.set()
        bounds.close()
    assert [type(result) for result in results] == [InvalidRequest] * 3
    assert num_begun == 1


async def test_a_request_whose_turn_does_not_come_is_told_to_come_again() -> None:
    bounds, go_on = RequestBounds(LimitsConfig(schema_timeout_s=0.1), 100), threading.Event()
    try:
        late = [bounds.beside_the_loop(RequestContext(), lambda: go_on.wait(DEADLINE_S)) for _ in range(SCHEMA_THREADS)]
        results = await asyncio.gather(*late, return_exceptions=True)
        assert all(isinstance(result, InvalidRequest) for result in results)
        with pytest.raises(Overloaded):
            await bounds.beside_the_loop(RequestContext(), lambda: None)
    finally:
        go_on.set()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                assert await bounds.beside_the_loop(RequestContext(), lambda: "a") == "a"
                break
            except Overloaded:
                await asyncio.sleep(0.01)
    bounds.close()


@pytest.mark.usefixtures("served")
async def test_a_server_leaves_the_root_logger_as_it_was() -> None:
    """Whichever test built the first one: others look for warnings in their logs."""
    assert logging.getLogger().level == logging.WARNING
