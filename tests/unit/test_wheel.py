"""The wheel: what is in it, that it works once installed, and what is said where another package has Baton's names."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = {"app", "deployments"}
UV = REPOSITORY / "scripts/uv.sh"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    answer = run(UV, "build", "--wheel", "--out-dir", folder, REPOSITORY, cwd=folder)
    assert answer.returncode == 0, answer.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The environment that the wheel is installed in, alone; what it needs comes from this one."""
    environment = wheel.with_name("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent).returncode == 0
    answer = run(UV, "pip", "install", "--no-deps", "--python", environment / "bin/python", wheel, cwd=wheel.parent)
    assert answer.returncode == 0, answer.stderr
    return environment


def test_the_wheel_adds_two_names_to_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if "dist-info" not in name and not name.startswith("baton/")} == {
        "baton.pth",
        "baton_command.py",
    }
    assert {name.split("/")[1] for name in names if name.startswith("baton/")} == PACKAGES


def test_the_wheel_has_all_of_both_packages(wheel: Path) -> None:
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*") if file.is_file()]
    ours = {f"baton/{file.relative_to(REPOSITORY)}" for file in files if file.suffix != ".pyc"}
    assert ours == {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("baton/")}


def test_what_is_installed_can_be_imported(installed: Path, tmp_path: Path) -> None:
    code = "import app.config, baton_command, sys; print(app.config.__file__, baton_command.find_intruder(sys.path))"
    answer = run(installed / "bin/python", "-c", code, cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))
    assert answer.stdout.endswith("site-packages/baton/app/config.py None\n"), answer.stderr
    assert answer.stdout.startswith(str(installed))


@pytest.mark.parametrize("other", ["app/__init__.py", "app.py", "deployments/__init__.py"])
def test_another_package_that_comes_first_is_named(installed: Path, tmp_path: Path, other: str) -> None:
    file = tmp_path / other
    file.parent.mkdir(exist_ok=True)
    file.touch()
    answer = run(installed / "bin/baton", "check", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (answer.returncode, answer.stderr.count("\n")) == (2, 1)
    assert answer.stderr.startswith(f"baton: {file} comes before Baton's package")


def test_run_refuses_a_folder_whose_packages_rays_workers_would_import(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    file = tmp_path / "app/__init__.py"
    file.touch()
    answer = run(installed / "bin/baton", "run", cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))
    assert (answer.returncode, answer.stderr) == (
        2,
        f"baton: {file} would be taken for Baton's package of the same name: run Baton in another folder\n",
    )


def test_a_folder_of_that_name_that_is_no_package_is_none_of_batons_business(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "deployments").mkdir()
    answer = run(installed / "bin/baton", "run", cwd=tmp_path, PYTHONPATH=sysconfig.get_path("purelib"))
    assert answer.returncode == 2
    assert answer.stderr.startswith("baton: serve_config.yaml: No such file")
