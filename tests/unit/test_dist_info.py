"""A checkout that is not installed is found by vLLM and SGLang like one that is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_plugins_of_a_checkout_are_found(tmp_path: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, REPOSITORY / "scripts/dist_info.py", tmp_path], check=True)
    (found,) = distributions(path=[str(tmp_path)])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert (found.name, found.version) == ("baton", project["version"])
    announced = {(point.group, point.name, point.value) for point in found.entry_points}
    assert ("vllm.general_plugins", "baton_owner_watch", "app.engines.plugins.owner_watch:register") in announced
    groups = project["entry-points"].items()
    assert announced == {(group, name, value) for group, points in groups for name, value in points.items()}
