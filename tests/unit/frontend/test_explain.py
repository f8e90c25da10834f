"""What an explanation says, and that it fits into a header."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import SloConfig
from app.frontend.explain import MAX_HEADER_BYTES, explain, explain_header
from app.frontend.sequence_progress import SequenceProgress
from app.frontend.sequence_record import SequenceRecord
from app.messages import PrefillReport, Role, TokenDelta
from app.routing.decision import Candidate, Decision
from tests.unit.decisions import DECODE, PREFILL, decision, local_way, remote_way

REPORT = PrefillReport("local", "prefill_failed", None, "decode-1", 16, 0, "")


def record(*decisions: Decision) -> SequenceRecord:
    made = SequenceRecord(SequenceProgress(lambda delta: None), "m", "r", 100, slo=SloConfig(ttft_ms=500, itl_ms=30))
    for each in decisions:
        made.on_decision(each)
    return made


def candidate(number: int, num_scores: int = 2) -> Candidate:
    scores = {f"score-{index}": 0.123456 for index in range(num_scores)}
    return Candidate(f"replica-{number}", number, number, scores, 1.0)


def explained(*records: SequenceRecord) -> list[dict[str, Any]]:
    header = explain_header(records)
    assert len(header) <= MAX_HEADER_BYTES
    assert header.isascii()
    assert header.isprintable()  # no line break
    explanations: list[dict[str, Any]] = json.loads(header)
    return explanations


def test_an_explanation_says_what_was_decided_and_by_what() -> None:
    ways = [remote_way(lacks="prefill"), local_way(interference_s=0.001)]
    made = decision(ways=ways, others={"decode": [candidate(7)]}, waited_s=0.25)
    assert explain(record(made)) == {
        "kind": "remote",
        "reason": "faster",
        "prefill": {
            "replica": "prefill-1",
            "cached_tokens": 64,
            "queued_tokens": 10,
            "scores": {"prefix": 0.667, "queue": 1.0},
            "total": 1.667,
        },
        "decode": {
            "replica": "decode-1",
            "cached_tokens": 16,
            "queued_tokens": 0,
            "scores": {"prefix": 0.25, "queue": 1.0},
            "total": 1.25,
        },
        "expected": {
            "cached_tokens": 64,
            "ways": [
                {
                    "kind": "remote",
                    "serves": "decode",
                    "ttft_ms": 10.0,
                    "pull_ms": 0.0,
                    "queue_ms": 4.0,
                    "itl_ms": 20.0,
                    "interference_ms": 0.0,
                    "lacks": "prefill",
                },
                {
                    "kind": "local",
                    "serves": "decode",
                    "ttft_ms": 25.0,
                    "pull_ms": 0.0,
                    "queue_ms": 0.0,
                    "itl_ms": 30.0,
                    "interference_ms": 1.0,
                    "lacks": None,
                },
            ],
        },
        "actual": {
            "kind": None,
            "reason": None,
            "cached_tokens": None,
            "ttft_ms": None,
            "waited_for_kv": None,
            "phases": {},
        },
        "waited_ms": 250.0,
        "slo": {"ttft_ms": 500, "itl_ms": 30},
        "decided_us": 120.0,
        "attempts": 1,
        "resumed_after_ms": [],
        "resume_reasons": [],
        "resumed_cached_tokens": [],
        "others": {
            "decode": [
                {
                    "replica": "replica-7",
                    "cached_tokens": 7,
                    "queued_tokens": 7,
                    "scores": {"score-0": 0.123, "score-1": 0.123},
                    "total": 1.0,
                }
            ]
        },
    }


@pytest.mark.parametrize("role", ["aggregated", "prefill"])
def test_a_replica_that_serves_goes_by_its_role(role: Role) -> None:
    explanation = explain(record(decision(way=local_way(serving_role=role))))
    assert explanation is not None
    assert explanation[role]["replica"] == "decode-1"
    assert "decode" not in explanation
    if role != "prefill":
        assert explanation["prefill"] is None


def test_the_last_attempt_is_explained_and_what_came_of_it() -> None:
    made = record(decision(), decision(reason="only_way"))
    made.progress.take(TokenDelta([1], report=REPORT))
    explanation = explain(made)
    assert explanation is not None
    assert (explanation["reason"], explanation["attempts"]) == ("only_way", 2)
    actual = explanation["actual"]
    assert (actual["kind"], actual["reason"], actual["cached_tokens"]) == ("local", "prefill_failed", 16)
    assert actual["ttft_ms"] >= 0


def test_a_sequence_that_was_not_placed_is_left_out() -> None:
    assert explained(record(), record(decision())) == [explain(record(decision()))]
    assert explained(record()) == []


def test_all_is_said_where_it_fits() -> None:
    records = [record(decision(others={"decode": [candidate(1)]})), record(decision())]
    assert explained(*records) == [explain(each) for each in records]


@pytest.mark.parametrize(
    ("made", "is_left_out"),
    [
        ([record(decision(others={"decode": [candidate(n) for n in range(50)]}))], {"others"}),
        ([record(decision(others={"decode": [candidate(1)]})) for _ in range(7)], {"others"}),
        (
            [record(decision(way=remote_way(prefill=candidate(1, 250)), others={"decode": [candidate(1)]}))],
            {"others", "scores"},
        ),
    ],
    ids=["many others", "many sequences", "many scores"],
)
def test_others_are_left_out_before_scores(made: list[SequenceRecord], is_left_out: set[str]) -> None:
    for said, whole in zip(explained(*made), map(explain, made), strict=True):
        assert whole is not None
        assert said.keys() == whole.keys() - is_left_out
        assert said["prefill"].keys() == whole["prefill"].keys() - is_left_out
        assert said["actual"] == whole["actual"]


def test_sequences_that_do_not_fit_are_counted() -> None:
    *said, last = explained(*[record(decision()) for _ in range(50)])
    assert len(said) > 5
    assert last == {"omitted": 50 - len(said)}
    assert all(each["prefill"]["replica"] == PREFILL.replica for each in said)


@pytest.mark.parametrize("num_sequences", [1, 2, 5])
def test_a_header_is_full_before_anything_is_left_out(num_sequences: int) -> None:
    """Names grow byte by byte, so that one fills the header to the last."""

    def served_by(name: str) -> SequenceRecord:
        return record(decision(way=remote_way(serving=Candidate(name, 0, 0, {}, 0.0))))

    lengths = [len(explain_header([served_by("x" * n)] * num_sequences)) for n in range(4000 // num_sequences)]
    assert max(lengths) <= MAX_HEADER_BYTES
    assert MAX_HEADER_BYTES - max(lengths) < num_sequences


@given(
    num_sequences=st.integers(0, 40),
    num_others=st.integers(0, 20),
    num_scores=st.integers(0, 8),
    name=st.text(max_size=60),
)
def test_a_header_never_grows_too_large(num_sequences: int, num_others: int, num_scores: int, name: str) -> None:
    strange = Candidate(name, 10**6, 10**9, {f"{index}": 1 / 3 for index in range(num_scores)}, 1e9)
    made = decision(way=remote_way(serving=strange, prefill=strange), others={"decode": [strange] * num_others})
    said = explained(*[record(made) for _ in range(num_sequences)])
    omitted = said.pop()["omitted"] if said and "omitted" in said[-1] else 0
    assert len(said) + omitted == num_sequences
    assert all(each["prefill"]["replica"] == name for each in said)
    assert DECODE.replica not in json.dumps(said)
