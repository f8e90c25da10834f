"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.bench.client import API_KEY

ConfigPath = Annotated[Path, typer.Argument(help="A Serve config file.")]
Host = Annotated[str | None, typer.Option(help="Instead of http_options.host.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar=API_KEY, help="If the service has keys (security.keys): one of an admin's.")
]
DEFAULT_CONFIG = Path("serve_config.yaml")
