"""The sim engine behind the Engine protocol: every role, every ending, and the faults that it commits on purpose."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.config import parse
from app.engines import progress
from app.engines.base import Engine, EngineSpec
from app.engines.registry import create_engine
from app.engines.sim.engine import SimEngine, _Clock, parse_args
from app.engines.sim.tokens import read_model_facts
from app.errors import ConfigError, EngineDead, EngineFailed, InvalidRequest
from app.messages import AllBlocksCleared, BlockStored, GenerateRequest, TokenDelta, TransferDescriptor
from app.preflight import check, gpus_of_replica
from app.routing.placement import corrupt_prompt
from tests.conftest import eventually

SLOW = {"speed_up": 1e-3}
"""So slow that no step ends before the test does."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder without weights: 1,000 words, of which five are special and three no text."""
    folder = tmp_path_factory.mktemp("model")
    no_text = ["<0>", "<1>", "<2>", "<3>", "<4>", "Ġé", "<|x|>", "Ċ"]
    vocab = {text: number for number, text in enumerate(no_text + [f"word{number}" for number in range(992)])}
    added = [{"id": number, "content": f"<{number}>", "special": True} for number in range(5)]
    config = {"vocab_size": 1000, "max_position_embeddings": 1024, "eos_token_id": 2}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    (folder / "tokenizer.json").write_bytes(msgspec.json.encode({"added_tokens": added, "model": {"vocab": vocab}}))
    return str(folder)


@pytest.fixture
def start(model_path: str) -> Any:
    """Start engines; all are stopped, and have given all blocks back, at the end of the block."""

    @asynccontextmanager
    async def start(role: str = "decode", **engine_args: Any) -> AsyncIterator[SimEngine]:
        lease_s = engine_args.pop("lease_s", 30)
        checksum_rate = engine_args.pop("checksum_rate", 0.0)
        spec = EngineSpec(
            role=role,  # type: ignore[arg-type]
            is_disaggregated=True,
            replica_id=f"{role}-1",
            model_path=model_path,
            device="cpu",
            tensor_parallel_size=1,
            engine_args={"speed_up": "max", **engine_args},
            kv_host="127.0.0.1",
            transfer_lease_s=lease_s,
            transfer_checksum_rate=checksum_rate,
        )
        engine = create_engine("sim", spec)
        assert isinstance(engine, SimEngine)
        try:
            engine.info = await engine.start()  # type: ignore[attr-defined]
            yield engine
        finally:
            await engine.stop()

    return start


def prompt(num_tokens: int = 100, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(10, 900), k=num_tokens)


def request(tokens: list[int] | None = None, *, salt: str | None = None, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=tokens or prompt(),
        sampling={"temperature": 0.0, "max_tokens": 10, **sampling},
        cache_salt=salt,
    )


async def generate(
    engine: Engine, what: GenerateRequest, descriptor: TransferDescriptor | None = None
) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    await engine.generate(what, descriptor, deltas.append)
    return deltas


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def all_blocks_back(engine: Engine) -> None:
    async def are_back() -> bool:
        stats = await engine.stats()
        return not stats.num_used_blocks and not stats.num_running and not stats.num_waiting

    await eventually(are_back, 5, "all blocks are back")


async def holds_blocks(engine: Engine) -> bool:
    return (await engine.stats()).num_used_blocks > 0


async def test_it_starts_at_once_and_says_what_it_is(start: Any) -> None:
    began = time.monotonic()
    async with start(num_blocks=32, block_size=16) as engine:
        assert time.monotonic() - began < 1
        await engine.check_health()
        stats = await engine.stats()
        assert (stats.num_blocks, stats.num_used_blocks) == (32, 0)
    async with start(startup_s=0.2) as engine:
        assert time.monotonic() - began > 0.2


async def test_its_import_and_start_need_neither_torch_nor_vllm_nor_transformers() -> None:
    program = (
        "import sys; from app.engines.registry import create_engine; import app.engines.sim.engine;"
        "print([m for m in ('torch', 'vllm', 'transformers', 'ray', 'numpy') if m in sys.modules])"
    )
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


