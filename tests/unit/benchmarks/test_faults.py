"""The campaign of faults: how answers are judged, counted for faults, and which faults are drawn."""

from __future__ import annotations

import asyncio
import signal
from random import Random
from typing import Any, cast

import psutil
import pytest

from benchmarks.faults.fleet import Fleet
from benchmarks.faults.kinds import draw, kinds
from benchmarks.faults.load import Answer, End, judge
from benchmarks.faults.process_faults import FOR_GOOD_S, ProcessFault, send_signal
from benchmarks.faults.questions import SORTS, draw_questions
from benchmarks.faults.report import Struck, summarise
from benchmarks.faults.storm import Storm

TEXT = "one two three"


def answer(began_at: float = 0.0, ended_at: float = 1.0, text: str = "", **fields: Any) -> Answer:
    return Answer(0, began_at, ended_at, **{"status": 200, "texts": [text], **fields})


RIGHT = answer(text=TEXT, is_whole=True)


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"text": TEXT, "is_whole": True}, "right"),
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


def test_each_choice_and_all_log_probabilities_are_compared() -> None:
    right = answer(texts=["one two", "three"], logprobs=[-1.0, -2.0, -3.0], is_whole=True)
    assert judge(answer(texts=["one", "three"], logprobs=[-1.0, -2.0001], has_error_event=True), right) == "ended"
    assert judge(answer(texts=["one", "two"], has_error_event=True), right) == "wrong"
    assert judge(answer(texts=right.texts, logprobs=[-1.0, -2.0001, -3.0], is_whole=True), right) == "right"
    assert judge(answer(texts=right.texts, logprobs=[-1.0, -2.1, -3.0], is_whole=True), right) == "wrong"
    assert judge(answer(texts=right.texts, logprobs=[-1.0, -2.0], is_whole=True), right) == "wrong"
    assert judge(answer(texts=right.texts[:1], is_whole=True), right) == "wrong"


def test_an_answer_counts_for_the_faults_during_which_it_was_under_way() -> None:
    struck = [
        Struck("kill", 10.0, 20.0, 5.0),
        Struck("stop", 30.0, 40.0, None, "was not replaced"),
        Struck("kill", 50.0, 60.0, 7.0),
    ]
    answers = [
        answer(0.0, 9.0, text="another", is_whole=True),  # before
        answer(9.0, 11.0, text=TEXT, is_whole=True, heard_at=[9.5, 11.0]),
        answer(
            19.0, 45.0, text=TEXT, is_whole=True, heard_at=[19.5, 21.0, 28.0, 33.0]
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


async def test_a_storm_takes_one_after_another_and_never_the_last() -> None:
    there = [psutil.Popen(["sleep", "60"]) for _ in range(5)]

    class Pool:
        pools = {"decode": 2}  # noqa: RUF012

        async def processes(self, target: str) -> list[list[psutil.Process]]:
            return [[process] for process in there if process.poll() is None]

    try:
        storm = Storm("decode replica", "kill", 4)
        await storm.strike(cast("Fleet", Pool()), Random(1))
        running = [process for process in there if process.poll() is None]
        assert len(running) in (1, 2)  # the last one killed may not be gone yet
    finally:
        for process in there:
            if process.poll() is None:
                process.kill()
            process.wait(10)


async def test_a_storm_of_stops_is_over_when_all_that_it_stopped_are_gone() -> None:
    there = [psutil.Popen(["sleep", "60"]) for _ in range(3)]

    class Pool:
        pools = {"decode": 2}  # noqa: RUF012

        async def processes(self, target: str) -> list[list[psutil.Process]]:
            return [[process] for process in there if process.poll() is None]

    try:
        strike = asyncio.create_task(Storm("decode replica", "stop", 1).strike(cast("Fleet", Pool()), Random(1)))
        async with asyncio.timeout(20):
            while not (stopped := [each for each in there if each.status() == psutil.STATUS_STOPPED]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        done, _ = await asyncio.wait([strike], timeout=0.5)
        assert not done, "it is stopped, and nobody has replaced it"
        stopped[0].kill()
        assert (await strike).startswith("1 in")
    finally:
        for process in there:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def test_questions_are_drawn_by_the_seed() -> None:
    assert draw_questions(4, 1) == draw_questions(4, 1) != draw_questions(4, 2)
    sorts = list(SORTS.values())
    assert len({str(sorted(question.fields)) for question in draw_questions(len(sorts), 1, sorts)}) > 4
