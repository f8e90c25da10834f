"""How every command of Baton starts, those of benchmarks/ included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from app.errors import BatonError


def to_app(*commands: Callable[..., Any], about: str | None = None) -> typer.Typer:
    """A command line of `commands`; with a single one there is no subcommand to name."""
    app = typer.Typer(
        no_args_is_help=len(commands) > 1, add_completion=False, pretty_exceptions_enable=False, help=about
    )
    for command in commands:
        app.command()(command)
    return app


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line; an error that Baton raised on purpose is one line, after `name`, and exit code 2."""
    try:
        app()
    except (BatonError, RuntimeError) as error:
        typer.echo(f"{name}: {error}", err=True)
        raise SystemExit(2) from None
