"""An endpoint that already serves: what it says of itself before it is measured."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec

from app.bench.processes import read_process
from app.errors import ConfigError
from app.models.source import is_folder

TIMEOUT_S = 60.0
"""For one token too: an endpoint may still be loading its model."""


class Endpoint(msgspec.Struct, frozen=True):
    """Where load goes, and what stands in tables and pictures for it."""

    name: str
    url: str
    """Without /v1."""
    model: str
    tokenizer: str
    """A folder or an id of Hugging Face's hub."""
    max_model_tokens: int | None
    """The longest prompt with its output; None if the endpoint does not say."""
    version: str
    """What GET /version says; empty where there is none, or no such thing as an engine's version."""
    pids: tuple[int, ...] = ()
    """The processes of the server on this machine; their children count too."""


def find_endpoint(
    option: str, text: str, model: str | None, tokenizer: str | None, pids: list[int], prefix: str = "--"
) -> Endpoint:
    """The endpoint that `text` ([NAME=]URL) means, if it answers.

    `option` is what `text` was given as; `prefix` begins the names of the options for its model and processes.
    Raises ConfigError, naming the option that cannot work.
    """
    name, url = parse_url(option, text)
    with new_client(url, TIMEOUT_S) as client:
        card = find_card(option, client, model, f"{prefix}model")
        _complete_once(option, client, card["id"])
        version = find_version(client)
    return Endpoint(
        name=name,
        url=url,
        model=card["id"],
        tokenizer=_tokenizer(tokenizer, card),
        max_model_tokens=card.get("max_model_len"),
        version=version,
        pids=_checked(f"{prefix}pid", pids),
    )


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
    key = os.environ.get("OPENAI_API_KEY")  # which the load's client sends too
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=timeout_s)


def find_card(option: str, client: httpx.Client, model: str | None, model_option: str = "--model") -> dict[str, Any]:
    """What GET /v1/models says of `model`, by default of the first one.  Raises ConfigError, naming the option."""
    return _choose(model_option, _models(option, client), model)


def find_version(client: httpx.Client) -> str:
    """What stands in Endpoint.version."""
    try:
        answer = client.get("/version")
        return str(answer.json()["version"]) if answer.is_success else ""
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""


def _url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def _models(option: str, client: httpx.Client) -> list[dict[str, Any]]:
    answer = _ask(option, client, "GET", "/v1/models")
    try:
        cards = answer.json()["data"]
        return [card for card in cards if isinstance(card["id"], str)]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(option, f"GET {_url(client)}/v1/models does not list models") from None


def _ask(
    option: str, client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
) -> httpx.Response:
    try:
        answer = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(option, f"{_url(client)} does not answer: {reason}") from None
    if not answer.is_success:
        said = " ".join(answer.text.split())[:300]
        raise ConfigError(option, f"{method} {_url(client)}{path} answered {answer.status_code}: {said}")
    return answer


def _choose(option: str, cards: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    names = [card["id"] for card in cards]
    if not names:
        raise ConfigError(option, "the endpoint serves no model")
    if model is not None and model not in names:
        raise ConfigError(option, f"there is no model {model!r}; served are {', '.join(names)}")
    return cards[names.index(model) if model is not None else 0]


def _complete_once(option: str, client: httpx.Client, model: str) -> None:
    """One token: a refusal here comes with its reason, which the load's client would not keep."""
    _ask(option, client, "POST", "/v1/completions", {"model": model, "prompt": [1, 2, 3], "max_tokens": 1})


def _tokenizer(given: str | None, card: dict[str, Any]) -> str:
    if given is not None:
        if is_folder(given) and not Path(given).expanduser().is_dir():
            raise ConfigError("--tokenizer", f"the folder {given!r} does not exist")
        return str(Path(given).expanduser()) if is_folder(given) else given
    root = card.get("root")
    return root if isinstance(root, str) and Path(root).is_dir() else str(card["id"])


def _checked(option: str, pids: list[int]) -> tuple[int, ...]:
    for pid in pids:
        if read_process(pid) is None:
            raise ConfigError(option, f"there is no process {pid}")
    return tuple(pids)
