"""What tells an engine that hangs from one that computes, compiles or waits."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from app.engines import progress as module
from app.engines.processes import EngineProcesses
from app.engines.progress import ProgressWatch
from app.errors import EngineDead
from tests.conftest import REPOSITORY
from tests.unit.waiting import PATIENCE_S, until

FLOOR_S, CEILING_S = 0.2, 1.0


class Engine:
    """An engine whose answers and processes the test plays."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.answers_after_s: float | None = 0.0
        self.is_busy = True
        self.uses_cpu = False
        self.pids_stopped: list[int] = []
        self._now, self._cpu_s = time.monotonic(), 0.0

    async def ask(self) -> None:
        self.num_asked += 1
        await (asyncio.Event().wait() if self.answers_after_s is None else asyncio.sleep(self.answers_after_s))

    def look(self) -> None: ...

    def stopped(self) -> list[int]:
        return self.pids_stopped

    def cpu_s(self) -> float:
        now = time.monotonic()
        if self.uses_cpu:
            self._cpu_s += now - self._now
        self._now = now
        return self._cpu_s


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    times = {"REST_S": 0.01, "POLL_S": 0.01, "LOOK_S": 0.02, "IDLE_FLOOR_S": FLOOR_S, "IDLE_CEILING_S": CEILING_S}
    for name, value in {**times, "WORKING_FLOOR_S": 0.5, "WORKING_CEILING_S": CEILING_S, "NUM_FIRST_STEPS": 0}.items():
        monkeypatch.setattr(module, name, value)
    return Engine()


async def lifetime_s(watch: ProgressWatch) -> float:
    """Run `watch` until it says that the engine hangs, and return for how long by its own count."""
    with pytest.raises(EngineDead) as death:
        await asyncio.wait_for(watch.run(), PATIENCE_S)
    return counted_s(death.value)


def counted_s(death: EngineDead) -> float:
    found = re.match(r"the engine hangs: it made no step for ([0-9.]+) s", str(death))
    assert found is not None
    return float(found[1])


async def test_an_engine_that_answers_and_does_nothing_else_lives(engine: Engine) -> None:
    """It has no requests, or these wait for KV from elsewhere."""
    running = asyncio.create_task(ProgressWatch(engine.ask, engine).run())
    await asyncio.sleep(2 * FLOOR_S)
    asked = engine.num_asked
    await until(lambda: engine.num_asked > asked + 2)
    assert not running.done()
    running.cancel()


async def test_an_engine_that_does_not_answer_hangs(engine: Engine) -> None:
    engine.answers_after_s = None
    assert FLOOR_S <= await lifetime_s(ProgressWatch(engine.ask, engine)) < 2 * FLOOR_S


async def test_an_engine_that_computes_or_compiles_is_given_more_time_but_not_any(engine: Engine) -> None:
    engine.answers_after_s, engine.uses_cpu = None, True
    assert await lifetime_s(ProgressWatch(engine.ask, engine)) >= 0.5


