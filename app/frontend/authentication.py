"""Who asks, and whether they may.  Nothing of a request is parsed before it is known: only the headers for pages of
other origins are outside of this middleware."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import LimitReached
from app.frontend import metrics
from app.frontend.http_middleware import error_response, is_anthropic, route_path
from app.frontend.limit_headers import limit_headers
from app.frontend.request_body import replay_body
from app.tenant_usage import Accounts
from app.tenants import ANYONE, KeyRing, Tenant

OF_CLIENTS = frozenset(
    {
        "/v1/models",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/generative_scoring",
        "/tokenize",
        "/detokenize",
        "/version",
    }
)
"""What any key is good for.  Other routes need an admin's, so that none that a new vLLM brings is open at once."""
OF_STORED_RESPONSES = re.compile(r"/v1/responses/[^/]+(/cancel)?")
HEALTH = "/health"


class Authentication:
    """Finds out by the key whose a request is.

    It refuses the request if nobody has the key, or not the right to this route, or has asked too often
    (`requests_per_s`).

    /health goes through without a key, and answers with less then (openai_server.py).  So do the questions that a
    browser asks about a site before it sends a request (CORS), as it sends no key with them: with allowed origins they
    are answered before they come here, and without any vLLM's server refuses them.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, accounts: Accounts, others: Tenant) -> None:
        """`others`: as who those without a key are let in if there are no keys."""
        self._app = app
        self._keys = keys
        self._accounts = accounts
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if self._keys is None:
                scope["baton.tenant"] = self._others
            else:
                refusal = self._admit(self._keys, scope)
                send = self._telling(scope, send)
                if refusal is not None:
                    await refusal(scope, receive, send)
                    return
                if scope["baton.tenant"] is ANYONE:
                    receive = replay_body(b"", receive)  # whoever has no key shall not fill the memory for bodies
        elif scope["type"] == "websocket" and self._keys is not None:
            await send({"type": "websocket.close", "code": 1008})  # no route has one, and none shall go past the keys
            return
        await self._app(scope, receive, send)

    def _telling(self, scope: Scope, send: Send) -> Send:
        """Return a `send` that adds what is left of the tenant's limits, if it has any."""
        tenant = scope.get("baton.tenant", ANYONE)
        if not tenant.rates():
            return send
        account = self._accounts.of(tenant)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = limit_headers(account, is_anthropic=is_anthropic(scope))
                message = {**message, "headers": [*message.get("headers", ()), *told]}
            await send(message)

        return tell

    def _admit(self, keys: KeyRing, scope: Scope) -> JSONResponse | None:
        """Note in the scope whose the request is, or return what it is refused with."""
        shown = list(_keys_shown(scope))
        tenant = next((found for key in shown if (found := keys.find(key)) is not None), None)
        path = route_path(scope)
        if tenant is None and not _is_health(scope, path) and not _is_preflight(scope):
            if shown:
                return _refuse(scope, "unknown", "The API key is not valid.")
            problem = "An API key is missing: send `Authorization: Bearer KEY` or `x-api-key: KEY`."
            return _refuse(scope, "missing", problem)
        if tenant is not None and not tenant.admin and not _is_for_clients(path):
            return _refuse(scope, "not_admin", f"{scope['method']} {path} needs the API key of an admin.")
        scope["baton.tenant"] = tenant or ANYONE
        if tenant is not None and scope["method"] == "POST":
            try:
                self._accounts.of(tenant).begin_request()
            except LimitReached as error:
                headers = {"retry-after": str(math.ceil(error.retry_after_s))}
                status = HTTPStatus.TOO_MANY_REQUESTS
                return error_response(scope, str(error), "rate_limit_error", status, headers=headers)
        return None


def _is_for_clients(path: str) -> bool:
    return path in OF_CLIENTS or path == HEALTH or OF_STORED_RESPONSES.fullmatch(path) is not None


def _is_health(scope: Scope, path: str) -> bool:
    return path == HEALTH and scope["method"] in ("GET", "HEAD")


def _is_preflight(scope: Scope) -> bool:
    names = {name for name, _ in scope["headers"]}
    return scope["method"] == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names


def _keys_shown(scope: Scope) -> Iterator[bytes]:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = value.partition(b" ")
            if kind.lower() == b"bearer":
                yield key.strip()
        elif name == b"x-api-key":
            yield value


def _refuse(scope: Scope, reason: str, message: str) -> JSONResponse:
    """Return the answer to a request without the right key, in the shape that its API's clients expect.

    Its body is not read: the connection stays, and what still comes of it is dropped.
    """
    metrics.REFUSED_KEYS.labels(reason).inc()
    status = HTTPStatus.FORBIDDEN if reason == "not_admin" else HTTPStatus.UNAUTHORIZED
    kind = "permission_error" if reason == "not_admin" else "authentication_error"
    headers = {"www-authenticate": "Bearer"} if status is HTTPStatus.UNAUTHORIZED else {}
    return error_response(scope, message, kind, status, headers=headers)
