"""The process of an application that `python -m benchmarks.gpu` measures: its start, its end and its log."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from app.bench.processes import read_process
from benchmarks.gpu.application import READY, NotServing, serving
from tests.conftest import wait_until


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "gpu-vllm.log"


def run_instead(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a shell script the program that is started."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_an_application_serves_until_the_block_ends(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = log.with_name("pid")
    run_instead(f'cp "$3" {log}.config; echo $$ >{pid}; echo "{READY}"; exec sleep 60', log.parent, monkeypatch)
    with serving({"applications": []}, log, 10.0) as ready_after_s:
        assert 0 <= ready_after_s < 10
        assert json.loads(Path(f"{log}.config").read_text()) == {"applications": []}
        number = int(pid.read_text())
        assert read_process(number)
    wait_until(lambda: read_process(number) is None, 5, "the process has ended")
    assert not log.exists()
    assert not log.with_suffix(".json").exists()


def test_an_application_that_ends_says_why_and_keeps_its_log(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead("seq 100; echo out of memory; exit 1", log.parent, monkeypatch)
    with (
        pytest.raises(NotServing, match=r"^the application ended: 90 \|.* \| 100 \| out of memory$"),
        serving({}, log, 10.0),
    ):
        pass
    assert log.read_text().startswith("1\n2\n")
    assert not log.with_suffix(".json").exists()


def test_an_application_that_takes_too_long_is_ended(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = log.with_name("pid")
    run_instead(f"echo $$ >{pid}; echo loading; exec sleep 60", log.parent, monkeypatch)
    with pytest.raises(NotServing, match=r"does not serve after 1 s: loading$"), serving({}, log, 1.0):
        pass
    assert read_process(int(pid.read_text())) is None


def test_the_log_of_measurements_that_fail_is_kept(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(f'echo "{READY}"; exec sleep 60', log.parent, monkeypatch)
    with pytest.raises(RuntimeError, match="gone"), serving({}, log, 10.0):
        raise RuntimeError("gone")
    assert READY in log.read_text()
