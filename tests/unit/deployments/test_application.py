"""What `baton run` says while an application starts: what is new, and what it waits for."""

from types import SimpleNamespace
from typing import Any

from deployments.application import QUIET_S, Progress, _what_loads

MODEL = {"name": "m", "source": "baton:tiny", "prefill": {"engine": "sglang"}, "decode": {"engine": "sglang"}}
DOCUMENT = {"applications": [{"name": "baton", "args": {"models": [MODEL], "transfer": {}}}]}


def serve_status(**deployments: dict[str, int]) -> dict[str, Any]:
    """One application with these numbers of replicas in each state; healthy where all of them run."""
    found = {
        name.replace("_", "-"): SimpleNamespace(
            replica_states=states, status="HEALTHY" if set(states) == {"RUNNING"} else "UPDATING"
        )
        for name, states in deployments.items()
    }
    return {"baton": SimpleNamespace(deployments=found)}


def test_each_change_is_said_once_with_what_it_loads() -> None:
    progress = Progress(_what_loads(DOCUMENT))
    starting = serve_status(frontend={"STARTING": 1}, decode_m={"RUNNING": 1, "STARTING": 2})
    assert progress.lines(starting, 0.0) == [
        "frontend: 1 starting (loading vLLM's server)",
        "decode-m: 1 running 2 starting (loading SGLang)",
    ]
    assert progress.lines(starting, 1.0) == []
    assert progress.lines(serve_status(frontend={"RUNNING": 1}), 2.0) == ["frontend: 1 running"]


def test_a_long_silence_is_broken_with_what_is_awaited() -> None:
    progress = Progress(_what_loads(DOCUMENT))
    waiting = serve_status(frontend={"RUNNING": 1}, prefill_m={"STARTING": 1})
    assert len(progress.lines(waiting, 100.0)) == 2
    assert progress.lines(waiting, 99.9 + QUIET_S) == []
    assert progress.lines(waiting, 100.0 + QUIET_S) == ["waiting for prefill-m"]
    assert progress.lines(waiting, 101.0 + QUIET_S) == []


def test_before_serve_has_built_the_application_that_is_awaited() -> None:
    progress = Progress({})
    assert progress.lines({}, progress._said_at + QUIET_S) == ["waiting for Serve to build the application"]
