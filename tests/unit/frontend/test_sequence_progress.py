"""The one place that knows whether a sequence's first token has come, and when."""

from __future__ import annotations

from typing import Any

import pytest

from app.frontend.sequence_progress import SequenceProgress
from app.messages import PrefillReport, TokenDelta


class Followed:
    """A progress in a time that only the test moves, and what it told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[Any] = []
        self.progress = SequenceProgress(self.told.append, lambda: self.now)
        self.progress.on_first = self.told.append


def report(kind: Any) -> PrefillReport:
    return PrefillReport(kind, "", None, "d", cached_tokens=0, transferred_tokens=0, transport="")


def test_a_time_to_the_first_token_counts_from_the_arrival_and_the_routers_from_the_attempt() -> None:
    followed = Followed()
    followed.now += 2.0
    followed.progress.begin_attempt()
    followed.now += 3.0
    followed.progress.begin_attempt()
    followed.now += 0.5
    assert followed.progress.ttft_s is None
    followed.progress.take(TokenDelta([1]))
    assert followed.progress.ttft_s == 5.5
    assert followed.told == [0.5, TokenDelta([1])]


def test_gaps_are_between_deltas() -> None:
    followed = Followed()
    gaps = []
    for passed_s in (4.0, 0.25, 0.5):
        followed.now += passed_s
        followed.progress.take(TokenDelta([1]))
        gaps.append(followed.progress.last_gap_s)
    assert gaps == [None, 0.25, 0.5]
    assert followed.progress.ttft_s == 4.0
    assert followed.progress.last_token_at == followed.now


def test_the_first_delta_says_where_the_kv_came_from() -> None:
    for kind in ("remote", "local"):
        progress = Followed().progress
        assert (progress.has_first_token, progress.has_remote_kv) == (False, False)
        progress.take(TokenDelta([1], report=report(kind)))
        progress.take(TokenDelta([2]))
        assert (progress.has_first_token, progress.has_remote_kv) == (True, kind == "remote")
        assert progress.waited_for_kv is (False if kind == "remote" else None)


def test_a_later_report_replaces_the_one_that_came_before_the_kv() -> None:
    told: list[Any] = []
    progress = Followed().progress
    progress.on_report = told.append
    progress.on_first = lambda _: told.append("first")
    on_its_way = PrefillReport("remote", "", "p", "d", cached_tokens=0, transferred_tokens=None, transport="")
    progress.take(TokenDelta([1], report=on_its_way))
    assert (progress.has_first_token, progress.has_remote_kv) == (True, False)
    assert progress.waited_for_kv is False
    progress.take(TokenDelta([2], report=report("remote")))
    progress.take(TokenDelta([3]))
    assert (progress.report, progress.has_remote_kv) == (report("remote"), True)
    assert told == [on_its_way, "first", report("remote")]


def test_who_is_told_of_a_delta_cannot_keep_it_from_the_client(caplog: pytest.LogCaptureFixture) -> None:
    followed = Followed()
    followed.progress.on_first = lambda _: 1 / 0
    followed.progress.on_report = lambda _: 1 / 0
    delta = TokenDelta([1], report=report("local"))
    followed.progress.take(delta)
    assert followed.told == [delta]
    assert followed.progress.first_token_kind == "local"
    assert "ZeroDivisionError" in caplog.text


def test_a_resumed_sequence_keeps_what_the_client_saw_of_its_beginning() -> None:
    followed = Followed()
    progress, told = followed.progress, followed.told
    followed.now += 1.0
    progress.take(TokenDelta([1], report=report("remote")))
    followed.now += 0.1
    progress.take(TokenDelta([2, 3]))
    followed.now += 4.0
    progress.begin_attempt()
    assert (progress.has_first_token, progress.report, progress.waits_for_kv) == (False, None, False)
    assert progress.waits_since == followed.now - 4.0
    followed.now += 2.0
    progress.take(TokenDelta([4], report=report("local")))
    assert progress.last_gap_s is None
    assert progress.resume_gaps_s == [pytest.approx(6.0)]
    assert progress.resume_reasons == ["lost"]
    followed.now += 0.5
    progress.take(TokenDelta([5]))
    assert progress.last_gap_s == pytest.approx(0.5)
    assert progress.token_ids == [1, 2, 3, 4, 5]
    assert (progress.ttft_s, progress.first_token_kind) == (1.0, "remote")
    assert progress.report == report("local")
    assert progress.prompt_report == report("remote")
    assert told == [
        1.0,
        TokenDelta([1], report=report("remote")),
        TokenDelta([2, 3]),
        pytest.approx(2.0),
        TokenDelta([4]),
        TokenDelta([5]),
    ]


def test_a_pause_counts_for_the_client_and_for_no_time_limit() -> None:
    followed = Followed()
    progress = followed.progress
    progress.take(TokenDelta([1]))
    followed.now += 1.0
    progress.pause()
    assert (progress.is_paused, progress.waits_since) == (True, followed.now)
    followed.now += 300.0
    progress.begin_attempt("preempted")
    assert (progress.is_paused, progress.waits_since) == (False, followed.now)
    resumed_at = followed.now
    followed.now += 1.0
    progress.begin_attempt("lost")
    assert progress.waits_since == resumed_at
    progress.take(TokenDelta([2]))
    assert progress.resume_gaps_s == [pytest.approx(302.0)]
    assert progress.resume_reasons == ["lost"]
    progress.begin_attempt("lost")
    assert progress.waits_since == followed.now
