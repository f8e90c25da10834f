"""What is logged and counted of a sequence: once, and both from the same facts."""

import logging
import time
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from app.config import SloConfig
from app.frontend.metrics import _LATENCY_BUCKETS_S, InterTokenLatency
from app.frontend.sequence_progress import ResumeReason, SequenceProgress
from app.frontend.sequence_record import SequenceRecord
from app.messages import PrefillReport, TokenDelta
from tests.unit.decisions import decision, local_way, remote_way

REMOTE = PrefillReport(
    "remote", "", "prefill-1", "decode-1", 48, 52, "shm", phases={"prefill": 0.02, "delivery": 0.0015}
)
LOCAL = PrefillReport("local", "prefill_failed", None, "decode-1", 16, 0, "")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A name of its own for each test: metrics last as long as the process."""
    name: str = request.node.name
    return name


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def fields(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """The one line that was logged, by its names."""
    (line,) = caplog.messages
    return dict(field.split("=", 1) for field in line.split())


def begun(model: str, clock: Callable[[], float] = time.monotonic, **facts: Any) -> SequenceRecord:
    """The record of a sequence whose deltas its progress is given."""
    record = SequenceRecord(SequenceProgress(lambda delta: record.on_delta(delta), clock), model, "r", 100, **facts)
    return record


def served(model: str, report: PrefillReport = REMOTE, *decisions: Any, **facts: Any) -> None:
    record = begun(model, **facts)
    for each in decisions or (decision(),):
        record.on_decision(each)
    record.progress.take(TokenDelta([1], report=report))
    record.progress.take(TokenDelta([2, 3], finish_reason="stop"))
    record.on_end("stop")


@pytest.fixture(autouse=True)
def log_is_kept(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "baton.sequence")
    # Whoever adopted Serve's logging before in this process keeps the lines from propagating.
    monkeypatch.setattr(logging.getLogger("baton"), "propagate", True)


def test_one_line_says_all_of_a_sequence_and_its_decision(model: str, caplog: pytest.LogCaptureFixture) -> None:
    served(model, has_session=True)
    said = fields(caplog)
    assert float(said.pop("ttft_ms")) <= float(said.pop("total_ms"))
    assert said == {
        "request_id": "r",
        "model": model,
        "end": "stop",
        "prompt_tokens": "100",
        "output_tokens": "3",
        "prefill": "remote",
        "reason": "none",
        "prefill_replica": "prefill-1",
        "decode_replica": "decode-1",
        "cached_tokens": "48",
        "kv_tokens_moved": "52",
        "transport": "'shm'",
        "phases_ms": "prefill:20.0,delivery:1.5",
        "decision": "remote",
        "decision_reason": "faster",
        "decided_prefill": "prefill-1",
        "decided_decode": "decode-1",
        "expected_cached_tokens": "64",
        "predicted_ttft_ms": "10.0",
        "predicted_itl_ms": "20.0",
        "waited_ms": "0.0",
        "decided_us": "120",
        "attempts": "1",
        "resumed_after_ms": "none",
        "resume_reasons": "none",
        "resumed_cached_tokens": "none",
        "session": "yes",
        "tenant": "none",
    }


def test_a_sequence_that_got_nowhere_is_logged_too(model: str, caplog: pytest.LogCaptureFixture) -> None:
    begun(model).on_end("Overloaded")
    said = fields(caplog)
    assert (said["end"], said["decision"], said["prefill"], said["session"]) == ("Overloaded", "none", "none", "no")


def test_a_local_way_is_logged_without_a_prefill_replica(model: str, caplog: pytest.LogCaptureFixture) -> None:
    served(model, LOCAL, decision(way=local_way(serving_role="aggregated", alone_s=0.01), waited_s=0.25))
    said = fields(caplog)
    assert (said["predicted_ttft_ms"], said["waited_ms"], said["decided_prefill"]) == ("10.0", "250.0", "none")
    assert said["decided_aggregated"] == "decode-1"


def test_where_nothing_is_predicted_there_is_nothing_to_compare(model: str) -> None:
    served(model, LOCAL, decision(way=local_way(alone_s=0.0)))
    assert count("baton_time_to_first_token_ratio_count", model=model, kind="local") == 0


def test_expected_and_reported_cached_tokens_count_the_same_prompts(model: str) -> None:
    served(model)
    served(model)
    without_token = begun(model)
    without_token.on_decision(decision())
    without_token.on_end("ReplicaLost")
    assert count("baton_expected_cached_tokens_total", model=model) == 2 * 64
    assert count("baton_cached_prompt_tokens_total", model=model) == 2 * 48


def test_every_attempts_decision_counts(model: str) -> None:
    served(model, REMOTE, decision(), decision(reason="only_way"), decision(reason="only_way", decided_in_s=0.002))
    assert count("baton_decisions_total", model=model, kind="remote", reason="faster") == 1
    assert count("baton_decisions_total", model=model, kind="remote", reason="only_way") == 2
    assert count("baton_decision_seconds_count", model=model) == 3
    assert count("baton_decision_seconds_sum", model=model) == pytest.approx(0.00012 * 2 + 0.002)


def test_the_prediction_is_compared_with_what_it_took(model: str) -> None:
    served(model, REMOTE, decision(way=remote_way(alone_s=1e9)))
    assert count("baton_time_to_first_token_ratio_count", model=model, kind="remote") == 1
    assert count("baton_time_to_first_token_ratio_sum", model=model, kind="remote") < 1e-6


def test_what_a_request_waited_before_its_decision_is_no_error_of_the_prediction(model: str) -> None:
    now = 0.0
    record = begun(model, lambda: now)
    record.on_decision(decision(way=remote_way(queue_s=0.25, alone_s=0.25), waited_s=3.0))
    now = 4.0
    record.progress.take(TokenDelta([1], report=REMOTE))
    record.on_end("stop")
    assert count("baton_time_to_first_token_ratio_sum", model=model, kind="remote") == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("report", "num_attempts"), [(LOCAL, 1), (REMOTE, 2)], ids=["fell back on a local prefill", "second attempt"]
)
def test_what_went_wrong_on_the_way_is_no_error_of_the_prediction(model: str, report: Any, num_attempts: int) -> None:
    served(model, report, *[decision()] * num_attempts)
    assert count("baton_time_to_first_token_ratio_count", model=model, kind="remote") == 0


@pytest.mark.parametrize(
    ("ttft_s", "decoding_s", "end", "is_good"),
    [
        (1.0, 0.5, "stop", True),
        (1.0, 0.5, "length", True),
        (2.0, 0.0, "stop", True),
        (2.001, 0.0, "stop", False),
        (0.0, 0.5001, "stop", False),
        (1.0, 0.5, "ReplicaLost", False),
        (1.0, 0.5, "cancelled", False),
    ],
)
def test_a_sequence_within_its_slo_is_goodput(
    model: str, ttft_s: float, decoding_s: float, end: str, is_good: bool
) -> None:
    """11 tokens, so 10 gaps of 50 ms each on average, be they in few deltas or many."""
    now = 0.0
    record = begun(model, lambda: now, slo=SloConfig(ttft_ms=2000, itl_ms=50))
    now = ttft_s
    record.progress.take(TokenDelta([1]))
    now = ttft_s + decoding_s
    record.progress.take(TokenDelta([2] * 10))
    record.on_end(end)
    assert count("baton_sequences_within_slo_total", model=model) == is_good


@pytest.mark.parametrize("leaves", [False, True])
def test_a_pause_in_which_a_sequence_gave_way_is_no_failure_of_the_service(model: str, leaves: bool) -> None:
    now = 0.0
    record = begun(model, lambda: now, slo=SloConfig(ttft_ms=2000, itl_ms=50))
    record.progress.take(TokenDelta([1]))
    record.progress.pause()
    now = 100.0
    if leaves:
        record.on_end("cancelled")
        assert count("baton_sequences_total", model=model, end="cancelled") == 1
        return
    record.progress.begin_attempt("preempted")
    now = 100.4
    record.progress.take(TokenDelta([2] * 9))
    record.on_end("length")
    assert count("baton_sequences_within_slo_total", model=model) == 1


@pytest.mark.parametrize(
    ("token_at", "left_at", "end"),
    [(None, 2.0, "cancelled"), (None, 2.1, "gave_up"), (1.9, 3.9, "cancelled"), (1.9, 4.0, "gave_up")],
)
def test_a_client_that_leaves_after_too_long_a_wait_has_given_up_and_any_other_is_no_failure(
    model: str, token_at: float | None, left_at: float, end: str
) -> None:
    """Whether it waits for the first token or, of an engine that hangs in the middle, for another one."""
    now = 0.0
    record = begun(model, lambda: now, slo=SloConfig(ttft_ms=2000, itl_ms=50))
    if token_at is not None:
        now = token_at
        record.progress.take(TokenDelta([1]))
    now = left_at
    record.on_end("cancelled")
    counts = {each: count("baton_sequences_total", model=model, end=each) for each in ("cancelled", "gave_up")}
    assert counts == {"cancelled": 0, "gave_up": 0, end: 1}


def test_goodput_is_0_and_not_unknown_where_no_sequence_was_good(model: str) -> None:
    begun(model).on_end("NoReplica")
    assert REGISTRY.get_sample_value("baton_sequences_within_slo_total", {"model": model}) == 0


def test_metrics_that_fail_end_nothing(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = begun(model)
    monkeypatch.setattr("app.frontend.sequence_record._labelled", lambda *_: 1 / 0)
    monkeypatch.setattr(record, "_gaps", None)
    record.on_decision(decision())
    for _ in range(2):
        record.progress.take(TokenDelta([1, 2]))
    record.on_end("stop")
    assert (record.num_attempts, record.output_tokens) == (1, 4)


@pytest.mark.parametrize("reason", get_args(ResumeReason))
def test_a_resumed_sequence_says_how_long_its_client_waited(
    model: str, reason: ResumeReason, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    made = begun(model, lambda: now)
    made.on_decision(decision())
    for passed_s, delta in ((0.1, TokenDelta([1], report=REMOTE)), (0.02, TokenDelta([2]))):
        now += passed_s
        made.progress.take(delta)
    made.progress.begin_attempt(reason)
    made.on_decision(decision())
    for passed_s, delta in ((1.5, TokenDelta([3], report=REMOTE)), (0.02, TokenDelta([4], finish_reason="stop"))):
        now += passed_s
        made.progress.take(delta)
    made.on_end("stop")
    said = fields(caplog)
    assert (said["resumed_after_ms"], said["output_tokens"], said["ttft_ms"]) == ("1500.0", "4", "100.0")
    assert (said["resume_reasons"], said["resumed_cached_tokens"]) == (reason, str(REMOTE.cached_tokens))
    assert count("baton_resume_gap_seconds_sum", model=model, reason=reason) == 1.5
    assert count("baton_inter_token_latency_seconds_sum", model=model) == pytest.approx(0.04)
    assert count("baton_prefills_total", model=model, kind="remote", reason="") == 1


@given(st.lists(st.floats(0, 100) | st.sampled_from([0.001, 0.025, 10.0, 60.0]), max_size=20))
def test_gaps_are_counted_as_by_prometheus_own_histogram(gaps_s: list[float]) -> None:
    registry, latency = CollectorRegistry(), InterTokenLatency()
    name, buckets = "baton_inter_token_latency_seconds", _LATENCY_BUCKETS_S
    theirs = Histogram(name, "", ["model"], buckets=buckets, registry=registry).labels("m")
    for gap_s in gaps_s:
        latency.of("m").observe(gap_s)
        theirs.observe(gap_s)
    (family,) = latency.collect()
    for sample in family.samples:
        assert registry.get_sample_value(sample.name, sample.labels) == pytest.approx(sample.value)
    assert len(family.samples) == (len(buckets) + 3) * bool(gaps_s)


def test_clocks_that_disagree_do_not_make_a_sum_fall(model: str) -> None:
    served(model, msgspec.structs.replace(REMOTE, phases={"delivery": -60.0}))
    assert count("baton_hop_phase_seconds_count", model=model, phase="delivery") == 1
    assert count("baton_hop_phase_seconds_sum", model=model, phase="delivery") == 0
