"""SGLang has the names that Baton uses of it, and still needs what Baton does for it.

A test here that fails after an update of SGLang says what to look at: a detour that can go, or one that leads nowhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines import sglang_surface
from tests.conftest import REPOSITORY
from tests.unit.engines.sglang_canaries import CANARIES

PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """How each canary failed, from one run of all: importing SGLang takes ten seconds."""
    done = subprocess.run(
        [PYTHON, "-m", "tests.unit.engines.sglang_canaries"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SGLANG_USE_CPU_ENGINE": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not PYTHON.exists(), reason="there is no environment with SGLang: make setup-sglang")
@pytest.mark.parametrize("canary", [canary.__name__ for canary in CANARIES])
def test_sglang_is_as_baton_needs_it(failures: dict[str, str], canary: str) -> None:
    assert failures[canary] == "", failures[canary]


async def test_an_older_sglang_takes_the_salt_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5.17 has no `cache_salt`; its requests have an `extra_key` that parts its cache in the same way."""
    asked: list[Any] = []

    class Older:
        tokenizer_manager = SimpleNamespace(generate_request=lambda request, _: asked.append(request))

        async def async_generate(self, *, input_ids: list[int], rid: str) -> None: ...

    module = SimpleNamespace(GenerateReqInput=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", module)
    engine: Any = Older()
    await sglang_surface.generate(engine, {"input_ids": [1], "rid": "r", "cache_salt": "s"})
    assert asked == [{"input_ids": [1], "rid": "r", "extra_key": "s"}]