async def test_an_aggregated_request_streams_one_token_a_step(start: Any) -> None:
    async with start() as engine:
        deltas = await generate(engine, request())
        assert [len(delta.token_ids) for delta in deltas] == [1] * 10
        assert [delta.finish_reason for delta in deltas] == [None] * 9 + ["length"]
        assert [delta.report is not None for delta in deltas] == [True] + [False] * 9
        report = deltas[0].report
        assert report is not None
        assert (report.kind, report.reason, report.cached_tokens, report.transferred_tokens) == ("local", "", 0, 0)
        again = (await generate(engine, request()))[0].report
        assert again is not None
        assert again.cached_tokens == 96
        await all_blocks_back(engine)


async def test_tokens_are_ordinary_text_of_the_models_vocabulary(start: Any, model_path: str) -> None:
    assert read_model_facts(model_path).vocabulary == list(range(8, 1000))
    async with start() as engine:
        tokens = tokens_of(await generate(engine, request(max_tokens=900)))
        assert len(tokens) == 900
        assert set(tokens) <= set(range(8, 1000))


async def test_without_a_tokenizer_file_the_special_tokens_of_the_configuration_are_avoided(tmp_path: Path) -> None:
    config = {"vocab_size": 10, "max_position_embeddings": 64, "eos_token_id": [2, 3], "bos_token_id": 1}
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({"text_config": config}))
    assert read_model_facts(str(tmp_path)).vocabulary == [0, 4, 5, 6, 7, 8, 9]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="vocab_size"):
        read_model_facts(str(tmp_path))


async def test_a_step_hands_out_all_of_its_tokens_in_one_turn_of_the_loop(start: Any) -> None:
    turn = 0
    turns: list[int] = []

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with start() as engine:
        counter = asyncio.create_task(count_turns())
        requests = [request(prompt(20, seed)) for seed in range(8)]
        await asyncio.gather(*(engine.generate(one, None, lambda delta: turns.append(turn)) for one in requests))
        counter.cancel()
        assert len(turns) == 80
        assert sorted(turns.count(number) for number in set(turns)) == [8] * 10


async def test_modelled_time_passes_divided_by_speed_up(start: Any) -> None:
    async with start(profile="h200-llama-8b", speed_up=2.0) as engine:
        began = time.monotonic()
        await generate(engine, request(prompt(500), max_tokens=41))
        assert time.monotonic() - began >= (0.0252 + 40 * 0.00465) / 2


@pytest.mark.parametrize("speed_up", [0.5, 1.0, 20.0])
async def test_timers_that_are_late_do_not_add_up(monkeypatch: pytest.MonkeyPatch, speed_up: float) -> None:
    now = 1000.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds >= 0
        now += seconds + 0.0006

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now, raising=False)
    clock = _Clock(speed_up)
    for _ in range(500):
        await clock.let_pass(0.02)
    assert now - 1000.0 == pytest.approx(500 * 0.02 / speed_up, abs=0.002)
    now += 60.0  # this process did not get the CPU: not all of that is made up for
    before = now
    for _ in range(500):
        await clock.let_pass(0.02)
    assert now - before == pytest.approx(500 * 0.02 / speed_up - 0.1, abs=0.03 / speed_up)


@pytest.mark.parametrize(
    "sampling",
    [
        {"structured_outputs": {"regex": "a"}},
        {"prompt_logprobs": 1},
        {"logit_bias": {"1": 1.0}},
        {"bad_words": ["x"]},
        {"allowed_token_ids": [1]},
        {"thinking_token_budget": 3},
        {"a_parameter_of_next_year": 1},
        {"logprobs": -1},
    ],
    ids=lambda sampling: next(iter(sampling)),
)
async def test_a_parameter_that_would_be_a_lie_is_refused_by_name(start: Any, sampling: dict[str, Any]) -> None:
    async with start() as engine:
        with pytest.raises(InvalidRequest, match=next(iter(sampling))):
            await generate(engine, request(**sampling))
        assert tokens_of(await generate(engine, request(temperature=0.7, top_p=0.9, extra_args={"x": 1})))


