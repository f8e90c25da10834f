"""The campaign of faults: how answers are judged, counted for faults, and which faults are drawn."""

from __future__ import annotations

import signal
from random import Random
from typing import Any

import psutil
import pytest

from benchmarks.faults.kinds import draw, kinds
from benchmarks.faults.load import Answer, End, draw_questions, judge
from benchmarks.faults.process_faults import FOR_GOOD_S, ProcessFault, send_signal
from benchmarks.faults.report import Struck, summarise

RIGHT = "one two three"


def answer(began_at: float = 0.0, ended_at: float = 1.0, **fields: Any) -> Answer:
    return Answer(0, began_at, ended_at, **{"status": 200, **fields})


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"text": RIGHT, "is_whole": True}, "right"),
        ({"text": "one two", "is_whole": True}, "wrong"),
        ({"text": "one four", "is_whole": True}, "wrong"),
        ({"text": "one four", "has_error_event": True}, "wrong"),
        ({"text": "one two", "has_error_event": True}, "ended"),
        ({"text": "one two"}, "cut"),
        ({"status": 0}, "cut"),
        ({"status": 503}, "refused"),
        ({"status": 429}, "refused"),
        ({"status": 500}, "wrong"),
        ({"status": 400}, "wrong"),
        ({"text": "one", "has_timed_out": True}, "hung"),
    ],
)
def test_an_answer_is_judged_by_its_text_and_its_end(fields: dict[str, Any], end: End) -> None:
    assert judge(answer(**fields), RIGHT) == end


def test_an_answer_counts_for_the_faults_during_which_it_was_under_way() -> None:
    struck = [
        Struck("kill", 10.0, 20.0, 5.0),
        Struck("stop", 30.0, 40.0, None, "was not replaced"),
        Struck("kill", 50.0, 60.0, 7.0),
    ]
    answers = [
        answer(0.0, 9.0, text="another", is_whole=True),  # before
        answer(9.0, 11.0, text=RIGHT, is_whole=True, heard_at=[9.5, 11.0]),
        answer(
            19.0, 45.0, text=RIGHT, is_whole=True, heard_at=[19.5, 21.0, 28.0, 33.0]
        ),  # the first did not make it stall
        answer(19.0, 31.0, text="one", has_error_event=True),  # nor did it end this one
        answer(55.0, 56.0, status=503),
    ]
    kill, stop = summarise(struck, answers, [RIGHT], lags=[(5.0, 9.0), (15.0, 0.25)])
    assert (kill.name, kill.num_faults, kill.recoveries_s, kill.problems) == ("kill", 2, [5.0, 7.0], [])
    assert kill.ends == {"right": 2, "refused": 1}
    assert (kill.longest_stall_s, kill.longest_lag_s) == (1.5, 0.25)
    assert (stop.ends, stop.recoveries_s, stop.problems) == ({"right": 1, "ended": 1}, [], ["was not replaced"])
    assert (stop.longest_stall_s, stop.longest_lag_s) == (5.0, 0.0)


def test_each_kind_comes_once_a_round_and_the_seed_decides_the_order() -> None:
    found = kinds("vllm")
    names = [fault.name for fault in draw(found, 2 * len(found), Random(1))]
    assert sorted(names[: len(found)]) == sorted(names[len(found) :]) == sorted(kind.name for kind in found)
    assert names == [fault.name for fault in draw(found, 2 * len(found), Random(1))]
    assert names != [fault.name for fault in draw(found, 2 * len(found), Random(2))]


def test_simulated_engines_have_no_processes_of_their_own() -> None:
    assert not [kind for kind in kinds("sim") if isinstance(kind, ProcessFault) and "engine" in kind.target]
    assert ProcessFault("decode engine", "stop", FOR_GOOD_S) in kinds("vllm")


def test_a_signal_reaches_the_processes_that_are_there() -> None:
    gone, there = (psutil.Popen(["sleep", "60"]) for _ in range(2))
    gone.kill()
    gone.wait()
    send_signal([gone, there], signal.SIGKILL)
    assert there.wait(10) == -signal.SIGKILL


def test_questions_are_drawn_by_the_seed() -> None:
    assert draw_questions(4, 1) == draw_questions(4, 1) != draw_questions(4, 2)
