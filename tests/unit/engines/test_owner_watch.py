"""An engine's processes end with the replica that owns them, however it ends."""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.engines.plugins.owner_watch import OWNER_VARIABLE, register
from tests.conftest import REPOSITORY

DEADLINE_S = 10.0

FAMILY = """
import asyncio, os, signal, subprocess, sys
from app.engines.plugins.owner_watch import owner_environment, register

def start_child():
    subprocess.Popen([sys.executable, __file__, str(generation + 1)])

async def own():
    os.environ.update(owner_environment())
    await asyncio.to_thread(start_child)
    print(os.getpid(), flush=True)
    await asyncio.Event().wait()

generation = int(sys.argv[1])
if generation == 0:
    asyncio.run(own())
register()
if generation == 1:
    start_child()
print(os.getpid(), flush=True)
signal.pause()
"""
"""An owner that starts an engine process, as replicas do, that starts a worker process; each prints its id."""

TWICE = """
import threading
from app.engines.plugins.owner_watch import register
register()
register()
print(sum(thread.name == "baton-owner-watch" for thread in threading.enumerate()))
"""


def environment(owner: int | None = None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name != OWNER_VARIABLE}
    marked = {} if owner is None else {OWNER_VARIABLE: str(owner)}
    return {**clean, **marked, "PYTHONPATH": str(REPOSITORY)}


def run(code: str, owner: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(owner), capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The owner and the ids of its child and grandchild."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    command = [sys.executable, str(script), "0"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids = [int(owner.stdout.readline()) for _ in range(3)]
        descriptors = [os.pidfd_open(pid) for pid in pids if pid != owner.pid]
        yield owner, descriptors
        owner.kill()
        for descriptor in descriptors:
            if not select.select([descriptor], [], [], 0)[0]:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)


def test_child_and_grandchild_die_with_an_owner_that_is_killed(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    owner, descendants = family
    assert not select.select(descendants, [], [], 0.5)[0], "the end of the call that started it is not the owner's"
    owner.kill()
    for descriptor in descendants:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], "still alive"


def test_they_die_with_it_even_if_they_are_stopped(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    owner, descendants = family
    for descriptor in descendants:
        signal.pidfd_send_signal(descriptor, signal.SIGSTOP)
    owner.kill()
    for descriptor in descendants:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], "still alive"


def test_a_process_whose_owner_is_already_gone_dies_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert run(TWICE, owner=gone.pid).returncode == -signal.SIGKILL


def test_registering_twice_watches_once() -> None:
    assert run(TWICE, owner=os.getpid()).stdout.split() == ["1"]


@pytest.mark.parametrize("owner", [None, os.getpid()], ids=["no owner", "the owner itself"])
def test_nothing_is_watched_without_an_owner_to_watch(owner: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if owner is None:
        monkeypatch.delenv(OWNER_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(OWNER_VARIABLE, str(owner))
    before = threading.enumerate()
    register()
    assert threading.enumerate() == before