async def test_a_prompt_that_does_not_fit_is_refused(start: Any) -> None:
    async with start(max_model_len=50) as engine:
        for tokens in (prompt(50), prompt(51)):
            for call in (generate(engine, request(tokens)), engine.prefill(request(tokens))):
                with pytest.raises(InvalidRequest, match="max_model_len"):
                    await call
        deltas = await generate(engine, request(prompt(49)))
        assert (len(deltas), deltas[-1].finish_reason) == (1, "length")
        with pytest.raises(InvalidRequest, match="0 tokens"):
            await generate(engine, GenerateRequest(request_id="r", prompt_token_ids=[], sampling={}))


async def test_max_tokens_defaults_to_sixteen_and_none_means_as_many_as_fit(start: Any) -> None:
    async with start(max_model_len=64) as engine:
        bare = GenerateRequest(request_id="r", prompt_token_ids=prompt(20), sampling={})
        assert len(await generate(engine, bare)) == 16
        assert len(await generate(engine, request(prompt(20), max_tokens=None))) == 44


async def test_a_stop_token_ends_the_answer_and_is_named(start: Any) -> None:
    async with start() as engine:
        free = tokens_of(await generate(engine, request()))
        stopped = await generate(engine, request(stop_token_ids=[free[4]]))
        assert tokens_of(stopped) == free[: free.index(free[4]) + 1]
        assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", free[4])


async def test_a_seed_changes_sampled_and_not_greedy_output(start: Any) -> None:
    async with start() as engine:
        greedy = tokens_of(await generate(engine, request()))
        assert tokens_of(await generate(engine, request(seed=5))) == greedy
        assert tokens_of(await generate(engine, request(seed=5, temperature=1.0))) != greedy


async def test_logprobs_have_the_number_of_candidates_that_was_asked_for(start: Any) -> None:
    async with start() as engine:
        for number in (0, 1, 5):
            for delta in await generate(engine, request(logprobs=number)):
                logprobs = delta.logprobs
                assert logprobs is not None
                [ids], [values] = logprobs.token_ids, logprobs.logprobs
                assert len(ids) == len(values) == number + 1
                assert ids[0] == delta.token_ids[0]
                assert logprobs.ranks == [1]
                assert len(set(ids)) == max(1, number)
                assert values[1:] == sorted(values[1:], reverse=True)
                assert all(value < 0 for value in values)
        first, second = [await generate(engine, request(logprobs=2)) for _ in range(2)]
        assert [delta.logprobs for delta in first] == [delta.logprobs for delta in second]


async def test_disaggregated_equals_aggregated_and_a_corrupted_prompt_does_not(start: Any) -> None:
    async with start("prefill") as prefill, start("decode") as decode:
        what = request(logprobs=2)
        aggregated = await generate(decode, request(logprobs=2, salt="a"))
        descriptor = await prefill.prefill(what)
        assert (descriptor.engine, descriptor.prompt_tokens, descriptor.cached_tokens) == ("sim", 100, 0)
        remote = await generate(decode, what, descriptor)
        assert [(d.token_ids, d.logprobs) for d in remote] == [(d.token_ids, d.logprobs) for d in aggregated]
        report = remote[0].report
        assert report is not None
        assert (report.kind, report.reason, report.transport) == ("remote", "", "sim")
        assert (report.prefill_replica, report.decode_replica) == ("prefill-1", "decode-1")
        assert (report.transferred_tokens, report.cached_tokens) == (100, 0)
        for _ in range(2):  # the second time mostly from decode's prefix cache
            corrupted = await prefill.prefill(corrupt_prompt(request(salt="s")))
            wrong = await generate(decode, request(salt="s"), corrupted)
            assert tokens_of(wrong) != tokens_of(aggregated)
        stats = await decode.stats()
        assert (stats.num_transfers, stats.num_failed_transfers, stats.transport) == (3, 0, "sim")
        assert stats.transferred_bytes == (7 + 7 + 1) * 16 * 131072
        assert stats.transfer_s == pytest.approx(3 * 0.0062 + stats.transferred_bytes / 245e9)
        await all_blocks_back(prefill)
        await all_blocks_back(decode)


