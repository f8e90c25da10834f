"""The entry point of the ``baton`` command, under a name that no other package has.

Baton is an application: its wheel puts the packages `app` and `deployments` into a folder that comes last on Python's
path (docs/decisions/0018-wheel.md).  Where another package of such a name comes first, this is still found and says so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / "baton" if (HERE / "baton").is_dir() else HERE.parents[1]
"""Where Baton's packages are: a folder of site-packages, or the repository."""
PACKAGES = ("app", "deployments")


def find_intruder(path: Sequence[str]) -> str | None:
    """The file or folder that `path` gives instead of one of Baton's packages; None where it gives Baton's own."""
    for name in PACKAGES:
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            continue
        found = spec.origin or next(iter(spec.submodule_search_locations or ()))
        if Path(found).resolve() != (FOLDER / name / "__init__.py").resolve():
            return found
    return None


def main() -> None:
    """The entry point ``baton``; the exit code is 2 where Baton cannot be imported."""
    if intruder := find_intruder(sys.path):
        advice = "take it off PYTHONPATH, or install Baton into an environment of its own"
        print(f"baton: {intruder} comes before Baton's package of the same name: {advice}", file=sys.stderr)
        raise SystemExit(2)
    path_of_workers = [os.getcwd(), *sys.path]
    if sys.argv[1:2] == ["run"] and (intruder := find_intruder(path_of_workers)):
        advice = "run Baton in another folder"
        print(f"baton: {intruder} would be taken for Baton's package of the same name: {advice}", file=sys.stderr)
        raise SystemExit(2)
    from app.cli.main import main as run

    run()
