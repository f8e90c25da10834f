"""The plug-ins hit what they patch in NIXL and torch, and those still need it.

A test here that fails after an update says what to look at: a detour that can go, or one that leads nowhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines.plugins import cpu_waits, vllm_amx
from app.upstream import UpstreamChanged
from tests.conftest import REPOSITORY

IS_AMX_CPU = "amx_tile" in Path("/proc/cpuinfo").read_text()

MADE_AGENTS = """
import json
from types import SimpleNamespace

class Made(Exception):
    pass

def delay():
    \"\"\"Microseconds between two polls, as NIXL's Python API sets them for a new agent.\"\"\"
    from nixl import _api
    taken = []
    def take(name, config):
        taken.append(config.pthrDelay)
        raise Made
    _api.nixlBind.nixlAgent = take
    try:
        _api.nixl_agent("x", _api.nixl_agent_config())
    except Made:
        return taken[0]

before = delay()
from app.engines.plugins import cpu_waits
cpu_waits.register()
cpu_waits.register()
print(json.dumps([before, delay()]))
"""

ASKED_FOR_TILES = """
import ctypes
import torch, vllm.engine.arg_utils, vllm.v1.engine.core
SYS_ARCH_PRCTL, ARCH_GET_XCOMP_PERM, TILE_DATA = 158, 0x1022, 18
def is_allowed():
    allowed = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(allowed)) == 0
    return bool(allowed.value >> TILE_DATA & 1)
before = is_allowed()
from app.engines.plugins import vllm_amx
vllm_amx.register()
print(before, is_allowed())
"""


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_nixls_python_api_polls_without_a_pause_unless_patched() -> None:
    """`cpu_waits` patches NIXL's configuration; that can go once its Python API takes the delay."""
    assert run(MADE_AGENTS, **cpu_waits.ENVIRONMENT) == f"[0, {cpu_waits.PROGRESS_DELAY_US}]"


def test_a_configuration_without_the_delay_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import nixl

    monkeypatch.setenv(cpu_waits.SWITCH, "1")
    monkeypatch.setattr(os, "sched_yield", None)
    monkeypatch.setattr(nixl, "_bindings", SimpleNamespace(nixlAgentConfig=type("Config", (), {})))
    with pytest.raises(UpstreamChanged, match=r"^nixl 1\..* has no pthrDelay"):
        cpu_waits.register()


def test_without_its_switch_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cpu_waits.SWITCH, raising=False)
    before: Any = os.sched_yield
    cpu_waits.register()
    assert os.sched_yield is before


def test_torch_without_the_private_functions_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delattr(torch.cpu, "_init_amx")
    with pytest.raises(
        UpstreamChanged, match=rf"^torch {torch.__version__.replace('+', '.')} .*torch\.cpu has no _init_amx"
    ):
        vllm_amx.register()


def test_torch_has_what_asks_for_the_tile_state() -> None:
    vllm_amx.register()


def test_vllm_does_not_ask_for_the_tile_state_by_that_name() -> None:
    """`vllm_amx` can go once vLLM asks itself."""
    import vllm

    sources = Path(vllm.__file__).parent.rglob("*.py")
    assert [source for source in sources if "_init_amx" in source.read_text()] == []


@pytest.mark.skipif(not IS_AMX_CPU, reason="a CPU without AMX")
def test_nobody_else_asks_for_the_tile_state() -> None:
    """`vllm_amx` can go once importing vLLM or torch is enough."""
    assert run(ASKED_FOR_TILES) == "False True"
