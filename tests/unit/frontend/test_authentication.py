"""Who gets through to which route, as whom, and what of a tenant reaches the pools.

The server is vLLM's real one, over an orchestrator that answers one token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
import pytest_asyncio
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

from app.frontend.authentication import OF_CLIENTS, Authentication
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport, TokenDelta
from app.routing.decision import RoutingHints
from app.tenant_usage import Accounts
from app.tenants import LOCAL, Tenant, digest
from tests.unit.decisions import decision, local_way
from tests.unit.frontend.server import server_over
from tests.unit.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL: dict[str, Any] = {
    "source": "baton:tiny",
    "decode": {"engine": "sim"},
    "server_args": {"allowed_origins": ["http://page"]},
}
MODELS = [{"name": name, **MODEL} for name in ("tiny", "other")]
TENANTS = [
    {"name": "ops", "keys": [digest(b"ops-key").hex()], "admin": True},
    {"name": "a", "keys": [digest(b"a-key").hex()], "weight": 2.0},
    {"name": "b", "keys": [digest(b"b-key").hex()], "models": ["tiny"], "highest_class": "default"},
    {"name": "c", "keys": [digest(b"c-key").hex()], "models": []},
]
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


class OneToken:
    """An orchestrator that notes what it is asked, and answers one token."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.hints: list[RoutingHints] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def run(
        self, request: GenerateRequest, progress: SequenceProgress, *, hints: RoutingHints, on_decision: Any, **_: Any
    ) -> None:
        self.requests.append(request)
        self.hints.append(hints)
        on_decision(decision(way=local_way(), reason="aggregated"))
        await self.may_answer.wait()
        report = PrefillReport("local", "aggregated", "", "decode-1", 0, len(request.prompt_token_ids), "")
        progress.take(TokenDelta([20], finish_reason="length", report=report))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def orchestrator() -> OneToken:
    return OneToken()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(orchestrator: OneToken, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ASGIApp]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(yaml.safe_dump({"tenants": TENANTS}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_RESPONSES_API_STORE", "1")
        async with server_over(orchestrator, {"models": MODELS, "security": {"keys": str(keys)}}) as built:
            yield built


@pytest_asyncio.fixture(loop_scope="module")
async def client(app: ASGIApp, orchestrator: OneToken) -> AsyncIterator[httpx.AsyncClient]:
    orchestrator.requests.clear()
    orchestrator.hints.clear()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def routes(app: Any) -> set[tuple[str, str]]:
    """Return the method and path of every route of every model's application."""
    while not hasattr(app, "_apps"):
        app = app.app if isinstance(app, CORSMiddleware) else app._app
    found: set[tuple[str, str]] = set()

    def walk(each: Any) -> None:
        for route in each:
            if (included := getattr(route, "original_router", None)) is not None:
                walk(included.routes)
            elif isinstance(route, Mount):
                found.add(("GET", route.path))
            else:
                assert isinstance(route, Route), f"{route} is no HTTP route: do its requests pass the keys?"
                assert route.methods is not None
                found.update((method, route.path.replace("{response_id}", "resp_x")) for method in route.methods)

    for served in app._apps.values():
        walk(served.router.routes)
    return found


async def test_every_route_needs_the_right_key(app: ASGIApp, client: httpx.AsyncClient) -> None:
    found = routes(app)
    assert {("GET", "/stats"), ("GET", "/metrics"), ("GET", "/docs"), ("POST", "/v1/chat/completions")} <= found
    assert {path for _, path in found} >= OF_CLIENTS, "every route for clients exists"
    for method, path in sorted(found):
        is_open, is_for_clients = path == "/health", path in OF_CLIENTS or path.startswith("/v1/responses/resp_x")
        for headers in ({}, bearer("wrong"), {"x-api-key": "wrong"}, {"authorization": "Basic YTprZXk="}):
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code == (200 if is_open else 401), (method, path, headers)
        answer = await client.request(method, path, headers=bearer("a-key"))
        assert (answer.status_code == 403) != (is_open or is_for_clients), (method, path)
        answer = await client.request(method, path, headers=bearer("ops-key"))
        is_switched_off = answer.status_code == 403 and "--enable-scale-out" in answer.text
        assert is_switched_off or answer.status_code not in (401, 403), (method, path)
    for path in ("/invocations", "/inference/v1/abort_requests", "/ping"):
        assert (await client.post(path, headers=bearer("ops-key"), json=COMPLETION)).status_code == 404


async def test_a_route_that_nobody_knows_is_an_admins(client: httpx.AsyncClient) -> None:
    assert (await client.get("/new", headers=bearer("a-key"))).status_code == 403
    assert (await client.get("/new", headers=bearer("ops-key"))).status_code == 404
    assert (await client.get("/v1/models/", headers=bearer("a-key"))).status_code == 403
    assert (await client.get("/v1/responses/x/y", headers=bearer("a-key"))).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer a-key"},
        {"authorization": "bearer  a-key "},
        {"x-api-key": "a-key"},
        {"x-api-key": "a-key", "authorization": "Bearer wrong"},
        {"x-api-key": "", "authorization": "Bearer a-key"},
    ],
)
async def test_a_key_comes_in_either_header(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.post("/v1/completions", headers=headers, json=COMPLETION)).status_code == 200


