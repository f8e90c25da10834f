"""The vLLM engine behind the Engine protocol, over an engine core that does nothing by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines.base import EngineSpec
from app.engines.vllm import VllmEngine
from app.errors import EngineDead, EngineFailed
from app.messages import GenerateRequest, TokenDelta, TransferDescriptor

REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1] * 50, sampling={}, expected_cached_tokens=16)


@pytest.fixture
def spec() -> EngineSpec:
    return EngineSpec(
        role="decode",
        is_disaggregated=True,
        replica_id="replica",
        model_path="/models/tiny",
        device="cpu",
        tensor_parallel_size=1,
        engine_args={},
    )


class Core(VllmEngine):
    """What the engine core puts out for a request is put out by the test."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()

    async def _run(self, request: GenerateRequest, params: Any, on_output: Callable[[Any], None]) -> None:
        while (output := await self.outputs.get()) is not None:
            if isinstance(output, Exception):
                raise output
            on_output(output)


def output(**fields: Any) -> Any:
    usual: dict[str, Any] = dict.fromkeys(
        ("finish_reason", "stop_reason", "new_logprobs", "new_prompt_logprobs_tensors", "prefill_stats")
    )
    return SimpleNamespace(**usual, new_token_ids=[5], kv_transfer_params=fields)


async def test_a_handoff_is_queued_until_it_is_ready_and_says_how_long_it_took(spec: EngineSpec) -> None:
    engine = Core(spec)
    began = time.monotonic()
    task = asyncio.create_task(engine.prefill(REQUEST))
    await asyncio.sleep(0.05)
    assert engine.prompt_queue.queued_tokens == 34
    engine.outputs.put_nowait(output(remote_host="h"))
    engine.outputs.put_nowait(None)
    descriptor = await task
    assert engine.prompt_queue.queued_tokens == 0
    assert descriptor.prefill_s is not None
    assert 0.05 <= descriptor.prefill_s <= time.monotonic() - began


async def test_a_prompt_is_queued_until_its_first_token(spec: EngineSpec) -> None:
    engine = Core(spec)
    received: list[int] = []
    task = asyncio.create_task(
        engine.generate(REQUEST, None, lambda _: received.append(engine.prompt_queue.queued_tokens))
    )
    await asyncio.sleep(0)
    assert engine.prompt_queue.queued_tokens == 34
    for step in (output(), output(), None):
        engine.outputs.put_nowait(step)
    await task
    assert received == [0, 0]
    assert engine.prompt_queue.queued_tokens == 0


@pytest.mark.parametrize("leg", ["prefill", "generate"])
async def test_a_prompt_that_fails_or_is_cancelled_is_not_queued_any_longer(spec: EngineSpec, leg: str) -> None:
    engine = Core(spec)
    emitted: list[TokenDelta] = []

    def begin() -> asyncio.Task[Any]:
        serve = engine.prefill(REQUEST) if leg == "prefill" else engine.generate(REQUEST, None, emitted.append)
        return asyncio.create_task(serve)

    task = begin()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.prompt_queue.queued_tokens == 0
    engine.outputs.put_nowait(EngineFailed("no"))
    with pytest.raises(EngineFailed):
        await begin()
    assert engine.prompt_queue.queued_tokens == 0


async def test_a_prompt_whose_kv_comes_from_prefill_is_not_queued(spec: EngineSpec) -> None:
    engine = Core(spec)
    handoff = TransferDescriptor(
        engine="vllm",
        replica_id="prefill",
        request_id="r",
        prompt_tokens=50,
        cached_tokens=0,
        ready_at=time.time(),
        lease_s=30,
        params={},
    )
    task = asyncio.create_task(engine.generate(REQUEST, handoff, lambda _: None))
    await asyncio.sleep(0)
    assert engine.prompt_queue.queued_tokens == 0
    engine.outputs.put_nowait(None)
    await task


async def test_stopping_ends_what_runs_and_says_that_the_engine_is_dead(spec: EngineSpec) -> None:
    is_under_way = asyncio.Event()

    async def add_request_async(request: Any) -> None:
        is_under_way.set()

    engine: Any = VllmEngine(spec)
    engine._core = SimpleNamespace(add_request_async=add_request_async, shutdown=lambda timeout: None)
    made = SimpleNamespace(request_id="r-1")
    engine._input_processor = SimpleNamespace(
        process_inputs=lambda *_, **__: made, assign_request_id=lambda request: None
    )
    task = asyncio.create_task(engine.generate(REQUEST, None, lambda _: None))
    await is_under_way.wait()
    await engine.stop()
    with pytest.raises(EngineDead, match="stopped"):
        await asyncio.wait_for(task, 5)
    with pytest.raises(EngineDead):
        await engine.stats()
    assert engine.prompt_queue.queued_tokens == 0


@pytest.mark.parametrize("caches_prefixes", [True, False])
async def test_it_publishes_events_if_it_caches_prefixes(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, caches_prefixes: bool
) -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=caches_prefixes, num_gpu_blocks=7, block_size=16),
        model_config=SimpleNamespace(max_model_len=100),
        kv_events_config=None,
    )
    started = []

    def start_core(config: Any) -> tuple[Any, Any]:
        started.append(config.kv_events_config)
        core = SimpleNamespace(vllm_config=config, get_output_async=asyncio.Event().wait, shutdown=lambda _: None)
        return core, None

    arguments = SimpleNamespace(create_engine_config=lambda: config)
    monkeypatch.setattr("app.engines.vllm.build_engine_args", lambda _: arguments)
    monkeypatch.setattr("app.engines.vllm.os", SimpleNamespace(environ={}))
    monkeypatch.setattr("app.engines.vllm.start_core", start_core)
    engine = VllmEngine(spec)
    info = await engine.start()
    assert info.prefix_cache == ("published" if caches_prefixes else "none")
    (settings,) = started
    if caches_prefixes:
        assert settings.enable_kv_cache_events
        sockets = Path(settings.endpoint.removeprefix("ipc://")).parent
        assert sockets.is_dir()
        await engine.stop()
        assert not sockets.exists()
    else:
        assert settings is None
        assert [events async for events in engine.kv_events()] == []
        await engine.stop()
