"""A process whose loop stands still is killed, even if it was stopped; no other is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from deployments.guard import NAME
from tests.conftest import REPOSITORY, wait_until

STILL_S = 1.0
BEATING = f"""
import asyncio, sys, time
from deployments import guard

async def main():
    beating = asyncio.create_task(guard.be_guarded({STILL_S}))
    while not guard._guards or guard._guards[0].returncode is None:
        await asyncio.sleep(0.01)
    print("guarded", flush=True)
    word = await asyncio.to_thread(sys.stdin.readline)
    if word == "hang\\n":
        time.sleep(60)
    elif word == "drain\\n":
        beating.cancel()
        await asyncio.sleep(60)

asyncio.run(main())
"""


def guards_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    named = [each for each in psutil.process_iter(["cmdline"]) if NAME in (each.info["cmdline"] or ())]
    return [each for each in named if str(process.pid) in each.info["cmdline"]]


@pytest.fixture
def guarded() -> Iterator[subprocess.Popen[str]]:
    """A process with a guard.  It ends in order when told to, or hangs."""
    process = subprocess.Popen(
        [sys.executable, "-c", BEATING],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "guarded\n"
    (guard,) = guards_of(process)
    yield process
    was_killed = process.poll() == -signal.SIGKILL
    process.kill()
    process.wait()
    wait_until(lambda: not guard.is_running(), 10, "the guard ends with whom it guards")
    _, said = process.communicate()
    its_word = f"baton guard: process {process.pid} gave no sign of life for {STILL_S:g} s and was killed\n"
    assert said == (its_word if was_killed else "")


def tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(word)
    process.stdin.flush()


def test_a_stopped_process_is_killed(guarded: subprocess.Popen[str]) -> None:
    guarded.send_signal(signal.SIGSTOP)
    assert guarded.wait(20) == -signal.SIGKILL


def test_who_kills_all_that_the_process_has_started_does_not_kill_its_guard(guarded: subprocess.Popen[str]) -> None:
    """As SGLang does when it stops."""
    assert psutil.Process(guarded.pid).children(recursive=True) == []
    assert len(guards_of(guarded)) == 1


@pytest.mark.parametrize("word", ["hang\n", "drain\n"])
def test_a_loop_that_hangs_and_one_that_has_drained_are_killed(guarded: subprocess.Popen[str], word: str) -> None:
    tell(guarded, word)
    assert guarded.wait(20) == -signal.SIGKILL


def test_one_that_runs_is_not(guarded: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 3 * STILL_S
    wait_until(lambda: time.monotonic() > deadline, 30, "three times as long as a loop may stand still")
    assert guarded.poll() is None
    tell(guarded, "\n")
    assert guarded.wait(20) == 0


def test_a_guard_that_gets_no_more_signs_of_life_after_an_error_is_no_danger() -> None:
    """The task is started again then, with a guard of its own."""
    code = f"""
import asyncio
from deployments import guard

async def main():
    beating = asyncio.create_task(guard.be_guarded({STILL_S}))
    await asyncio.sleep(0.3)
    beating._fut_waiter.set_exception(RuntimeError("thrown in"))
    await asyncio.wait([beating])
    assert "thrown in" in str(beating.exception())
    await asyncio.sleep({3 * STILL_S})

asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment).returncode == 0
