"""GPUs are counted without CUDA, as a CUDA process would see them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.bench import gpus
from app.bench.gpus import Gpu, count_gpus, describe_gpus, too_few

REPOSITORY = Path(__file__).parents[3]
TWO = """\
echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1111)"
echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2222)"
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without nvidia-smi; the folder is both its PATH and its /dev."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "DEV", tmp_path)
    return tmp_path


def put_nvidia_smi(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("visible", "number"),
    [
        (None, 2),
        ("", 0),
        ("-1", 0),
        ("1", 1),
        ("0,1", 2),
        (" 1, 0 ", 2),
        ("0,-1,1", 1),
        ("0,7,1", 1),
        ("GPU-2222", 1),
        ("MIG-1,MIG-2,MIG-3", 2),
        ("nonsense", 0),
    ],
)
def test_only_visible_gpus_count(machine: Path, visible: str | None, number: int) -> None:
    put_nvidia_smi(machine, TWO)
    assert count_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == number


def test_without_nvidia_smi_the_device_files_count(machine: Path) -> None:
    assert count_gpus({}) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia0-caps"):
        (machine / name).touch()
    assert count_gpus({}) == 2
    put_nvidia_smi(machine, "exit 9\n")
    assert count_gpus({}) == 2


def test_gpus_are_described(machine: Path) -> None:
    assert describe_gpus() == []
    put_nvidia_smi(machine, 'echo "81559, 580.95.05, NVIDIA H100 80GB HBM3"\necho "[N/A], 580.95.05, NVIDIA A, B"\n')
    assert describe_gpus() == [Gpu("NVIDIA H100 80GB HBM3", 81559, "580.95.05"), Gpu("NVIDIA A, B", 0, "580.95.05")]


def test_too_few_gpus_are_said_in_one_line(machine: Path) -> None:
    put_nvidia_smi(machine, TWO)
    assert too_few(2, {}) is None
    assert too_few(4, {}) == "this needs 4 NVIDIA GPUs, and this machine shows 2: nothing was run"
    assert "shows 1 (CUDA_VISIBLE_DEVICES is set)" in str(too_few(2, {"CUDA_VISIBLE_DEVICES": "0"}))


@pytest.mark.parametrize(("wanted", "code"), [(0, 0), (999, 1)])
def test_the_module_is_a_gate_for_make(wanted: int, code: int) -> None:
    """Make runs it before any environment exists, so Python alone has to do (-S: without site-packages)."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "app.bench.gpus", str(wanted)],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == code
