"""Finds a model's files: in a folder, by a Hugging Face id, or in a model that Baton makes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from app.errors import ConfigError
from app.models.shapes import SHAPES, ensure_shape
from app.models.tiny import SHAPES as TINY_SHAPES
from app.models.tiny import SOURCES, ensure_tiny_model


def local_path(source: str) -> str:
    """Return what an engine is given as its model.  A model of Baton's own is made on this node if it is missing."""
    if source in SOURCES:
        return str(ensure_tiny_model(size=SOURCES[source]))
    if source in SHAPES:
        return str(ensure_shape(source))
    return str(Path(source).expanduser()) if is_folder(source) else source


def is_folder(source: str) -> bool:
    """Whether `source` names a folder; anything else is an id of Hugging Face's hub."""
    return source.startswith(("/", ".", "~")) or Path(source).is_dir()


def check_source(field: str, source: str) -> None:
    """Raise ConfigError if `source` is malformed, or a folder that does not exist or holds no model."""
    made_here = (*SOURCES, *SHAPES)
    if source in made_here:
        return
    if source.startswith("baton:"):
        raise ConfigError(field, f"Baton makes no {source!r}; it makes {', '.join(made_here)}")
    if not is_folder(source):
        if source.count("/") != 1:
            raise ConfigError(
                field,
                f"{source!r} is neither a folder, nor a Hugging Face id (owner/name), nor {' nor '.join(SOURCES)}",
            )
        return
    folder = Path(os.path.expanduser(source))  # Path.expanduser would raise for a user that does not exist
    if not folder.is_dir():
        raise ConfigError(field, f"the folder {source!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ConfigError(field, f"the folder {source!r} holds no config.json")


def read_config(field: str, source: str) -> dict[str, Any] | None:
    """Return a model's ``config.json``, of a model that is made here the dimensions; None if it is not on this node.

    `check_source` must have accepted `source`.  Raises ConfigError if the file holds no JSON object.
    """
    if source in SOURCES:
        return dict(TINY_SHAPES[SOURCES[source]])
    if source in SHAPES:
        return SHAPES[source]
    if not is_folder(source):
        return None
    try:
        config = json.loads((Path(source).expanduser() / "config.json").read_bytes())
    except ValueError as error:
        raise ConfigError(field, f"the config.json of {source!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(field, f"the config.json of {source!r} is not a JSON object")
    return config
