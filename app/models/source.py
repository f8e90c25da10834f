"""Where a model's files are: a folder, a Hugging Face id, or a model that Baton makes."""

from __future__ import annotations

import os
from pathlib import Path

from app.errors import ConfigError
from app.models.tiny import SOURCES, ensure_tiny_model


def local_path(source: str) -> str:
    """What an engine is given as its model; makes Baton's own on this node if it is asked for."""
    if source in SOURCES:
        return str(ensure_tiny_model(size=SOURCES[source]))
    return str(Path(source).expanduser()) if is_folder(source) else source


def is_folder(source: str) -> bool:
    """Whether `source` means a folder; anything else is an id of Hugging Face's hub."""
    return source.startswith(("/", ".", "~")) or Path(source).is_dir()


def check_source(field: str, source: str) -> None:
    """Raise ConfigError if `source` is a folder that is not there or holds no model."""
    if source in SOURCES or not is_folder(source):
        if source not in SOURCES and source.count("/") != 1:
            raise ConfigError(
                field,
                f"{source!r} is neither a folder, nor a Hugging Face id (owner/name), nor {' nor '.join(SOURCES)}",
            )
        return
    folder = Path(os.path.expanduser(source))  # Path's own raises where there is no such user
    if not folder.is_dir():
        raise ConfigError(field, f"the folder {source!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ConfigError(field, f"the folder {source!r} holds no config.json")
