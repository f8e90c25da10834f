"""Puts the servers of several models behind one endpoint: the field ``model`` of a request chooses between them.

With a single model this is not needed, and `build_server` leaves it out.
"""

from __future__ import annotations

import msgspec
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.frontend.http_middleware import error_body
from app.frontend.request_body import read_body, replay_body


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
            await self._choose(body)(scope, replay_body(body, receive), send)

    def _choose(self, body: bytes) -> ASGIApp:
        try:
            model = _DECODER.decode(body).model
        except msgspec.DecodeError:  # no body, or an invalid one, and any application can say what is wrong with it
            return self._first
        if model is None:
            return self._refusal("The field `model` is missing", 400, "BadRequestError")
        return self._apps.get(model) or self._refusal(f"The model `{model}` does not exist", 404, "NotFoundError")

    def _refusal(self, problem: str, status: int, kind: str) -> ASGIApp:
        names = ", ".join(f"`{name}`" for name in self._apps)
        message = f"{problem}; this server has {names}."
        return JSONResponse(error_body(message, kind, status, "model"), status_code=status)

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
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path.startswith("/v1/responses/") and (scope["method"] == "GET" or path.endswith("/cancel"))
