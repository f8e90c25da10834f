"""Faults inside processes: the agent that makes them, and that each of them does what its name says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import pytest

from app import background
from app.background import BackgroundTasks
from app.handoff_seal import damage, misplacement, seal
from app.messages import GenerateRequest, TokenDelta, TransferDescriptor
from benchmarks.faults import inside, inside_engine
from benchmarks.faults.agent_calls import AGENT, call, with_agents
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.engine_faults import EngineFault, engine_faults
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.inside_faults import OF_DECODE, OF_ENGINES, OF_REPLICAS
from benchmarks.faults.machine_faults import MemoryPressure, machine_faults
from tests.unit.deployments import test_background_tasks as owned
from tests.unit.waiting import until


@pytest.fixture
def process() -> Iterator[int]:
    """A process with the agent, as the application's processes have it; its id."""
    environment = {**os.environ, "PYTHONPATH": f"{AGENT}:{AGENT.parents[2]}"}
    code = "import time\nprint(flush=True)\nwhile True: time.sleep(0.02)"
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        started.stdout.readline()
        yield started.pid
        started.kill()


def test_the_agent_calls_functions_in_its_process(process: int) -> None:
    assert call(process, "os:getpid") == process
    with pytest.raises(RuntimeError, match="No module named 'nowhere'"):
        call(process, "nowhere:f")
    assert call(process, "os:getppid") == os.getpid()


def test_without_an_agent_there_is_an_error() -> None:
    with pytest.raises(LookupError, match="no agent that answers"):
        call(os.getpid(), "os:getpid")


def test_each_deployment_gets_the_agent_and_keeps_its_own_environment() -> None:
    args: dict[str, Any] = {
        "models": [{"name": "m", "prefill": {"environment": {"A": "1"}}, "decode": {}}],
        "limits": {},
    }
    made = with_agents(args)
    (model,) = made["models"]
    for section in (made["frontend"], model["prefill"], model["decode"]):
        assert section["environment"]["PYTHONPATH"].startswith(f"{AGENT}:")
    assert model["prefill"]["environment"]["A"] == "1"
    assert "aggregated" not in model
    assert made["limits"] == {}
    assert args["models"][0]["decode"] == {}, "what was given stays as it was"


def test_all_tasks_of_replicas_are_struck() -> None:
    of_sequences_and_channels = {"send-", "sequence-"}
    assert {*OF_REPLICAS, *OF_ENGINES["sim"]} - of_sequences_and_channels == owned.OF_BOTH
    assert set(OF_DECODE) == owned.OF_DECODE


async def test_an_exception_arrives_where_a_task_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FIRST_PAUSE_S", 0.01)
    begun: list[int] = []

    async def work() -> None:
        begun.append(1)
        await asyncio.sleep(3600)

    tasks = BackgroundTasks("test", lambda death: None)
    tasks.keep("a-task-of-this-test", work)
    await until(lambda: len(begun) == 1)
    before = await asyncio.to_thread(inside.tasks)
    assert before["a-task-of-this-test"].split()[:2] == ["_keep", "work"]
    assert await asyncio.to_thread(inside.throw, "a-task-of") == "a-task-of-this-test"
    await until(lambda: len(begun) == 2)
    assert (await asyncio.to_thread(inside.tasks))["a-task-of-this-test"] == before["a-task-of-this-test"]
    await tasks.stop()


async def test_there_is_no_throwing_into_a_task_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "REPLY_TIMEOUT_S", 0.2)
    background.watch(waiting := asyncio.create_task(asyncio.sleep(3600), name="here"), lambda _: None)
    with pytest.raises(LookupError, match="no task elsewhere"):
        await asyncio.to_thread(inside.throw, "elsewhere")
    waiting.cancel()


def test_a_wall_clock_is_wrong_in_one_process_only(process: int) -> None:
    shown = call(process, "benchmarks.faults.inside:skew_clock", skew_s=-60)
    assert -62 < shown - time.time() < -58
    assert abs(call(process, "time:time") - shown) < 2
    assert abs(call(process, "benchmarks.faults.inside:skew_clock", skew_s=0) - time.time()) < 2


def test_one_call_raises_and_the_next_goes_on() -> None:
    function = "benchmarks.faults.inside_engine:is_waiting"
    inside_engine.break_call(function)
    with pytest.raises(inside.Thrown, match="is_waiting"):
        inside_engine.is_waiting(function)
    assert not inside_engine.is_waiting(function)


def test_what_a_process_has_not_loaded_is_not_there(process: int) -> None:
    with pytest.raises(LookupError, match="has not loaded sqlite3"):
        call(process, "benchmarks.faults.inside_engine:break_call", function="sqlite3:connect")
    with pytest.raises(LookupError, match="no thread nixl"):
        call(process, "benchmarks.faults.inside_engine:throw_into_thread", name="nixl")


