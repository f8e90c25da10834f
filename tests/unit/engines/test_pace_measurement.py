"""What an engine's measurement finds, on sim engines whose time passes as fast as they compute."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.engines import pace_measurement
from app.engines.base import EngineInfo, EngineSpec
from app.engines.pace_measurement import BATCH, LENGTHS, fit_pace, measure_pace
from app.engines.sim import engine as sim
from app.engines.sim.engine import SimEngine
from app.engines.sim.profile import load_profile
from app.errors import EngineFailed
from app.messages import Emit, GenerateRequest, TokenDelta, TransferDescriptor
from app.pace import Pace

PROFILE = load_profile("h200-llama-8b")


class Clock:
    """A clock that only the engine's steps advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def restart(self) -> None: ...

    async def let_pass(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


class Watched(SimEngine):
    """An engine that notes the lengths of the prompts and what it counts as work."""

    info: EngineInfo

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.lengths: list[int] = []
        self.queued: set[int] = set()

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        self.lengths.append(len(request.prompt_token_ids))

        def note(delta: TokenDelta) -> None:
            self.queued.add(self.prompt_queue.queued_tokens)
            emit(delta)

        await super().generate(request, descriptor, note)


Start = Callable[..., Awaitable[Watched]]


@pytest.fixture
async def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    clock = Clock()
    monkeypatch.setattr(sim, "_Clock", lambda speed_up: clock)
    monkeypatch.setattr(pace_measurement, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    config = {"vocab_size": 1000, "max_position_embeddings": 65_536, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    engines: list[Watched] = []

    async def start(**engine_args: Any) -> Watched:
        spec = EngineSpec(
            role="decode",
            is_disaggregated=False,
            replica_id="d",
            model_path=str(tmp_path),
            device="cpu",
            tensor_parallel_size=1,
            engine_args=engine_args,
        )
        engines.append(Watched(spec))
        engines[-1].info = await engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        await engine.stop()


def check(pace: Pace, chunk_tokens: int) -> None:
    """It predicts what the profile says."""
    assert pace.chunk_tokens == chunk_tokens
    for length in (32, 2_000, 30_000):
        times = PROFILE.prefill
        steps = -(-length // chunk_tokens)
        expected = times.base_s * steps + times.per_token_s * length + times.per_token_squared_s * length**2
        assert pace.prompt_s(length) == pytest.approx(expected, rel=0.05)
    assert pace.step_s(1, 500) == pytest.approx(PROFILE.step_s(1, 500), rel=0.02)
    assert pace.step_s(32, 100_000) == pytest.approx(PROFILE.step_s(32, 100_000), rel=0.2)


@pytest.mark.parametrize("chunk_tokens", [512, 2048, 16384])
async def test_the_pace_of_a_gpu_is_found(start: Start, chunk_tokens: int) -> None:
    engine = await start(max_num_batched_tokens=chunk_tokens)
    check(await measure_pace(engine, engine.info, "cuda"), chunk_tokens)
    assert engine.lengths == [*sorted([*LENGTHS, *LENGTHS]), *[LENGTHS[0]] * BATCH]


async def test_the_first_use_of_a_shape_is_no_evidence(start: Start) -> None:
    faults = [{"kind": "slow_step", "at": number, "factor": 1000.0} for number in (1, 2, 3)]
    engine = await start(faults=faults)
    check(await measure_pace(engine, engine.info, "cuda"), 2048)


async def test_nothing_of_it_counts_as_work(start: Start) -> None:
    engine = await start(faults=[{"kind": "engine_death", "probability": 1.0}])
    await measure_pace(engine, engine.info, "cpu")
    queue = engine.prompt_queue
    assert (engine.queued, queue.computed_prompts, queue.computed_tokens) == ({0}, 0, 0)
    assert (await engine.stats()).num_used_blocks == 0


async def test_prompts_that_would_take_too_long_are_left_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pace_measurement.LONGEST_PROMPT_S, "cpu", 0.1)
    engine = await start()
    pace = await measure_pace(engine, engine.info, "cpu")
    assert max(engine.lengths) == 1024
    assert pace.prefill_s_per_token_squared == 0  # not from three lengths
    assert pace.prompt_s(1024) == pytest.approx(PROFILE.prefill_s(1024), rel=0.1)
    monkeypatch.setitem(pace_measurement.LONGEST_PROMPT_S, "cpu", 0.0)
    engine.lengths.clear()
    await measure_pace(engine, engine.info, "cpu")
    assert set(engine.lengths) == {32, 256}


async def test_a_small_engine_is_measured_as_far_as_it_has_room(start: Start) -> None:
    engine = await start(num_blocks=8, block_size=16)
    pace = await measure_pace(engine, engine.info, "cuda")
    assert set(engine.lengths) == {32}
    assert pace.prompt_s(32) == pytest.approx(PROFILE.prefill_s(32), rel=0.01)


async def test_an_engine_that_takes_no_time_has_times_to_divide_by(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace_measurement, "time", SimpleNamespace(perf_counter=lambda: 7.0))
    engine = await start()
    pace = await measure_pace(engine, engine.info, "cuda")
    assert min(pace.prefill_base_s, pace.prefill_s_per_token, pace.step_base_s) > 0


async def test_an_engine_that_gives_all_tokens_at_once_has_no_steps_to_measure() -> None:
    class Merging:
        async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
            emit(TokenDelta([1] * 12, finish_reason="length"))

    engine: Any = Merging()
    info = EngineInfo(engine="sim", version="1", num_blocks=64, block_size_tokens=16, max_model_len=512)
    with pytest.raises(EngineFailed, match="too few"):
        await measure_pace(engine, info, "cpu")


def test_a_pace_follows_from_single_numbers() -> None:
    pace = fit_pace([(100, 0.2), (1000, 1.1), (3000, 3.2)], [(1, 100.0, 0.01), (8, 100.0, 0.01)], 2048)
    assert (pace.prefill_base_s, pace.prefill_s_per_token, pace.step_base_s) == pytest.approx((0.1, 0.001, 0.01))
    assert (pace.prefill_s_per_token_squared, pace.step_s_per_sequence, pace.step_s_per_kv_token) == (0, 0, 0)