async def test_refusals_have_the_shape_of_their_api(client: httpx.AsyncClient) -> None:
    of_openai = await client.post("/v1/completions", json=COMPLETION)
    assert of_openai.headers["www-authenticate"] == "Bearer"
    error = of_openai.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", 401)
    assert "x-api-key" in error["message"]
    of_anthropic = await client.post("/v1/messages", headers={"x-api-key": "a-kex"}, json=CHAT)
    assert of_anthropic.status_code == 401
    assert of_anthropic.json()["type"] == "error"
    assert of_anthropic.json()["error"]["type"] == "authentication_error"
    assert "a-kex" not in of_anthropic.text
    assert (await client.get("/stats", headers=bearer("a-key"))).json()["error"]["type"] == "permission_error"


async def test_refusals_are_counted(client: httpx.AsyncClient) -> None:
    def counts() -> list[float]:
        reasons = ("missing", "unknown", "not_admin")
        return [REGISTRY.get_sample_value("baton_refused_keys_total", {"reason": reason}) or 0 for reason in reasons]

    before = counts()
    await client.get("/v1/models")
    await client.get("/v1/models", headers=bearer("wrong"))
    await client.get("/stats", headers=bearer("a-key"))
    await client.get("/v1/models", headers=bearer("a-key"))
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 1]


async def status_without_body(app: ASGIApp, scope: dict[str, Any]) -> int:
    """Return the status of the answer to a request of whose body nothing may be read."""

    async def receive() -> Message:
        raise AssertionError("the body was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return int(sent[0]["status"])


async def test_nothing_of_a_body_is_read_without_a_key(app: ASGIApp) -> None:
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-length", b"999999999")],
    }
    assert await status_without_body(app, scope) == 401


