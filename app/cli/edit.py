"""``baton edit``: replace single values of a Serve config file, as ``cluster/deploy.sh --set`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.serve_document import configs, dump, edited, load_document, parse_change


def edit(
    file: Annotated[Path, typer.Argument(help="A Serve config file, which stays as it is.")],
    changes: Annotated[list[str], typer.Argument(help="PATH=VALUE: models.0.decode.replicas=2; VALUE is YAML.")],
) -> None:
    """Print a configuration with some values replaced; comments are left out.  Paths are those that errors name."""
    from deployments.build import check_autoscaling

    document = edited(load_document(file), [parse_change(change) for change in changes])
    for config in configs(document):
        check_autoscaling(config)
    typer.echo(dump(document), nl=False)
