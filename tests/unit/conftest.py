"""What the unit tests share: Hypothesis without a deadline, as a busy machine may take long over any example."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from app.cli.main import main

settings.register_profile("unit", deadline=None)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def no_cluster() -> Iterator[None]:
    """Fail a test that starts a Ray cluster, as many of Ray's functions do without being asked."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("This test started a Ray cluster.")


Command = Callable[..., tuple[object, str, str]]


@pytest.fixture
def baton_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``baton`` in this process; returns its exit code and what it wrote to stdout and to stderr."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["baton", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run