async def test_health_is_one_word_without_an_admins_key(client: httpx.AsyncClient) -> None:
    for headers in ({}, bearer("wrong"), bearer("a-key")):
        assert (await client.get("/health", headers=headers)).json() == {"status": "healthy"}
    assert set((await client.get("/health", headers=bearer("ops-key"))).json()) == {"status", "models", "endpoints"}


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/health", []),
        ("OPTIONS", "/v1/completions", [(b"origin", b"http://page"), (b"access-control-request-method", b"POST")]),
    ],
)
async def test_what_needs_no_key_has_no_body(
    app: ASGIApp, method: str, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    """Or else anybody could fill the memory that bodies may take together."""

    scope = {
        **{"type": "http", "method": method, "path": path, "headers": [*headers, (b"transfer-encoding", b"chunked")]},
        **{"raw_path": path.encode(), "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http"},
    }
    assert await status_without_body(app, scope) == 200


async def test_health_is_for_reading(client: httpx.AsyncClient) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert (await client.request(method, "/health", content=b"x" * 100)).status_code == 401


async def test_only_admins_are_told_of_replicas(client: httpx.AsyncClient) -> None:
    for key, is_told in (("ops-key", True), ("a-key", False)):
        headers = {**bearer(key), "x-baton-explain": "1"}
        answer = await client.post("/v1/completions", headers=headers, json=COMPLETION)
        assert answer.status_code == 200
        assert ("x-baton-explain" in answer.headers) == is_told


async def test_a_browsers_question_before_a_request_needs_no_key(client: httpx.AsyncClient) -> None:
    asks = {"origin": "http://page", "access-control-request-method": "POST"}
    answer = await client.options("/v1/chat/completions", headers=asks)
    assert answer.status_code == 200
    assert "access-control-allow-origin" in answer.headers
    assert (await client.options("/v1/chat/completions")).status_code == 401


ANSWERS: dict[int, tuple[str, str, dict[str, Any]]] = {
    401: ("POST", "/v1/completions", {"json": COMPLETION}),
    403: ("GET", "/stats", {"headers": bearer("a-key")}),
    404: ("POST", "/v1/completions", {"headers": bearer("a-key"), "json": {**COMPLETION, "model": "none"}}),
    413: ("POST", "/v1/completions", {"headers": {**bearer("a-key"), "content-length": "999999999"}}),
    400: ("POST", "/v1/completions", {"headers": {**bearer("a-key"), "x-baton-timeout-s": "x"}, "json": COMPLETION}),
    200: ("POST", "/v1/completions", {"headers": bearer("a-key"), "json": COMPLETION}),
}


ALLOWED_AND_VARY = "access-control-allow-origin", "vary"


@pytest.mark.parametrize("status", ANSWERS)
async def test_a_page_of_an_allowed_origin_can_read_every_answer(client: httpx.AsyncClient, status: int) -> None:
    method, path, options = ANSWERS[status]

    async def told(origin: str) -> tuple[int, list[str], set[str]]:
        headers = {**options.get("headers", {}), "origin": origin}
        answer = await client.request(method, path, **{**options, "headers": headers})
        allowed, vary = (answer.headers.get_list(name, split_commas=True) for name in ALLOWED_AND_VARY)
        return answer.status_code, allowed, set(vary)

    assert await told("http://page") == (status, ["http://page"], {"Origin"}), "once, and not once more by vLLM"
    assert await told("http://other") == (status, [], {"Origin"})


async def test_a_page_can_read_that_a_limit_is_reached(limited: ASGIApp) -> None:
    transport = httpx.ASGITransport(limited, raise_app_exceptions=False)
    headers = {**bearer("requests-page"), "origin": "http://page"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
        answers = [await client.post("/v1/completions", json=COMPLETION) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["access-control-allow-origin"] for answer in answers] == ["http://page"] * 3


async def test_other_origins_questions_are_refused(client: httpx.AsyncClient) -> None:
    asks = {"origin": "http://other", "access-control-request-method": "POST"}
    answer = await client.options("/v1/chat/completions", headers=asks)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


async def test_without_allowed_origins_no_page_is_told_anything(orchestrator: OneToken, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"tenants": TENANTS}))
    model = {name: value for name, value in MODELS[0].items() if name != "server_args"}
    async with server_over(orchestrator, {"models": [model], "security": {"keys": str(keys)}}) as built:
        transport = httpx.ASGITransport(built, raise_app_exceptions=False)
        asks = {"origin": "http://page", "access-control-request-method": "POST"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=asks) as client:
            answers = [
                await client.post("/v1/completions", json=COMPLETION),
                await client.post("/v1/completions", json=COMPLETION, headers=bearer("a-key")),
                await client.options("/v1/completions"),
            ]
    assert [answer.status_code for answer in answers] == [401, 200, 400]
    assert not any("access-control-allow-origin" in answer.headers for answer in answers)


async def test_websockets_are_closed() -> None:
    async def unused(*_: Any) -> Any:
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    class NoKeys:
        def find(self, key: bytes) -> None: ...

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await Authentication(unused, NoKeys(), Accounts(), others=LOCAL)(scope, unused, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


# Models

WITH_MODEL = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"model": "tiny", "input": "hi", "max_output_tokens": 1},
    "/tokenize": {"model": "tiny", "prompt": "hi"},
}