async def test_kv_that_decode_has_already_is_not_pulled_but_released(start: Any) -> None:
    async with start("prefill") as prefill, start("decode") as decode:
        what = request(prompt(97))
        await generate(decode, what)
        remote = await generate(decode, what, await prefill.prefill(what))
        report = remote[0].report
        assert report is not None
        assert (report.kind, report.reason, report.cached_tokens) == ("local", "already_cached", 96)
        assert (await decode.stats()).num_transfers == 0
        await all_blocks_back(prefill)


async def test_a_request_that_decode_refuses_leaves_no_blocks_on_prefill(start: Any) -> None:
    async with start("prefill") as prefill, start("decode") as decode:
        descriptor = await prefill.prefill(request())
        with pytest.raises(InvalidRequest):
            await generate(decode, request(logit_bias={"1": 1.0}), descriptor)
        await all_blocks_back(prefill)


async def test_a_prompt_that_prefill_had_cached_counts_as_cached(start: Any) -> None:
    async with start("prefill") as prefill, start("decode") as decode:
        await prefill.release("r", await prefill.prefill(request()))
        descriptor = await prefill.prefill(request())
        assert descriptor.cached_tokens == 96
        report = (await generate(decode, request(), descriptor))[0].report
        assert report is not None
        assert report.cached_tokens == 96


async def test_release_frees_the_blocks_at_once_and_may_be_repeated(start: Any) -> None:
    async with start("prefill") as prefill, start("decode") as decode:
        descriptor = await prefill.prefill(request())
        assert (await prefill.stats()).num_used_blocks == 7
        for _ in range(2):
            await decode.release("r", descriptor)
        await all_blocks_back(prefill)
        assert (await prefill.stats()).num_expired_handoffs == 0


async def test_a_lease_that_runs_out_frees_the_blocks_and_decode_computes_them(start: Any) -> None:
    async with start("prefill", lease_s=0.1) as prefill, start("decode") as decode:
        descriptor = await prefill.prefill(request())
        assert await holds_blocks(prefill)
        await all_blocks_back(prefill)
        assert (await prefill.stats()).num_expired_handoffs == 1
        late = await generate(decode, request(), descriptor)
        report = late[0].report
        assert report is not None
        assert (report.kind, report.reason) == ("local", "transfer_failed")
        assert tokens_of(late) == tokens_of(await generate(decode, request()))
        assert (await decode.stats()).num_failed_transfers == 1


async def test_a_decode_engine_that_never_ends_its_transfer_keeps_no_blocks_beyond_a_lease(start: Any) -> None:
    """Its machine is gone, and nobody closes the connection."""
    async with start("prefill", lease_s=0.2) as prefill:
        params = (await prefill.prefill(request())).params
        reader, writer = await asyncio.open_connection(params["host"], params["port"])
        writer.write(f"take {params['handle']}\n".encode())
        assert await reader.readline()
        assert await holds_blocks(prefill)
        await all_blocks_back(prefill)
        writer.close()


async def test_a_prefill_engine_that_is_gone_leaves_decode_to_compute(start: Any) -> None:
    async with start("decode") as decode:
        async with start("prefill") as prefill:
            descriptor = await prefill.prefill(request())
        deltas = await generate(decode, request(), descriptor)
        report = deltas[0].report
        assert report is not None
        assert report.reason == "transfer_failed"
        await decode.release("r", descriptor)


