"""What goes wrong in those who only watch is said, but not for every token, and ends nothing."""

from __future__ import annotations

import logging
from functools import partial

import pytest

from app import observers
from app.observers import observing, tell


@pytest.fixture(autouse=True)
def log_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observers, "_failures", {})
    # Whoever adopted Serve's logging before in this process keeps the lines from propagating.
    monkeypatch.setattr(logging.getLogger("baton"), "propagate", True)


def fail(secret: str) -> None:
    raise ValueError("no")


def test_an_observer_that_fails_is_said_once_and_then_how_often(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(100):
        assert not tell(fail, "token")
    assert [record.message for record in caplog.records] == [
        "observer=fail failed, and 0 times more since this was last said"
    ]
    monkeypatch.setattr(observers, "SAY_AGAIN_S", 0.0)
    assert not tell(partial(fail, "token"))
    assert caplog.messages[-1] == "observer=fail failed, and 99 times more since this was last said"
    assert "token" not in caplog.messages[-1]
    assert "ValueError: no" in caplog.text


def test_an_observer_that_does_not_fail_is_told() -> None:
    told: list[int] = []

    class Observer:
        @observing
        def on_news(self, number: int) -> None:
            told.append(number)
            if number == 2:
                raise ValueError

    observer = Observer()
    for number in (1, 2, 3):
        observer.on_news(number)
    assert told == [1, 2, 3]
    assert tell(told.append, 4)
