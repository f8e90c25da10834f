"""`baton bench`: CPU time and memory of process trees."""

from __future__ import annotations

import subprocess
import sys

import pytest

from app.bench import processes
from app.bench.processes import Process, parse_stat, role_of
from app.bench.report import MIB

STAT = "42 (tmux: (x) y) S 7 42 42 0 -1 4194304 100 0 0 0 250 50 0 100 20 0 1 0 12345 1 1"


def test_stat_lines_are_parsed_whatever_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TICKS_PER_S", 100)
    assert parse_stat(STAT, "") == Process(42, 7, 12345, 4.0, "tmux: (x) y")
    assert parse_stat(STAT.replace(") S", ") Z"), "") is None


def test_cpu_of_processes_that_came_later_counts_in_full() -> None:
    before = [Process(1, 0, 5, 1.0, "a")]
    after = [Process(1, 0, 5, 1.5, "a"), Process(2, 1, 9, 0.25, "b")]
    assert processes.cpu_between(before, after) == 0.75


@pytest.mark.parametrize(
    ("title", "parent_role", "role"),
    [
        ("ray::ServeReplica:baton:prefill", "Ray itself", "prefill replica"),
        ("ray::ServeReplica:ray-llm:Decode:tiny", "Ray itself", "decode replica"),
        ("ray::ServeReplica:baton:frontend.handle_request", "Ray itself", "frontend"),
        ("VLLM::EngineCore", "prefill replica", "prefill engine core"),
        ("VLLM::Worker", "prefill engine core", "prefill engine worker"),
        ("VLLM::Worker", "engine core", "engine worker"),
        ("ray::ServeController.listen_for_change", "Ray itself", "controller"),
        ("python -c from multiprocessing.resource_tracker import main", "decode replica", "decode replica"),
    ],
)
def test_roles(title: str, parent_role: str, role: str) -> None:
    assert role_of(title, None, parent_role) == role


def test_a_real_tree_is_read_and_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        tree = processes.read_tree(child.pid)
        (row,) = processes.memory_by_role(tree, {child.pid: "server"})
        assert (row.role, row.num_processes) == ("server", 1)
        assert row.pss_bytes > MIB
        processes.end_all(tree)
        assert child.wait(10) == -9
    assert processes.read_tree(child.pid) == []
