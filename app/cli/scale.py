"""``baton scale``: how many replicas the pools have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.errors import ConfigError
from app.replica_bounds import parse_targets, scale_document
from app.serve_document import dump, load_document


def scale(
    name: Annotated[str, typer.Argument(help="A model's name, or the application's if it serves one model.")],
    targets: Annotated[list[str], typer.Argument(metavar="POOL=N|POOL=MIN..MAX...", help="frontend, prefill, decode.")],
    file: Annotated[
        Path | None, typer.Option(allow_dash=True, help="Change this Serve config (- is standard input) and print it.")
    ] = None,
    switch: Annotated[
        bool, typer.Option("--switch", help="Have running replicas change their role; none starts or stops.")
    ] = False,
) -> None:
    """Change how many replicas pools of the running application have, or between which bounds they scale."""
    wanted = parse_targets(targets)
    if switch:
        if file is not None:
            raise ConfigError("--switch", "is for the running application, and --file for a configuration")
        from deployments.application import switch_running

        for line in switch_running(name, wanted):
            typer.echo(line)
        return
    if file is not None:
        document = load_document(Path("/dev/stdin") if str(file) == "-" else file)
        typer.echo(dump(scale_document(document, name, wanted)), nl=False)
        return
    from deployments.application import scale_running

    for line in scale_running(name, wanted):
        typer.echo(line)
