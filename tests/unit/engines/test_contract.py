"""The sim and the scripted engine keep the contract of all engines; what needs no running engine, all of them do."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines.base import Engine, EngineSpec
from app.engines.registry import create_engine
from app.errors import ConfigError, EngineDead
from app.messages import Role
from app.upstream import UpstreamChanged
from tests.engine_contract import EngineContract, Pair, check_death
from tests.serve.scripted import ScriptedEngine

ENGINE_ARGS: dict[str, dict[str, Any]] = {"sim": {"speed_up": 2.0}, "vllm": {}, "sglang": {}}

Make = Callable[..., Engine]


def make_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(10, 900), k=num_tokens)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An engine that is not started yet."""
    config = {"vocab_size": 1000, "max_position_embeddings": 1024, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make(name: Any, role: Role = "decode", **engine_args: Any) -> Engine:
        spec = EngineSpec(
            role=role,
            is_disaggregated=True,
            replica_id=f"{role}-1",
            model_path=str(tmp_path),
            device="cpu",
            tensor_parallel_size=1,
            engine_args={**ENGINE_ARGS.get(name, {"diary": str(tmp_path)}), **engine_args},
            kv_host="127.0.0.1",
        )
        return ScriptedEngine(spec) if name == "scripted" else create_engine(name, spec)

    return make


@pytest.fixture(params=["sim", "scripted"])
async def pair(request: pytest.FixtureRequest, make: Make) -> AsyncIterator[Pair]:
    engines = prefill, decode = make(request.param, "prefill"), make(request.param, "decode")
    for engine in engines:
        await engine.start()
    slow: dict[str, Any] = {}
    if request.param == "scripted":
        slow = {
            "slow_prefill": {"extra_args": {"prefill": "hang"}},
            "slow_decode": {"extra_args": {"decode_hangs_at": 1}},
            "keeps_kv": False,
        }
    yield Pair(prefill, decode, make_prompt, **slow)
    for engine in engines:
        await engine.stop()


class TestContract(EngineContract):
    async def test_death_is_said_and_stopping_is_safe_twice(self, pair: Pair) -> None:
        async def kill(engine: Any) -> None:
            if isinstance(engine, ScriptedEngine):
                engine._is_dead = True
            else:
                engine._die(EngineDead("killed"))

        await check_death(pair, kill)


@pytest.mark.parametrize("name", ["vllm", "sglang", "sim", "scripted"])
async def test_an_engine_that_was_not_started_can_be_stopped_twice(make: Make, name: str) -> None:
    engine = make(name)
    for _ in range(2):
        await engine.stop()
    with pytest.raises(EngineDead):
        await engine.check_health()


@pytest.mark.parametrize(
    ("name", "engine_args", "error"),
    [
        ("vllm", {"of_next_year": 1}, ConfigError),
        ("sglang", {}, UpstreamChanged),  # which is not installed in this environment
        ("sim", {}, ConfigError),  # it reads the model's configuration
    ],
)
async def test_an_engine_whose_start_failed_can_be_stopped_twice(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    engine_args: dict[str, Any],
    error: type[Exception],
) -> None:
    for module in ("vllm", "sglang"):
        monkeypatch.setattr(f"app.engines.{module}.os", SimpleNamespace(environ={}))
    engine = make(name, **engine_args)
    (tmp_path / "config.json").unlink()
    with pytest.raises(error):
        await engine.start()
    for _ in range(2):
        await engine.stop()
    with pytest.raises(EngineDead):
        await engine.check_health()