@pytest.mark.parametrize(("path", "body"), WITH_MODEL.items(), ids=WITH_MODEL)
async def test_other_models_do_not_exist_for_a_tenant(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    async def ask(key: str, model: str) -> httpx.Response:
        return await client.post(path, headers=bearer(key), json={**body, "model": model})

    assert [(await ask("a-key", model)).status_code for model in ("tiny", "other")] == [200, 200]
    assert [(await ask("b-key", model)).status_code for model in ("tiny", "other")] == [200, 404]
    refusal, unknown = await ask("b-key", "other"), await ask("b-key", "nothing")
    assert refusal.text.replace("other", "X") == unknown.text.replace("nothing", "X"), "it does not tell that it exists"
    assert [(await ask("c-key", model)).status_code for model in ("tiny", "other")] == [404, 404]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "other", "prompt": "hi", "temperature": NaN}',
        '{"model": "other", "prompt": "hi"}'.encode("utf-16"),
        b'{"model": "tiny", "model": "other", "prompt": "hi"}',
        b'\xef\xbb\xbf{"model": "other", "prompt": "hi"}',
        b'{"model": ["other"], "prompt": "hi"}',
        b'{"prompt": "hi"}',
        b"",
    ],
)
async def test_no_way_of_writing_gets_at_another_model(
    client: httpx.AsyncClient, orchestrator: OneToken, body: bytes
) -> None:
    """The dispatcher and vLLM's server read a body by different parsers."""
    for key in ("b-key", "c-key"):
        headers = {**bearer(key), "content-type": "application/json"}
        answer = await client.post("/v1/completions", headers=headers, content=body)
        assert 400 <= answer.status_code < 500
    assert not orchestrator.requests


async def test_models_are_listed_as_far_as_a_tenant_may_use_them(client: httpx.AsyncClient) -> None:
    listed = {
        key: [card["id"] for card in (await client.get("/v1/models", headers=bearer(key))).json()["data"]]
        for key in ("ops-key", "a-key", "b-key", "c-key")
    }
    assert listed == {"ops-key": ["tiny", "other"], "a-key": ["tiny", "other"], "b-key": ["tiny"], "c-key": []}


# What reaches the pools


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("more", [{}, {"response_format": {"type": "json_object"}}], ids=["plain", "schema"])
async def test_each_tenant_has_a_cache_and_sessions_of_its_own(
    client: httpx.AsyncClient, orchestrator: OneToken, path: str, more: dict[str, Any]
) -> None:
    """With a schema, the request is completed in another thread, which has no request context."""
    body = {**(CHAT if "chat" in path else COMPLETION), **more, "user": "ann"}
    of_a, of_b = Tenant(name="a"), Tenant(name="b")
    for key, salt in (("a-key", None), ("a-key", "x"), ("b-key", "x"), ("b-key", of_a.cache_salt("x"))):
        salted = body if salt is None else {**body, "cache_salt": salt}
        assert (await client.post(path, headers=bearer(key), json=salted)).status_code == 200
    salts = [request.cache_salt for request in orchestrator.requests]
    assert salts[:3] == [of_a.cache_salt(None), of_a.cache_salt("x"), of_b.cache_salt("x")]
    assert len(set(salts)) == 4
    hints = [(each.tenant, each.weight, each.session) for each in orchestrator.hints[1:3]]
    assert hints == [("a", 2.0, "a/ann"), ("b", 1.0, "b/ann")]


@pytest.mark.parametrize(
    ("asked", "classes"),
    [
        ({}, ["default", "default"]),
        ({"service_tier": "priority"}, ["priority", "default"]),
        ({"service_tier": "flex"}, ["flex", "flex"]),
        ({"priority": -1}, ["priority", "default"]),
        ({"priority": 1}, ["flex", "flex"]),
    ],
)
async def test_no_class_above_the_tenants_highest(
    client: httpx.AsyncClient, orchestrator: OneToken, asked: dict[str, Any], classes: list[str]
) -> None:
    for key in ("a-key", "b-key"):
        assert (await client.post("/v1/chat/completions", headers=bearer(key), json={**CHAT, **asked})).is_success
    assert [each.service_class for each in orchestrator.hints] == classes
    assert [each.priority for each in orchestrator.requests] == [
        asked.get("priority", 0),
        max(0, asked.get("priority", 0)),
    ]


