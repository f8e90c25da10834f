"""An application is updated: sim engines of the old and of the new configuration run side by side, and pair up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from app.background import BackgroundTasks
from app.config import ModelConfig, PoolConfig
from app.engines.base import EngineSpec
from app.engines.kv_format import kv_format
from app.engines.registry import create_engine
from app.messages import GenerateRequest, Role, TransferDescriptor
from app.models.source import local_path
from deployments.replica.links import LinkKeeper

OLD: dict[str, Any] = {"block_size": 16}
NEW: dict[str, Any] = {"block_size": 32}


class Replica:
    """A sim engine of one configuration, and what its replica says of it."""

    def __init__(self, role: Role, name: str, configuration: dict[str, Any]) -> None:
        pool = PoolConfig(engine="sim")
        self._model = ModelConfig(name="m", source="baton:tiny", engine_args=configuration, prefill=pool, decode=pool)
        self._role: Role = role
        self.spec = EngineSpec(
            role=role,
            is_disaggregated=True,
            replica_id=name,
            model_path=local_path("baton:tiny"),
            device="cpu",
            tensor_parallel_size=1,
            engine_args={"speed_up": "max", **configuration},
            kv_host="127.0.0.1",
        )
        self.engine = create_engine("sim", self.spec)

    async def start(self) -> None:
        self.info = await self.engine.start()
        self.kv_format = kv_format(self._model, self._role, self.info)

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        return msgspec.structs.replace(await self.engine.prefill(request), kv_format=self.kv_format)


class Peers:
    """The prefill replicas, called without Ray."""

    def __init__(self, *replicas: Replica) -> None:
        self._replicas = {replica.spec.replica_id: replica for replica in replicas}

    def follow(self, on_change: Callable[[], object]) -> None:
        pass

    def ready(self) -> set[str]:
        return set(self._replicas)

    async def begin_probe(self, replica: str) -> None:
        pass

    def withdraw(self, replica: str) -> None:
        pass

    async def prefill(self, request: GenerateRequest, replica: str) -> TransferDescriptor:
        return await self._replicas[replica].prefill(request)

    def abandon(self, request_id: str, replica: str) -> None:
        pass

    async def end_probe(self, replica: str) -> None:
        return None


@pytest.mark.parametrize(("configuration", "partner"), [(OLD, "old"), (NEW, "new")], ids=["old decode", "new decode"])
async def test_each_decode_replica_pairs_up_with_its_own_kind(configuration: dict[str, Any], partner: str) -> None:
    decode = Replica("decode", "decode", configuration)
    old, new = Replica("prefill", "old", OLD), Replica("prefill", "new", NEW)
    background = BackgroundTasks("replica_id=decode", lambda death: pytest.fail(str(death)))
    keeper = LinkKeeper(decode.spec, decode.engine, Peers(old, new), background)
    try:
        for replica in (decode, old, new):
            await replica.start()
        await keeper.start(decode.info, decode.kv_format, can_prefill=True)
        problems = {link.prefill_replica: link.problem for link in keeper.links()}
        assert problems.pop(partner) == ""
        (problem,) = problems.values()
        here = configuration["block_size"]
        assert problem == (
            f"the probe failed: KV of another kind: block_size_tokens is {48 - here} at prefill and {here} at decode"
        )
        assert [keeper.is_usable(name) for name in ("old", "new")] == [partner == "old", partner == "new"]
    finally:
        await background.stop()
        for replica in (decode, old, new):
            await replica.engine.stop()
