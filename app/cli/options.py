"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(help="A Serve config file.")]
DEFAULT_CONFIG = Path("serve_config.yaml")
