"""The HTTP client of the tools: it finds an endpoint and the models that it serves, and reads its streams.

Only the load of ``baton bench`` does not use it: vLLM's own client sends that (docs/decisions/0009-load-client.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from app.errors import ConfigError

SHOWN_CHARACTERS = 300
"""How many characters of an answer an error message shows."""


def parse_url(option: str, text: str) -> tuple[str, str]:
    """Return the name and the URL (without /v1) in `text` ([NAME=]URL).  Raises ConfigError, naming `option`."""
    found = re.fullmatch(r"(?:([^=/:]+)=)?(https?://([^/\s]+)\S*?)(?:/v1)?/?", text)
    if not found:
        raise ConfigError(option, f"{text!r} is no URL; write http://HOST:PORT or NAME=http://HOST:PORT")
    try:
        httpx.URL(found[2])
    except httpx.InvalidURL as error:
        raise ConfigError(option, f"{text!r} is no URL: {error}") from None
    return found[1] or found[3], found[2]


API_KEY = "BATON_API_KEY"
"""The environment variable with the key that every client sends."""


def use_key(key: str | None) -> None:
    """Have the clients of this process, and of those that it starts, send `key` if there is one."""
    if key:
        os.environ[API_KEY] = key


def key_headers() -> dict[str, str]:
    """Return the header with the key."""
    key = os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def new_client(url: str, timeout_s: float, socket: Path | None = None) -> httpx.Client:
    """Return a client of the endpoint at `url`.

    With `socket` it connects to this Unix socket, whatever host the URL names.
    """
    transport = httpx.HTTPTransport(uds=str(socket)) if socket is not None else None
    return httpx.Client(base_url=url, headers=key_headers(), timeout=timeout_s, transport=transport)


def new_async_client(url: str, timeout_s: float, socket: Path | None = None) -> httpx.AsyncClient:
    """Return an asynchronous client of the endpoint at `url`, with no limit on the number of connections.

    `socket`: as `new_client`.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=limits) if socket is not None else None
    return httpx.AsyncClient(base_url=url, headers=key_headers(), timeout=timeout_s, limits=limits, transport=transport)


def find_cards(option: str, client: httpx.Client) -> list[dict[str, Any]]:
    """Return what GET /v1/models says of each model.  Raises ConfigError, naming the `option` that gave the URL."""
    try:
        cards = ask(option, client, "GET", "/v1/models").json()["data"]
        return [card for card in cards if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(option, f"GET {_url(client)}/v1/models does not list models") from None


def find_card(option: str, client: httpx.Client, model: str | None, model_option: str = "--model") -> dict[str, Any]:
    """Return the card of `model`, by default the first one.  Raises ConfigError, naming the option."""
    cards = find_cards(option, client)
    names = [card["id"] for card in cards]
    if not names:
        raise ConfigError(model_option, "the endpoint serves no model")
    if model is not None and model not in names:
        raise ConfigError(model_option, f"there is no model {model!r}; served are {', '.join(names)}")
    return cards[names.index(model) if model is not None else 0]


def check_admin(client: httpx.Client) -> None:
    """Raise ConfigError, naming --api-key, if the endpoint has keys and the client has not an admin's."""
    if client.get("/stats").status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise ConfigError("--api-key", f"{_url(client)} has keys, and an admin's is needed")


def find_version(client: httpx.Client) -> str:
    """Return the engine's version according to GET /version; empty if the endpoint does not tell."""
    try:
        answer = client.get("/version")
        return str(answer.json()["version"]) if answer.is_success else ""
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""


def ask(
    option: str,
    client: httpx.Client,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    headers: dict[str, str] | None = None,
    also: Collection[int] = (),
) -> httpx.Response:
    """Send a request and return the answer if it is a success or has one of the statuses `also`.

    Raises ConfigError, naming the `option` that gave the URL.
    """
    try:
        answer = client.request(method, path, json=body, headers=headers)
    except httpx.HTTPError as error:
        raise ConfigError(option, f"{_url(client)} does not answer: {str(error) or type(error).__name__}") from None
    if not answer.is_success and answer.status_code not in also:
        raise ConfigError(option, f"{method} {_url(client)}{path} answered {describe(answer)}")
    return answer


def describe(answer: httpx.Response) -> str:
    """Return the status and the beginning of the text, in one line.  The answer must have been read."""
    return f"{answer.status_code}: {' '.join(answer.text.split())[:SHOWN_CHARACTERS]}"


def _url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


class EventParser:
    """Reads a stream of server-sent events, each of which is one line of data, as in OpenAI's API.

    Lines end at a line feed only.  httpx's ``iter_lines`` also ends them at U+2028 and the like, which JSON does not
    escape, and so would break a token in two.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of each event that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def read_events(response: httpx.Response) -> Iterator[bytes]:
    """Yield the data of each event of a stream as it comes."""
    parser = EventParser()
    for chunk in response.iter_bytes():
        yield from parser.feed(chunk)