async def test_control_runs_need_an_admin(client: httpx.AsyncClient, orchestrator: OneToken) -> None:
    for mode in ("local", "remote", "corrupted"):
        body = {**COMPLETION, "cache_salt": "s", "vllm_xargs": {"baton_prefill": mode}}
        refused = await client.post("/v1/completions", headers=bearer("a-key"), json=body)
        assert refused.status_code == 400
        assert "limits.allow_control" in refused.json()["error"]["message"]
        assert (await client.post("/v1/completions", headers=bearer("ops-key"), json=body)).status_code == 200
    asked = {**COMPLETION, "vllm_xargs": {"baton_prefill": "auto"}}
    assert (await client.post("/v1/completions", headers=bearer("a-key"), json=asked)).status_code == 200


async def test_wrong_kv_is_never_found_again(client: httpx.AsyncClient, orchestrator: OneToken) -> None:
    body = {**COMPLETION, "cache_salt": "s", "vllm_xargs": {"baton_prefill": "corrupted"}}
    for _ in range(2):
        await client.post("/v1/completions", headers=bearer("ops-key"), json=body)
    first, second = (request.cache_salt for request in orchestrator.requests)
    assert first != second
    assert Tenant(name="ops").cache_salt("s") not in (first, second)


REFUSED_FIELDS: dict[str, dict[str, Any]] = {
    "kv_transfer_params": {"kv_transfer_params": {"do_remote_prefill": True}},
    "ec_transfer_params": {"ec_transfer_params": {"x": 1}},
    "kv_cache_report_mode": {"vllm_xargs": {"kv_cache_report_mode": "full"}},
    "vllm_xargs": {"vllm_xargs": {"anything": 1}},
    "request_id": {"request_id": "a\nb"},
    "request_id ": {"request_id": "a" * 300},
    "request_id  ": {"request_id": "é"},
}


@pytest.mark.parametrize(("named", "fields"), REFUSED_FIELDS.items(), ids=[*map(repr, REFUSED_FIELDS)])
@pytest.mark.parametrize("key", ["a-key", "ops-key"])
async def test_only_what_is_for_clients_reaches_engines(
    client: httpx.AsyncClient, orchestrator: OneToken, named: str, fields: dict[str, Any], key: str
) -> None:
    answer = await client.post("/v1/completions", headers=bearer(key), json={**COMPLETION, **fields})
    assert answer.status_code == 400
    assert named.strip() in answer.json()["error"]["message"]
    assert not orchestrator.requests


async def test_a_long_id_in_a_header_is_refused_too(client: httpx.AsyncClient, orchestrator: OneToken) -> None:
    headers = {**bearer("a-key"), "x-request-id": "a" * 300}
    answer = await client.post("/v1/completions", headers=headers, json=COMPLETION)
    assert (answer.status_code, orchestrator.requests) == (400, [])


async def test_stored_responses_are_their_tenants_own(client: httpx.AsyncClient) -> None:
    asked = {"model": "tiny", "input": "hi", "max_output_tokens": 1, "store": True}
    made = (await client.post("/v1/responses", headers=bearer("a-key"), json=asked)).json()["id"]
    found = {key: await client.get(f"/v1/responses/{made}", headers=bearer(key)) for key in ("a-key", "b-key")}
    assert {key: answer.status_code for key, answer in found.items()} == {"a-key": 200, "b-key": 404}
    goes_on = {**asked, "previous_response_id": made}
    statuses = [(await client.post("/v1/responses", headers=bearer(key), json=goes_on)).status_code for key in found]
    assert statuses == [200, 404]
    assert (await client.post(f"/v1/responses/{made}/cancel", headers=bearer("b-key"))).status_code == 404


async def test_stored_responses_of_the_background_are_their_tenants_own(client: httpx.AsyncClient) -> None:
    asked = {"model": "tiny", "input": "hi", "max_output_tokens": 1, "store": True, "background": True}
    made = (await client.post("/v1/responses", headers=bearer("a-key"), json=asked)).json()["id"]

    async def has_ended() -> bool:
        answer = await client.get(f"/v1/responses/{made}", headers=bearer("a-key"))
        return answer.json().get("status") in ("completed", "incomplete")

    async with asyncio.timeout(30):
        while not await has_ended():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await client.get(f"/v1/responses/{made}", headers=bearer("b-key"))).status_code == 404


# Whatever comes

