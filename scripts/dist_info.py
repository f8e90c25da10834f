"""Announces this checkout to an interpreter that Baton is not installed in: ``python scripts/dist_info.py FOLDER``.

vLLM and SGLang find plug-ins by the entry points of installed distributions.  This writes the metadata of one, with
those of pyproject.toml, into FOLDER, which PYTHONPATH then has to name beside the checkout.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def write(folder: Path) -> None:
    """Write the metadata; what an earlier call has written is replaced."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
