"""A frontend's replica from its start to its end; its models, its server and its guard are played by the test."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from app.config import parse
from deployments.frontend import deployment
from tests.unit.waiting import until

AS_WRITTEN: Any = deployment.Frontend.__mro__[1]
"""The class without what Serve puts around it: the replica's own server."""


async def test_a_frontend_that_has_ended_gives_its_guard_no_more_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is killed if it does not exit, also if it was stopped when Ray told it to."""
    guards: list[str] = []

    async def be_guarded() -> None:
        guards.append("alive")
        try:
            await asyncio.Event().wait()
        finally:
            guards.append("no sign of life")

    async def build_server(*_: Any) -> None:
        pass

    monkeypatch.setattr(deployment, "be_guarded", be_guarded)
    monkeypatch.setattr(deployment, "build_server", build_server)
    orchestrator = SimpleNamespace(quarantine=None, retry_budget=None, waker=None)
    monkeypatch.setattr(
        deployment, "ServedModel", lambda *_: SimpleNamespace(name="m", router=None, orchestrator=orchestrator)
    )
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="f-1"))
    monkeypatch.setattr(deployment, "serve", SimpleNamespace(get_replica_context=lambda: context))
    monkeypatch.setattr(deployment, "REGISTRY", CollectorRegistry(auto_describe=False))
    for name in ("adopt_serve_logging", "freeze_heap"):
        monkeypatch.setattr(deployment, name, lambda: None)
    config = parse({"models": [{"name": "m", "source": "owner/m", "decode": {"engine": "vllm"}}]})
    frontend = SimpleNamespace(_metrics=None, _usage=None, _health=dict, _stats=dict)
    await AS_WRITTEN.__init__(frontend, config, [{}], None)
    await until(lambda: guards == ["alive"])
    await AS_WRITTEN.__del__(frontend)
    assert guards == ["alive", "no sign of life"]
