"""Single values of a Serve config file, as ``baton edit`` and ``cluster/deploy.sh --set`` replace them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml

from app.config import parse
from app.errors import ConfigError
from app.launch import load_document

T = TypeVar("T")


def edit(
    file: Annotated[Path, typer.Argument(help="A Serve config file, which stays as it is.")],
    changes: Annotated[list[str], typer.Argument(help="PATH=VALUE: models.0.decode.replicas=2; VALUE is YAML.")],
) -> None:
    """Print a configuration with some values replaced; comments are left out.  Paths are those that errors name."""
    document = edited(load_document(file), [parse_change(change) for change in changes])
    _check(document["applications"][0]["args"])
    typer.echo(dump(document), nl=False)


def dump(document: Mapping[str, Any]) -> str:
    """A Serve config as YAML."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def unshared(document: T) -> T:
    """A copy in which nothing stands in two places: YAML's anchors share what they name, and deepcopy keeps that."""
    copied: T = json.loads(json.dumps(document))
    return copied


def _check(args: dict[str, Any]) -> None:
    """What needs neither the machines nor the files of where it will run.  Raises ConfigError."""
    from app.build import check_autoscaling

    check_autoscaling(parse(args))


def parse_change(text: str) -> tuple[str, Any]:
    """The path and the value of PATH=VALUE.  Raises ConfigError."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise ConfigError(text, "say PATH=VALUE, for example models.0.decode.replicas=2")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(path, f"{value!r} is not YAML: {' '.join(str(error).split())}") from None


def edited(document: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The Serve config with the values of `changes` inside its application's ``args``; sections are made as needed.

    Raises ConfigError for a path that leads through something else than a section, or beside a list.
    """
    applications = document["applications"]
    if len(applications) != 1:
        raise ConfigError("applications", f"there are {len(applications)}: which one to change cannot be told")
    changed = unshared(dict(document))
    args = changed["applications"][0].setdefault("args", {})
    for path, value in changes:
        _put(args, path, value)
    return changed


def _put(section: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for depth, name in enumerate(parents):
        key = _key(section, name, ".".join(parents[: depth + 1]))
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_key(section, last, path)] = value


def _key(section: Any, name: str, path: str) -> str | int:
    """What `name`, at the end of `path`, stands for in a mapping or a list."""
    if isinstance(section, dict):
        return name
    if not isinstance(section, list):
        raise ConfigError(path, "there is a value above it, not a section")
    if not name.isdecimal() or int(name) >= len(section):
        raise ConfigError(path, f"the list above it has {len(section)} entries, counted from 0")
    return int(name)