async def test_an_engine_that_compiles_for_its_first_steps_is_given_as_long_as_any(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_FIRST_STEPS", 2)
    engine.answers_after_s, engine.uses_cpu = None, True
    watch = ProgressWatch(engine.ask, engine)
    watch.on_step()
    assert await lifetime_s(watch) >= CEILING_S
    watch.on_step()
    assert await lifetime_s(watch) < CEILING_S


@pytest.mark.parametrize("is_stopped", [False, True])
async def test_an_engine_on_a_gpu_may_compute_while_its_processes_do_nothing(engine: Engine, is_stopped: bool) -> None:
    engine.answers_after_s, engine.pids_stopped = None, [7] if is_stopped else []
    assert (await lifetime_s(ProgressWatch(engine.ask, engine, is_on_gpu=True)) >= 0.5) is not is_stopped


async def test_an_engine_of_which_a_process_is_stopped_hangs_whatever_the_others_do(engine: Engine) -> None:
    engine.answers_after_s, engine.uses_cpu, engine.pids_stopped = None, True, [7]
    assert await lifetime_s(ProgressWatch(engine.ask, engine)) < 0.5


async def test_a_stopped_process_is_a_hang_even_if_another_one_answers(engine: Engine) -> None:
    engine.pids_stopped = [7]
    watch = ProgressWatch(engine.ask, engine)
    running = asyncio.create_task(watch.run())
    await asyncio.sleep(FLOOR_S / 2)
    engine.pids_stopped = []
    await until(lambda: engine.num_asked > 2)
    engine.pids_stopped = [7]
    with pytest.raises(EngineDead, match=r"processes \[7\] are stopped"):
        await asyncio.wait_for(running, PATIENCE_S)


async def test_an_engine_with_slow_steps_has_time_for_one_more(engine: Engine) -> None:
    engine.answers_after_s = 0.1
    watch = ProgressWatch(engine.ask, engine)
    running = asyncio.create_task(watch.run())
    await until(lambda: engine.num_asked >= 2)
    engine.answers_after_s = None
    asked = engine.num_asked
    await until(lambda: engine.num_asked > asked)
    with pytest.raises(EngineDead) as death:
        await asyncio.wait_for(running, PATIENCE_S)
    assert counted_s(death.value) >= 2 * FLOOR_S


async def test_what_it_took_to_compile_makes_nobody_wait_longer_for_an_engine_that_does_nothing(engine: Engine) -> None:
    engine.answers_after_s, engine.uses_cpu = 0.3, True

    async def ask() -> None:
        if engine.num_asked == 1:
            engine.answers_after_s, engine.uses_cpu = None, False
        await engine.ask()

    assert await lifetime_s(ProgressWatch(ask, engine)) < 2 * FLOOR_S


async def test_an_answer_is_forgotten_after_a_while(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_S", 0.0)
    engine.answers_after_s = 0.15
    watch = ProgressWatch(engine.ask, engine)
    running = asyncio.create_task(watch.run())
    await until(lambda: engine.num_asked >= 2)
    engine.answers_after_s = None
    asked = engine.num_asked
    await until(lambda: engine.num_asked > asked)
    with pytest.raises(EngineDead) as death:
        await asyncio.wait_for(running, PATIENCE_S)
    assert counted_s(death.value) < 2 * FLOOR_S


async def test_an_engine_that_makes_steps_is_not_asked_and_one_without_work_neither(engine: Engine) -> None:
    watch = ProgressWatch(engine.ask, engine, lambda: engine.is_busy)
    running = asyncio.create_task(watch.run())
    for _ in range(20):
        watch.on_step()
        await asyncio.sleep(0.002)
    engine.is_busy = False
    asked = engine.num_asked
    engine.answers_after_s, engine.pids_stopped = None, [7]
    await asyncio.sleep(2 * FLOOR_S)
    assert engine.num_asked <= asked + 1
    assert not running.done()
    running.cancel()


async def test_steps_count_as_an_answer(engine: Engine) -> None:
    engine.answers_after_s = None
    watch = ProgressWatch(engine.ask, engine)
    running = asyncio.create_task(watch.run())
    for _ in range(20):
        await asyncio.sleep(FLOOR_S / 10)
        watch.on_step()
    assert not running.done()
    running.cancel()


async def test_time_in_which_this_process_did_not_run_is_not_counted(engine: Engine) -> None:
    engine.answers_after_s = 0.05
    watch = ProgressWatch(engine.ask, engine)
    running = asyncio.create_task(watch.run())
    await until(lambda: engine.num_asked)
    time.sleep(2 * FLOOR_S)  # noqa: ASYNC251  as if the host had paused
    asked = engine.num_asked
    await until(lambda: engine.num_asked > asked + 1)
    assert not running.done()
    running.cancel()


# The processes

TREE = """
import signal, subprocess, sys
if sys.argv[1:]:
    subprocess.Popen([sys.executable, "-c", "import signal; print(flush=True); signal.pause()"])
    signal.pause()
while True: pass
"""


def test_the_resource_tracker_is_left_to_remove_what_the_others_leave() -> None:
    processes = EngineProcesses()
    command = [sys.executable, "-c", "from multiprocessing.resource_tracker import main; print(flush=True); main(0)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracker:
        assert tracker.stdout is not None
        tracker.stdout.readline()
        processes.look()
        processes.kill()
        tracker.communicate(timeout=5)
    assert tracker.returncode == 0


@pytest.fixture
def tree() -> Iterator[tuple[EngineProcesses, list[psutil.Process]]]:
    """An engine's processes: one, its child, and one that burns the CPU."""
    stranger = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    processes = EngineProcesses()
    core = subprocess.Popen([sys.executable, "-c", TREE, "core"], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert core.stdout is not None
    core.stdout.readline()
    processes.look()
    yield processes, [psutil.Process(core.pid), *psutil.Process(core.pid).children()]
    assert stranger.poll() is None, "it is not of the engine"
    processes.kill()
    stranger.kill()
    for process in (core, stranger):
        process.wait()
    core.stdout.close()


def test_a_stopped_process_is_found(tree: tuple[EngineProcesses, list[psutil.Process]]) -> None:
    processes, (_, child) = tree
    assert processes.stopped() == []
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 5
    while processes.stopped() != [child.pid] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes.stopped() == [child.pid]


def test_the_table_of_processes_is_read_once_however_many_there_are(
    tree: tuple[EngineProcesses, list[psutil.Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read on the event loop, while the engine gives no sign of life."""
    processes, of_engine = tree
    readings: list[object] = []
    read = psutil.process_iter

    def reading() -> Any:
        readings.append(None)
        return read()

    monkeypatch.setattr(psutil, "process_iter", reading)
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: pytest.fail("which reads it for each"))
    processes.look()
    assert len(readings) == 1
    assert processes._known == set(of_engine)


def test_all_are_killed_even_if_they_are_stopped_and_their_parent_is_gone(
    tree: tuple[EngineProcesses, list[psutil.Process]],
) -> None:
    processes, (core, child) = tree
    os.kill(child.pid, signal.SIGSTOP)
    core.kill()
    core.wait(5)
    processes.kill()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_waits_for_the_cpu_counts_as_one_that_uses_it() -> None:
    processes = EngineProcesses()
    cpu = min(os.sched_getaffinity(0))
    idle = f"import os; os.sched_setaffinity(0, [{cpu}]); os.nice(19)\nwhile True: pass"
    starved = subprocess.Popen([sys.executable, "-c", idle])
    processes.look()
    busy = [subprocess.Popen([sys.executable, "-c", idle.replace("os.nice(19)", "")]) for _ in range(2)]
    try:
        before, deadline = processes.cpu_s(), time.monotonic() + 10
        while processes.cpu_s() < before + 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes.cpu_s() >= before + 1
    finally:
        for process in (starved, *busy):
            process.kill()
            process.wait()


def test_the_cpu_time_is_that_of_all(tree: tuple[EngineProcesses, list[psutil.Process]]) -> None:
    processes, _ = tree
    burner = subprocess.Popen([sys.executable, "-c", TREE])
    try:
        processes.look()
        before, deadline = processes.cpu_s(), time.monotonic() + 10
        while processes.cpu_s() < before + 0.1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert processes.cpu_s() >= before + 0.1
    finally:
        burner.kill()
        burner.wait()
