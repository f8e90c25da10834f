"""``baton environments``: which environments a configuration needs."""

from __future__ import annotations

import typer

from app.cli.options import DEFAULT_CONFIG, ConfigPath
from app.serve_document import configs, load_document


def environments(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Print what a configuration needs besides .venv, one name a line, for scripts/setup.sh."""
    engines = {model.engine for each in configs(load_document(config)) for model in each.models}
    for name in sorted(engines & {"sglang"}):
        typer.echo(name)