def test_a_thread_ends_by_what_is_thrown_into_it() -> None:
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            while True:
                time.sleep(0.01)
        except inside.Thrown as thrown:
            ended.append(thrown)

    thread = threading.Thread(target=wait, name="one-of-this-test", daemon=True)
    thread.start()
    assert inside_engine.throw_into_thread("of-this-test") == "one-of-this-test"
    thread.join(30)
    assert ended


class OneEngine(Fleet):
    """An application whose engines are one process."""

    def __init__(self, pid: int) -> None:
        super().__init__("http://nowhere", "tiny")
        self.pid = pid

    async def victims(self, target: str) -> list[list[psutil.Process]]:
        return [[psutil.Process(self.pid)]]

    def replica_of(self, engine: psutil.Process) -> psutil.Process:
        return engine


@pytest.mark.parametrize(
    ("where", "then", "problem"),
    [
        ("MainThread", "ends", ""),
        ("MainThread", "goes on", "has ended"),
        ("benchmarks.faults.inside:throw", "ends", "goes on without its part"),
        ("sqlite3:connect", "ends", "has sqlite3:connect"),
        ("benchmarks.faults.inside:tasks", "goes on", "nobody called"),
    ],
)
async def test_an_engine_has_to_end_or_to_go_on(
    process: int, monkeypatch: pytest.MonkeyPatch, where: str, then: Any, problem: str
) -> None:
    for name in ("COMES_S", "REPLACED_S"):
        monkeypatch.setattr(f"benchmarks.faults.engine_faults.{name}", 0.2 if problem else 30.0)
    monkeypatch.setattr("benchmarks.faults.engine_faults.GOES_ON_S", 30.0)
    call(process, "benchmarks.faults.inside:skew_clock", skew_s=0)  # loads the module
    fleet = OneEngine(process)
    striking = EngineFault("decode engine", "part", where, then).strike(fleet, Random(0))
    if problem:
        with pytest.raises((BadAnswer, LookupError), match=problem):
            await striking
    else:
        await striking
    await fleet.close()


def test_simulated_engines_have_no_processes_to_raise_in() -> None:
    assert not engine_faults("sim")
    for engine in ("vllm", "sglang"):
        names = [fault.name for fault in engine_faults(engine)]
        assert len(names) == len(set(names)) > 5


REQUEST = GenerateRequest(request_id="new", prompt_token_ids=[1, 2, 3], sampling={})
VLLM = {"remote_block_ids": [[4, 5]], "remote_engine_id": "a", "remote_host": "h", "remote_port": 5600}
SIM = {"host": "h", "port": 5600, "handle": "x", "num_blocks": 1}


def descriptor(params: dict[str, Any], name: str, ready_at: float) -> TransferDescriptor:
    made = TransferDescriptor(
        engine="e",
        replica_id="p",
        request_id=name,
        prompt_tokens=3,
        cached_tokens=0,
        ready_at=ready_at,
        lease_s=12.0,
        params={**params, "handle": name} if "handle" in params else params,
        first_token=TokenDelta([7]) if "handle" not in params else None,
    )
    return seal(made, msgspec.structs.replace(REQUEST, request_id=name, prompt_token_ids=[len(name)]))


@pytest.mark.parametrize("params", [VLLM, SIM], ids=["vllm", "sim"])
@pytest.mark.parametrize("change", inside.CHANGES)
def test_decode_notices_each_change_of_a_descriptor(
    params: dict[str, Any], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiler = inside.Spoiler()
    spoiler._seen = [descriptor(params, "expired", 0.0), descriptor(params, "older", 90.0)]
    monkeypatch.setattr(inside, "_spoiler", spoiler)
    right = seal(descriptor(params, "new", 100.0), REQUEST)
    assert damage(right) == misplacement(right, REQUEST) == ""
    try:
        came = inside.CHANGES[change](right)
    except msgspec.DecodeError:
        assert change == "truncated"
        return
    assert damage(came) or misplacement(came, REQUEST)
    if change in ("older", "expired"):
        assert came.request_id == change


def test_a_machine_that_is_not_bounded_is_left_alone(tmp_path: Path) -> None:
    limit = tmp_path / "memory.limit_in_bytes"
    assert machine_faults(str(tmp_path), tmp_path) == []
    limit.write_text(str(2**62))
    assert machine_faults(None, tmp_path) == []
    limit.write_text(str(2**20))
    assert machine_faults(None, tmp_path) == [MemoryPressure()]
