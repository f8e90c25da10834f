"""Puts the servers of several models behind one endpoint: the field ``model`` of a request chooses between them, as far
as its tenant may use them.

With a single model and no keys this is not needed, and `build_server` leaves it out.
"""

from __future__ import annotations

from collections.abc import Collection
from http import HTTPStatus

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend.http_middleware import error_response, route_path
from app.frontend.request_body import read_body, replay_body
from app.frontend.request_context import current_request
from app.tenants import Tenant


class _Body(msgspec.Struct):
    """The one field that is read.  The decoder skips all others without making objects of them."""

    model: str | None = None


_DECODER = msgspec.json.Decoder(_Body)


class ModelDispatch:
    """Gives each request to the application of the model that its body names.

    Requests without a body go to the first application: their answers are the same for all models (/metrics, /docs,
    /version).  Bodies are read whole, so `BodyLimit` must have limited them before.  The application gets the same
    bytes, and learns of a client's disconnection when it happens.
    """

    def __init__(self, apps: dict[str, ASGIApp]) -> None:
        self._apps = apps
        self._first = next(iter(apps.values()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._first(scope, receive, send)
        elif (body := await read_body(receive)) is None:
            return
        elif _is_about_a_stored_response(scope):
            await self._ask_all(scope, body, receive, send)
        else:
            app = self._choose(body, current_request().tenant)
            await app(scope, replay_body(body, receive), send)

    def _choose(self, body: bytes, tenant: Tenant) -> ASGIApp:
        if not body:
            return self._first
        apps = {name: app for name, app in self._apps.items() if tenant.may_use(name)}
        try:
            model = _DECODER.decode(body).model
        except msgspec.DecodeError:  # any application can say what is wrong with it
            return next(iter(apps.values()), None) or _refusal("The request names no model", 400, apps)
        if model is None:
            is_clear = len(apps) == len(self._apps) == 1
            return self._first if is_clear else _refusal("The field `model` is missing", 400, apps)
        return apps.get(model) or _refusal(f"The model `{model}` does not exist", 404, apps)

    async def _ask_all(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Ask one application after the other: only the one that made a stored response has it.

        The client gets the first answer that is not 404, or the last application's 404.
        """
        *others, last = self._apps.values()
        for app in others:
            attempt = _UnlessNotFound(send)
            await app(dict(scope), replay_body(body, receive), attempt.send)
            if not attempt.is_not_found:
                return
        await last(scope, replay_body(body, receive), send)


def _refusal(problem: str, status: int, apps: Collection[str]) -> ASGIApp:
    """Return what answers a request that is for none of `apps`, which its client may know of."""
    names = ", ".join(f"`{name}`" for name in apps) or "none that you may use"
    kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        message = f"{problem}; this server has {names}."
        await error_response(scope, message, kind, status, param="model")(scope, receive, send)

    return refuse


class _UnlessNotFound:
    """Passes an answer on, unless its status is 404."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.is_not_found = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_not_found = message["status"] == 404
        if not self.is_not_found:
            await self._send(message)


def _is_about_a_stored_response(scope: Scope) -> bool:
    """Whether the request names an earlier answer by its id, and no model.

    These are GET /v1/responses/{id} and POST /v1/responses/{id}/cancel.
    """
    path = route_path(scope)
    return path.startswith("/v1/responses/") and (scope["method"] == "GET" or path.endswith("/cancel"))
