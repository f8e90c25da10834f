"""`baton smoke` passes on every engine, and skips no check of what an engine has."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from app.cli.smoke import CHECKS, SmokeTarget, find_models, run_check, smoke
from tests.conftest import REPOSITORY
from tests.engines.conftest import SGLANG_AGGREGATED, Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]


def verdicts(baton: Baton, model: str) -> dict[str, str]:
    """Return the verdict of each check, with its message if it did not pass."""
    (card,) = find_models(baton.http, model)
    results = [run_check(check, SmokeTarget(baton.http, card)) for check in CHECKS]
    return {each.check: each.verdict if each.verdict == "ok" else f"{each.verdict}: {each.said}" for each in results}


def test_a_disaggregated_model_passes_every_check(real: Baton) -> None:
    assert verdicts(real, real.model) == dict.fromkeys(CHECKS, "ok")


def test_an_aggregated_model_has_no_remote_prefill(sglang: Baton) -> None:
    said = verdicts(sglang, SGLANG_AGGREGATED)
    assert said.pop("long prompt, remote prefill").startswith("skipped: the model is served aggregated")
    assert set(said.values()) == {"ok"}


def test_the_sim_engine_has_no_structured_output(sim: Baton, capsys: Any) -> None:
    smoke(sim.url, sim.model)
    said = capsys.readouterr().out
    assert said.count("skipped") == 1
    assert said.splitlines()[-1] == "passed"


def test_the_script_for_this_machine_passes_as_well(vllm: Baton) -> None:
    command = [str(REPOSITORY / "cluster/test.sh"), "local", "--model", vllm.model]
    done = subprocess.run(
        command,
        env={**os.environ, "BATON_URL": vllm.url},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
