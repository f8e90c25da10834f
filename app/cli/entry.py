"""How every command of Baton starts, those of benchmarks/ included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from app.errors import BatonError
from app.upstream import UpstreamChanged


def to_app(*commands: Callable[..., Any], about: str | None = None) -> typer.Typer:
    """Make a command line of `commands`.  If there is only one, it is called without a subcommand."""
    app = typer.Typer(
        no_args_is_help=len(commands) > 1, add_completion=False, pretty_exceptions_enable=False, help=about
    )
    for command in commands:
        app.command()(command)
    return app


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line.

    An error that Baton raised on purpose is printed as one line that begins with `name`, and the exit code is 2.
    """
    try:
        app()
    except (BatonError, UpstreamChanged, RuntimeError) as error:
        typer.echo(f"{name}: {error}", err=True)
        raise SystemExit(2) from None