KEYS = st.sampled_from(["", "ops-key", "a-key", "b-key", "c-key", "wrong", "ä"]) | st.text(max_size=20)
NAMES = st.sampled_from(
    [
        *("authorization", "x-api-key", "x-request-id", "content-type", "x-baton-timeout-s", "x-baton-explain"),
        *("x-session-id", "priority", "accept", "origin", "traceparent", "x-data-parallel-rank", "load-format"),
    ]
)
HEADERS = st.lists(st.tuples(NAMES, st.text(max_size=40) | KEYS.map("Bearer {}".format) | KEYS), max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSONS = st.recursive(
    LEAVES, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each, max_size=3)
)
FIELDS = st.sampled_from(
    [
        *("model", "prompt", "messages", "input", "max_tokens", "stream", "n", "stop", "temperature", "logprobs"),
        *("request_id", "cache_salt", "priority", "service_tier", "user", "vllm_xargs", "kv_transfer_params", "store"),
        *("response_format", "structured_outputs", "stream_options", "metadata", "top_p", "seed", "echo", "tools"),
    ]
)
BODIES = st.one_of(
    st.builds(
        lambda path, extra: (path, json.dumps({**WITH_MODEL[path], **extra}).encode()),
        st.sampled_from(sorted(WITH_MODEL)),
        st.dictionaries(FIELDS, JSONS, max_size=3),
    ),
    st.tuples(st.sampled_from(sorted({*OF_CLIENTS, "/stats", "/health", "/docs", "/nothing"})), st.binary(max_size=60)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(data=st.data())
async def test_nothing_that_comes_is_a_fault_of_the_server(
    app: ASGIApp, client: httpx.AsyncClient, data: st.DataObject
) -> None:
    """No answer of 5xx, and without a key that is valid none but 401 (or /health)."""
    path, body = data.draw(BODIES)
    key = data.draw(st.sampled_from(["a-key", "b-key", None]))
    headers = [(b"content-type", b"application/json")] if data.draw(st.booleans()) else []
    headers += [(name.encode(), value.encode("utf-8", "surrogatepass")) for name, value in data.draw(HEADERS)]
    headers += [(b"x-api-key", key.encode())] if key else []
    method = data.draw(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "OPTIONS", "DELETE"]))
    status = await _status(app, method, path, headers, body)
    assert status < 500
    if not key and not {value.removeprefix(b"Bearer ").strip() for _, value in headers} & VALID and path != "/health":
        assert status == 401 or method == "OPTIONS"


VALID = {b"ops-key", b"a-key", b"b-key", b"c-key"}


async def _status(app: ASGIApp, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> int:
    """Send a request as no client library would let it through, and return the answer's status."""
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers},
        **{"client": ("127.0.0.1", 1), "server": ("test", 80)},
    }
    gone = asyncio.Event()
    parts: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])
    statuses: list[int] = []

    async def receive() -> Message:
        if (part := next(parts, None)) is None:
            await gone.wait()
            return {"type": "http.disconnect"}
        return part

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        elif not message.get("more_body"):
            gone.set()

    await app(scope, receive, send)
    (status,) = statuses
    return status


# Limits

