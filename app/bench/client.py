"""The HTTP client of the tools: where an endpoint is, which models it serves, and how its streams are read.

The load of ``baton bench`` is the one exception: it comes from vLLM's own client (docs/decisions/0009-load-client.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import httpx

from app.errors import ConfigError

SHOWN_CHARACTERS = 300
"""How much of an answer stands in an error message."""


def parse_url(option: str, text: str) -> tuple[str, str]:
    """The name and the URL (without /v1) that `text` ([NAME=]URL) means.  Raises ConfigError, naming `option`."""
    found = re.fullmatch(r"(?:([^=/:]+)=)?(https?://([^/\s]+)\S*?)(?:/v1)?/?", text)
    if not found:
        raise ConfigError(option, f"{text!r} is no URL; write http://HOST:PORT or NAME=http://HOST:PORT")
    try:
        httpx.URL(found[2])
    except httpx.InvalidURL as error:
        raise ConfigError(option, f"{text!r} is no URL: {error}") from None
    return found[1] or found[3], found[2]


def new_client(url: str, timeout_s: float) -> httpx.Client:
    """A client of the endpoint at `url`."""
    return httpx.Client(base_url=url, headers=_headers(), timeout=timeout_s)


def new_async_client(url: str, timeout_s: float) -> httpx.AsyncClient:
    """The same for as many requests at a time as there are."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, headers=_headers(), timeout=timeout_s, limits=limits)


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")  # which the load's client sends too
    return {"Authorization": f"Bearer {key}"} if key else {}


def find_cards(option: str, client: httpx.Client) -> list[dict[str, Any]]:
    """What GET /v1/models says of each model.  Raises ConfigError, naming `option`, which `client` was made from."""
    try:
        cards = ask(option, client, "GET", "/v1/models").json()["data"]
        return [card for card in cards if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(option, f"GET {_url(client)}/v1/models does not list models") from None


def find_card(option: str, client: httpx.Client, model: str | None, model_option: str = "--model") -> dict[str, Any]:
    """The card of `model`, by default the first one.  Raises ConfigError, naming the option."""
    cards = find_cards(option, client)
    names = [card["id"] for card in cards]
    if not names:
        raise ConfigError(model_option, "the endpoint serves no model")
    if model is not None and model not in names:
        raise ConfigError(model_option, f"there is no model {model!r}; served are {', '.join(names)}")
    return cards[names.index(model) if model is not None else 0]


def find_version(client: httpx.Client) -> str:
    """The engine's version as GET /version says it; empty where the endpoint has none."""
    try:
        answer = client.get("/version")
        return str(answer.json()["version"]) if answer.is_success else ""
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""


def ask(
    option: str, client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    """A successful answer.  Raises ConfigError, naming `option`, which `client` was made from."""
    try:
        answer = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise ConfigError(option, f"{_url(client)} does not answer: {str(error) or type(error).__name__}") from None
    if not answer.is_success:
        raise ConfigError(option, f"{method} {_url(client)}{path} answered {describe(answer)}")
    return answer


def describe(answer: httpx.Response) -> str:
    """The status and the beginning of the text, in one line; the answer must have been read."""
    return f"{answer.status_code}: {' '.join(answer.text.split())[:SHOWN_CHARACTERS]}"


def _url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


class EventParser:
    """Reads a stream of server-sent events, each of which is one line of data, as in OpenAI's API.

    Lines end at a line feed and nowhere else.  httpx's ``iter_lines`` also ends them at U+2028 and the like, which JSON
    leaves as they are: it would break a token in two.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that `chunk` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def read_events(response: httpx.Response) -> Iterator[bytes]:
    """The data of each event of a stream, as they come."""
    parser = EventParser()
    for chunk in response.iter_bytes():
        yield from parser.feed(chunk)
