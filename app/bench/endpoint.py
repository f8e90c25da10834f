"""An endpoint that already serves, and what it tells about itself before it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec

from app.bench.client import ask, find_card, find_version, new_client, parse_url
from app.bench.processes import read_process
from app.errors import ConfigError
from app.models.source import is_folder

TIMEOUT_S = 60.0
"""The timeout of each request, even one for a single token: an endpoint may still be loading its model."""


class Endpoint(msgspec.Struct, frozen=True):
    """An endpoint that gets load, and the name that tables and pictures use for it."""

    name: str
    url: str
    """Without /v1."""
    model: str
    tokenizer: str
    """A folder, or an id on Hugging Face's hub."""
    max_model_tokens: int | None
    """The most tokens of a prompt and its output together; None if the endpoint does not tell."""
    version: str
    """What GET /version says; empty where there is none."""
    pids: tuple[int, ...] = ()
    """The processes of the server on this machine; their children count too."""


def find_endpoint(
    option: str, text: str, model: str | None, tokenizer: str | None, pids: list[int], prefix: str = "--"
) -> Endpoint:
    """Return the endpoint at `text` ([NAME=]URL), after a check that it answers.

    `text` is the value of `option`.  The options for its model and processes have names that begin with `prefix`.
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


def _complete_once(option: str, client: httpx.Client, model: str) -> None:
    """Ask for one token.  A refusal comes with its reason here, but the client that sends load would lose it."""
    ask(option, client, "POST", "/v1/completions", {"model": model, "prompt": [1, 2, 3], "max_tokens": 1})


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