@pytest.mark.parametrize(("checksum_rate", "reason"), [(1.0, "kv_changed"), (0.0, "")])
async def test_kv_that_changes_on_the_way_is_noticed_if_there_is_a_checksum(
    start: Any, checksum_rate: float, reason: str
) -> None:
    faults = [{"kind": "kv_change", "at": 1}]
    async with start("prefill", checksum_rate=checksum_rate) as prefill, start("decode", faults=faults) as decode:
        changed = await generate(decode, request(), await prefill.prefill(request()))
        report = changed[0].report
        assert report is not None
        assert report.reason == reason
        undisturbed = await generate(decode, request(salt="2"), await prefill.prefill(request(salt="2")))
        assert (tokens_of(changed) == tokens_of(undisturbed)) == (checksum_rate == 1.0)
        stats = await decode.stats()
        counts = (1, 1) if checksum_rate else (0, 0)
        assert (stats.num_checksum_matches, stats.num_checksum_mismatches) == counts
        await all_blocks_back(prefill)


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"x" * 100_000])
async def test_a_port_that_answers_nonsense_leaves_decode_to_compute(start: Any, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with start("prefill") as prefill, start("decode") as decode:
        descriptor = await prefill.prefill(request())
        params = {**descriptor.params, "port": server.sockets[0].getsockname()[1]}
        descriptor = msgspec.structs.replace(descriptor, params=params)
        report = (await generate(decode, request(), descriptor))[0].report
        assert report is not None
        assert report.reason == "transfer_failed"
        await all_blocks_back(decode)
    server.close()


async def test_a_prefill_engine_that_dies_during_a_transfer_leaves_decode_to_compute(start: Any) -> None:
    async with start("decode", profile="h200-llama-8b", speed_up=1e-2) as decode:
        async with start("prefill") as prefill:
            descriptor = await prefill.prefill(request())
            running = asyncio.create_task(generate(decode, request(max_tokens=1), descriptor))
            await asyncio.sleep(0.1)  # the pull takes 0.6 s
            assert (await prefill.stats()).num_used_blocks == 7
        report = (await running)[0].report
        assert report is not None
        assert report.reason == "transfer_failed"


@pytest.mark.parametrize("moment", ["queued", "pulling", "prefilling", "decoding"])
async def test_cancelling_a_generate_gives_all_blocks_back_on_both_sides(start: Any, moment: str) -> None:
    slow = {"queued": {}, "decoding": {"speed_up": 1.0}}.get(moment, SLOW)
    async with start("prefill") as prefill, start("decode", **slow) as decode:
        got: list[TokenDelta] = []
        descriptor = None if moment in ("prefilling", "decoding") else await prefill.prefill(request())
        running = asyncio.create_task(decode.generate(request(max_tokens=900), descriptor, got.append))
        reached: dict[str, Callable[[], Awaitable[bool]]] = {
            "pulling": lambda: holds_blocks(decode),
            "prefilling": lambda: holds_blocks(decode),
            "decoding": lambda: asyncio.sleep(0, len(got) > 3),
        }
        if moment == "queued":
            await asyncio.sleep(0)
        else:
            await eventually(reached[moment], 5, moment)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        num = len(got)
        await all_blocks_back(decode)
        await all_blocks_back(prefill)
        assert len(got) == num < 900


@pytest.mark.parametrize("num_turns", range(12))
async def test_cancelling_at_any_turn_of_the_loop_loses_no_block(start: Any, num_turns: int) -> None:
    async with start("prefill") as prefill, start("decode") as decode:

        async def serve() -> None:
            descriptor = await prefill.prefill(request())
            await generate(decode, request(), descriptor)

        running = asyncio.create_task(serve())
        for _ in range(num_turns):
            await asyncio.sleep(0)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await all_blocks_back(decode)
        # A prefill that was cancelled holds nothing; one that was done does, for whoever has its descriptor.
        used = (await prefill.stats()).num_used_blocks
        assert used in (0, 7)


async def test_cancelling_a_prefill_gives_all_blocks_back(start: Any) -> None:
    async with start("prefill", **SLOW) as engine:
        running = asyncio.create_task(engine.prefill(request()))
        await eventually(lambda: holds_blocks(engine), 5, "the prefill runs")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await all_blocks_back(engine)


async def test_prefill_error_fails_the_one_prefill(start: Any) -> None:
    async with start("prefill", faults=[{"kind": "prefill_error", "at": 2}]) as engine:
        await engine.release("r", await engine.prefill(request()))
        with pytest.raises(EngineFailed, match="prefill_error"):
            await engine.prefill(request())
        await engine.release("r", await engine.prefill(request()))
        await all_blocks_back(engine)


async def test_decode_error_fails_the_one_request_after_some_tokens(start: Any) -> None:
    async with start(faults=[{"kind": "decode_error", "at": 1, "after_tokens": 3}]) as engine:
        got: list[TokenDelta] = []
        with pytest.raises(EngineFailed, match="decode_error"):
            await engine.generate(request(), None, got.append)
        assert len(got) == 3
        assert len(await generate(engine, request())) == 10
        await all_blocks_back(engine)


async def test_engine_death_ends_every_request_and_shows_in_the_health_check(start: Any) -> None:
    async with start("prefill", faults=[{"kind": "engine_death", "at": 2, "after_tokens": 2}]) as engine:
        descriptor = await engine.prefill(request())
        others = [asyncio.create_task(generate(engine, request(max_tokens=900))) for _ in range(3)]
        for other in others:
            with pytest.raises(EngineDead):
                await other
        for call in (engine.check_health, engine.stats):
            with pytest.raises(EngineDead):
                await call()
        with pytest.raises(EngineDead):
            await engine.prefill(request())
        async with start("decode") as decode:
            report = (await generate(decode, request(), descriptor))[0].report
            assert report is not None
            assert report.reason == "transfer_failed"


async def test_hang_stops_all_tokens_until_it_is_noticed(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REST_S", 0.3)
    monkeypatch.setattr(progress, "IDLE_FLOOR_S", 0.1)
    async with start(faults=[{"kind": "hang", "at": 1, "after_tokens": 2}]) as engine:
        got: list[TokenDelta] = []
        others: list[TokenDelta] = []
        running = asyncio.create_task(engine.generate(request(), None, got.append))
        other = asyncio.create_task(engine.generate(request(max_tokens=900), None, others.append))
        await eventually(lambda: asyncio.sleep(0, len(got) == 2), 5, "it hangs")
        num = len(others)
        await asyncio.sleep(0.05)
        assert (len(got), len(others)) == (2, num)
        await engine.check_health()
        await engine.stats()
        for task in (running, other):
            with pytest.raises(EngineDead, match="it made no step for"):
                await asyncio.wait_for(task, 5)
        for call in (engine.check_health, engine.stats):
            with pytest.raises(EngineDead, match="it made no step for"):
                await call()


async def test_transfer_failure_is_computed_on_decode_and_frees_prefill(start: Any) -> None:
    faults = [{"kind": "transfer_failure", "probability": 1.0}]
    async with start("prefill") as prefill, start("decode", faults=faults) as decode:
        right = tokens_of(await generate(prefill, request(salt="x")))
        deltas = await generate(decode, request(), await prefill.prefill(request()))
        report = deltas[0].report
        assert report is not None
        assert (report.kind, report.reason, report.transferred_tokens) == ("local", "transfer_failed", 0)
        assert tokens_of(deltas) == right
        await all_blocks_back(prefill)
        assert (await decode.stats()).num_failed_transfers == 1


async def test_slow_step_takes_its_factor_longer(start: Any) -> None:
    async def seconds(faults: list[dict[str, Any]]) -> float:
        async with start(profile="h200-llama-8b", speed_up=4, faults=faults) as engine:
            began = time.monotonic()
            await generate(engine, request(prompt(5), max_tokens=2))
            return time.monotonic() - began

    normal, slow = await seconds([]), await seconds([{"kind": "slow_step", "at": 2, "factor": 200}])
    assert normal < 200 * 0.00465 / 4 <= slow


async def test_faults_by_chance_depend_on_the_seed_alone(start: Any) -> None:
    async def hits(seed: int) -> list[bool]:
        outcomes = []
        async with start(seed=seed, faults=[{"kind": "decode_error", "probability": 0.3}]) as engine:
            for _ in range(60):
                try:
                    await generate(engine, request(prompt(5), max_tokens=1))
                    outcomes.append(False)
                except EngineFailed:
                    outcomes.append(True)
        return outcomes

    first = await hits(1)
    assert first == await hits(1) != await hits(2)
    assert 8 <= sum(first) <= 30


async def test_events_are_published_from_the_start_on_until_it_stops(start: Any) -> None:
    async with start() as engine:
        assert engine.info.prefix_cache == "published"
        await generate(engine, request(max_tokens=1, salt="salt"))
        events = engine.kv_events()
        [stored] = await anext(events)
        assert isinstance(stored, BlockStored)
        assert (stored.token_ids, stored.cache_salt) == (prompt()[:96], "salt")
        waits = asyncio.create_task(anext(events))
        await asyncio.sleep(0)
        await generate(engine, request(prompt(40, 1), max_tokens=1))
        [stored] = await asyncio.wait_for(waits, 5)
        assert stored.token_ids == prompt(40, 1)[:32]
        waits = asyncio.create_task(anext(events, None))
        await asyncio.sleep(0)
    assert await asyncio.wait_for(waits, 5) is None


async def test_events_that_nobody_took_in_time_are_published_as_lost(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.sim.blocks.MAX_WAITING_EVENTS", 2)
    async with start() as engine:
        for seed in range(4):
            await generate(engine, request(prompt(40, seed), max_tokens=1))
        events = engine.kv_events()
        assert await anext(events) == [AllBlocksCleared()]
        await generate(engine, request(prompt(40, 9), max_tokens=1))
        [stored] = await anext(events)
        assert isinstance(stored, BlockStored)
        assert stored.token_ids == prompt(40, 9)[:32]


@pytest.mark.parametrize(
    ("engine_args", "expected"), [({"kv_events": False}, "silent"), ({"enable_prefix_caching": False}, "none")]
)
async def test_an_engine_without_events_says_so(start: Any, engine_args: dict[str, Any], expected: str) -> None:
    async with start(**engine_args) as engine:
        assert engine.info.prefix_cache == expected
        await generate(engine, request())
        assert [batch async for batch in engine.kv_events()] == []


async def test_prompts_are_queued_until_their_first_token_is_there(start: Any) -> None:
    async with start("prefill", speed_up=1e-3) as prefill, start(speed_up=1e-3) as decode:
        asked = msgspec.structs.replace(request(), expected_cached_tokens=16)
        tasks = [asyncio.create_task(prefill.prefill(asked)), asyncio.create_task(generate(decode, asked))]
        await asyncio.sleep(0)
        assert (prefill.prompt_queue.queued_tokens, decode.prompt_queue.queued_tokens) == (84, 84)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (prefill.prompt_queue.queued_tokens, decode.prompt_queue.queued_tokens) == (0, 0)
        assert prefill.prompt_queue.computed_prompts == decode.prompt_queue.computed_prompts == 0
    async with start("prefill") as prefill, start() as decode:
        at_tokens: list[int] = []
        await decode.generate(
            request(max_tokens=2), None, lambda _: at_tokens.append(decode.prompt_queue.queued_tokens)
        )
        assert at_tokens == [0, 0]
        task = asyncio.create_task(prefill.prefill(request()))
        await asyncio.sleep(0)
        assert prefill.prompt_queue.queued_tokens == 100
        descriptor = await task
        assert prefill.prompt_queue.queued_tokens == 0
        task = asyncio.create_task(generate(decode, request(), descriptor))
        await asyncio.sleep(0)
        assert decode.prompt_queue.queued_tokens == 0
        await task
        for queue in (prefill.prompt_queue, decode.prompt_queue):
            assert (queue.computed_prompts, queue.computed_tokens) == (1, 100)


async def test_a_descriptor_tells_how_long_prefill_took(start: Any) -> None:
    async with start("prefill", speed_up=1) as prefill:
        began = time.monotonic()
        descriptor = await prefill.prefill(request(prompt(1000)))
        took_s = time.monotonic() - began
    assert descriptor.prefill_s == pytest.approx(took_s, abs=0.005)
    assert took_s > 0.01


async def test_a_step_that_breaks_kills_the_engine_rather_than_hanging_it(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as engine:
        monkeypatch.setattr(engine._scheduler, "step", lambda: 1 / 0)
        with pytest.raises(EngineDead, match="ZeroDivisionError"):
            await generate(engine, request())
        with pytest.raises(EngineDead):
            await engine.check_health()


async def test_stop_is_safe_twice_and_after_a_start_that_failed(model_path: str) -> None:
    spec = EngineSpec(
        role="decode",
        is_disaggregated=False,
        replica_id="r",
        model_path=model_path + "/nothing",
        device="cpu",
        tensor_parallel_size=1,
        engine_args={},
    )
    engine = create_engine("sim", spec)
    with pytest.raises(ConfigError, match="source"):
        await engine.start()
    for _ in range(2):
        await engine.stop()


@pytest.mark.parametrize(
    ("engine_args", "field", "words"),
    [
        ({"speedup": 2}, "engine_args.speedup", "no such argument"),
        ({"speed_up": 0}, "engine_args.speed_up", "a number above 0, or max"),
        ({"speed_up": "fast"}, "engine_args.speed_up", "max"),
        ({"max_model_len": 999_999}, "engine_args", "num_blocks"),
        ({"max_num_seqs": 4096}, "engine_args", "max_num_batched_tokens"),
        ({"profile": "h100"}, "engine_args.profile", "known are"),
        ({"profile": "/there/is/no.yaml"}, "engine_args.profile", "No such file"),
        ({"faults": [{"kind": "flood", "at": 1}]}, "engine_args.faults.0.kind", "prefill_error"),
        ({"faults": [{"kind": "hang"}]}, "engine_args.faults.0", "either `at` or `probability`"),
        ({"faults": [{"kind": "hang", "at": 1, "when": 3}]}, "engine_args.faults.0.when", "no such argument"),
    ],
)
def test_an_argument_that_cannot_be_is_named(engine_args: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(engine_args)
    assert caught.value.field.startswith(field)
    assert words in caught.value.problem


def configured(**changes: Any) -> dict[str, Any]:
    model = {"name": "tiny", "source": "baton:tiny", "prefill": {"engine": "sim"}, "decode": {"engine": "sim"}}
    return {"models": [{**model, **changes}], "transfer": {}}


def test_a_configuration_with_sim_engines_is_checked_before_any_starts() -> None:
    config = parse(configured(engine_args={"speed_up": "max"}, decode={"engine": "sim", "tensor_parallel_size": 8}))
    assert check(config, []) == "cpu"
    assert check(config, [1]) == "cuda"
    assert gpus_of_replica(config.models[0].decode, "cuda") == 0
    refused: dict[str, dict[str, Any]] = {
        "engine_args": {"engine_args": {"gpu_memory_utilization": 0.5}},
        "prefill.engine_args": {"prefill": {"engine": "sim", "engine_args": {"gpu_memory_utilization": 0.5}}},
    }
    for section, changes in refused.items():
        with pytest.raises(ConfigError) as caught:
            check(parse(configured(**changes)), [])
        assert caught.value.field == f"models.0.{section}.gpu_memory_utilization"
    with pytest.raises(ConfigError, match="same engine"):
        parse(configured(prefill={"engine": "vllm"}))
    with pytest.raises(ConfigError, match="another profile"):
        parse(configured(engine_args={"tensor_parallel_size": 2}))
