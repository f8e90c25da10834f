"""What every benchmark does with ``--json`` and ``--picture``, and when it is told to stop."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from app.bench import picture as pictures
from app.bench.report import Report, to_json
from app.errors import ConfigError


def check_files(json: Path | None, picture: Path | None) -> None:
    """Check that the files can be written, so that this fails now and not after everything was measured."""
    for option, path in (("--json", json), ("--picture", picture)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(option, f"the folder of {path} does not exist")
    if picture is not None:
        pictures.check(picture)


def write_files(report: Report, json: Path | None, picture: Path | None) -> None:
    """Write what `--json` and `--picture` ask for.  Without a measurement no picture is drawn."""
    if json is not None:
        json.write_bytes(to_json(report))
    if picture is not None and report.measurements:
        pictures.draw(report, picture)


def exit_in_order(*_: object) -> None:
    """End in order on SIGTERM as on Ctrl-C.  A second signal (`timeout` sends two) must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + signal.SIGTERM)