LIMITED = {
    "requests": {"requests_per_s": 0.2},
    "prompt_tokens": {"prompt_tokens_per_s": 0.1},
    "output_tokens": {"output_tokens_per_s": 0.01},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def limited(orchestrator: OneToken, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ASGIApp]:
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    tenants = [
        {"name": f"{kind}-{api}", "keys": [digest(f"{kind}-{api}".encode()).hex()], **limits}
        for kind, limits in LIMITED.items()
        for api in ("plain", "chat", "messages", "openai", "anthropic", "page")
    ]
    tenants.append({"name": "one", "keys": [digest(b"one").hex()], "max_sequences": 1})
    tenants.append({"name": "half", "keys": [digest(b"half").hex()], "kv_share": 0.5})
    keys.write_text(yaml.safe_dump({"tenants": tenants}))
    accounts = Accounts()
    accounts.follow([], {"tiny": 200})
    async with server_over(orchestrator, {"models": MODELS[:1], "security": {"keys": str(keys)}}, accounts) as built:
        yield built


LIMITED_APIS = {
    "plain": ("/v1/completions", COMPLETION),
    "chat": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "messages": ("/v1/messages", CHAT),
}


@pytest.mark.parametrize("api", LIMITED_APIS)
@pytest.mark.parametrize("kind", LIMITED)
async def test_beyond_a_limit_the_answer_is_429_and_says_when_to_come_again(
    limited: ASGIApp, kind: str, api: str
) -> None:
    path, body = LIMITED_APIS[api]
    transport = httpx.ASGITransport(limited, raise_app_exceptions=False)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=bearer(f"{kind}-{api}")
    ) as client:
        answers = [await client.post(path, json=body) for _ in range(4)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[0] == 200
    assert statuses[-1] == 429
    assert set(statuses) == {200, 429}, statuses
    refusal = answers[-1]
    assert int(refusal.headers["retry-after"]) >= 1
    assert f"{kind}_per_s" in refusal.text
    told = {
        "messages": f"anthropic-ratelimit-{kind.replace('_', '-').replace('prompt', 'input')}",
        "plain": "x-ratelimit",
        "chat": "x-ratelimit",
    }[api]
    for answer in answers:
        assert any(name.startswith(told) for name in answer.headers), answer.headers


async def test_no_more_sequences_at_a_time_than_allowed(limited: ASGIApp, orchestrator: OneToken) -> None:
    orchestrator.may_answer.clear()
    transport = httpx.ASGITransport(limited, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer("one")) as client:
        first = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
        num = len(orchestrator.requests)
        await until(lambda: len(orchestrator.requests) > num)
        second = await client.post("/v1/completions", json=COMPLETION)
        orchestrator.may_answer.set()
        assert (second.status_code, (await first).status_code) == (429, 200)
        assert "max_sequences" in second.text
        never = await client.post("/v1/completions", json={**COMPLETION, "n": 2})
        assert (never.status_code, "max_sequences" in never.text) == (400, True)
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200


@pytest.mark.parametrize("api", LIMITED_APIS)
async def test_no_more_of_the_memory_than_the_share(limited: ASGIApp, orchestrator: OneToken, api: str) -> None:
    """A sequence holds its prompt and all that it may generate, so the first one here holds the whole share."""
    path, body = LIMITED_APIS[api]
    orchestrator.may_answer.clear()
    transport = httpx.ASGITransport(limited, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer("half")) as client:
        first = asyncio.create_task(client.post(path, json={**body, "max_tokens": 100}))
        num = len(orchestrator.requests)
        await until(lambda: len(orchestrator.requests) > num)
        second = await client.post(path, json=body)
        orchestrator.may_answer.set()
        assert (second.status_code, (await first).status_code) == (429, 200)
        assert int(second.headers["retry-after"]) >= 1
        assert "`kv_share`" in second.json()["error"]["message"]
        assert (second.json().get("type") == "error") == (api == "messages")
        assert [(await client.post(path, json=body)).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "never", [{"prompt": "hi" * 100}, {"n": 2, "max_tokens": 60}, {"prompt": ["hi", "hi"], "max_tokens": 60}]
)
async def test_what_never_fits_into_the_share_is_a_fault_of_the_request(
    limited: ASGIApp, never: dict[str, Any]
) -> None:
    transport = httpx.ASGITransport(limited, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=bearer("half")) as client:
        answer = await client.post("/v1/completions", json={**COMPLETION, **never})
        assert (answer.status_code, "`kv_share`" in answer.text) == (400, True)
        several = {**COMPLETION, "prompt": ["hi", "hi"], "n": 2}
        assert (await client.post("/v1/completions", json=several)).status_code == 200


async def test_clients_wait_as_long_as_they_are_told_before_they_try_again(
    limited: ASGIApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    transport = httpx2.ASGITransport(limited, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport) as http:
        of_openai = openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="requests-openai", http_client=http, max_retries=1
        )
        for _ in range(2):
            await of_openai.completions.create(**COMPLETION)
        with pytest.raises(openai.RateLimitError):
            await of_openai.completions.create(**COMPLETION)
        assert len(waits) == 1
        assert waits[0] >= 1
        of_anthropic = anthropic.AsyncAnthropic(
            base_url="http://test", api_key="requests-anthropic", http_client=http, max_retries=1
        )
        for _ in range(2):
            await of_anthropic.messages.create(**CHAT)
        with pytest.raises(anthropic.RateLimitError):
            await of_anthropic.messages.create(**CHAT)
        assert len(waits) == 2
        assert waits[1] >= 1
