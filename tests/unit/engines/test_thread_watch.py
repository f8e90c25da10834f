"""An engine's process ends when one of the engine's threads has died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from app.engines.plugins.owner_watch import OWNER_VARIABLE
from tests.conftest import REPOSITORY

CODE = """
import threading
from app.engines.plugins.owner_watch import register
register()
namespace = {"__name__": "MODULE"}
exec("def work(): raise ERROR('of this test')", namespace)
thread = threading.Thread(target=namespace["work"])
thread.start()
thread.join()
print("goes on")
"""


def run(module: str, error: str, owner: int) -> subprocess.CompletedProcess[str]:
    """Run a process in which a thread of `module` raises `error`, as one that the process `owner` has started."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), OWNER_VARIABLE: str(owner)}
    code = CODE.replace("MODULE", module).replace("ERROR", error)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("module", ["vllm.v1.engine.core", "sglang.srt.disaggregation.nixl.conn"])
def test_a_process_ends_with_a_thread_of_the_engine(module: str) -> None:
    ended = run(module, "ValueError", os.getpid())
    assert ended.returncode == -signal.SIGKILL
    assert "ValueError: of this test" in ended.stderr
    assert "A thread of the engine has died" in ended.stderr


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("vllm.usage.usage_lib", "ValueError"),
        ("vllm_other", "ValueError"),
        ("concurrent.futures.thread", "ValueError"),
        ("vllm.v1.engine.core", "SystemExit"),
    ],
)
def test_it_goes_on_without_others(module: str, error: str) -> None:
    assert run(module, error, os.getpid()).stdout == "goes on\n"


@pytest.mark.parametrize("is_full", [True, False], ids=["a full disk", "a pipe that nobody reads"])
def test_a_process_ends_that_cannot_say_why(is_full: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), OWNER_VARIABLE: str(os.getpid())}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open("/dev/full" if is_full else writing, "wb", buffering=0, closefd=is_full) as nowhere:
        while not is_full and nowhere.write(bytes(4096)) is not None:
            pass
        os.set_blocking(writing, True)
        code = CODE.replace("MODULE", "vllm.v1").replace("ERROR", "ValueError")
        ended = subprocess.run([sys.executable, "-c", code], env=environment, stderr=nowhere, timeout=60, check=False)
    os.close(reading)
    os.close(writing)
    assert ended.returncode == -signal.SIGKILL


def test_a_process_that_no_replica_owns_is_left_alone() -> None:
    code = CODE.replace("MODULE", "vllm.v1").replace("ERROR", "ValueError")
    environment = {name: value for name, value in os.environ.items() if name != OWNER_VARIABLE}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout == "goes on\n"


FORKS = """
import os, threading
from app.engines.plugins import thread_watch
from app.engines.plugins.owner_watch import register
register()
thread_watch.LAST_S = 0.1
if (child := os.fork()) == 0:
    threading.Thread(target=threading.Event().wait, args=(600,)).start()
else:
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_forked_process_ends_with_its_main_thread_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKS],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), OWNER_VARIABLE: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout == f"{signal.SIGKILL:d}\n"


MAIN_ENDS = """
import threading
from app.engines.plugins import thread_watch
from app.engines.plugins.owner_watch import register
register()
thread_watch.LAST_S = PATIENCE
threading.Thread(target=threading.Event().wait, args=(SECONDS,)).start()
print("main ends", flush=True)
"""


@pytest.mark.parametrize(("last", "seconds", "code"), [("0.1", "600", -signal.SIGKILL), ("600", "0.1", 0)])
def test_a_process_ends_soon_after_its_main_thread_whatever_else_runs(last: str, seconds: str, code: int) -> None:
    script = MAIN_ENDS.replace("PATIENCE", last).replace("SECONDS", seconds)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), OWNER_VARIABLE: str(os.getpid())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (code, "main ends\n")
