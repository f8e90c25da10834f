"""Reads, edits and writes Serve config files as documents.  A path names a value in a document."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from app.config import BatonConfig, parse
from app.errors import ConfigError
from app.models.source import is_folder

T = TypeVar("T")


def load_document(path: Path) -> dict[str, Any]:
    """Read a Serve config file and put the environment's MODEL into it.  Raises ConfigError."""
    try:
        document: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), error.strerror or "cannot be read") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not text") from error
    applications = document.get("applications") if isinstance(document, dict) else None
    if not applications:
        raise ConfigError(str(path), "has no `applications`: it must be a Serve config file")
    if not isinstance(applications, list) or not all(isinstance(application, dict) for application in applications):
        raise ConfigError(str(path), "`applications` is not a list of mappings")
    if model := os.environ.get("MODEL"):
        for application in document["applications"]:
            _replace_model(application, model)
    return dict(document)


def _replace_model(application: dict[str, Any], source: str) -> None:
    models = parse(application.get("args") or {}).models
    if len(models) > 1:
        raise ConfigError(
            "models", f"MODEL={source} replaces the model of a configuration that has one, and here are {len(models)}"
        )
    application["args"]["models"][0].update(source=source, name=served_name(source))


def served_name(source: str) -> str:
    """Return the name under which a model is served if only its source is known: its id, or its folder's name."""
    return re.sub(r"[^\w.@:-]+", "-", Path(source).resolve().name) if is_folder(source) else source


def configs(document: Mapping[str, Any]) -> list[BatonConfig]:
    """Return Baton's configuration of each application.  Raises ConfigError."""
    for index, application in enumerate(document["applications"]):
        if application.get("import_path") == "app.build:build":  # until 0.1.0
            raise ConfigError(f"applications.{index}.import_path", "is deployments.build:build now")
    return [parse(application.get("args") or {}) for application in document["applications"]]


def dump(document: Mapping[str, Any]) -> str:
    """Write a Serve config as YAML."""
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def unshared(document: T) -> T:
    """Return a copy in which no object is shared.

    YAML's anchors put one object in several places, and deepcopy would keep that.
    """
    copied: T = json.loads(json.dumps(document))
    return copied


def parse_change(text: str) -> tuple[str, Any]:
    """Return the path and the value of PATH=VALUE.  Raises ConfigError."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        raise ConfigError(text, "say PATH=VALUE, for example models.0.decode.replicas=2")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(path, f"{value!r} is not YAML: {' '.join(str(error).split())}") from None


def edited(document: Mapping[str, Any], changes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the Serve config with the values of `changes` set in its application's ``args``.

    Missing sections are made.  Raises ConfigError for a path that leads through something other than a section, or to
    an entry that a list does not have.
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
    """Return the key or index for `name`, the last part of `path`, in a mapping or a list.  Raises ConfigError."""
    if isinstance(section, dict):
        return name
    if not isinstance(section, list):
        raise ConfigError(path, "there is a value above it, not a section")
    if not name.isdecimal() or int(name) >= len(section):
        raise ConfigError(path, f"the list above it has {len(section)} entries, counted from 0")
    return int(name)
