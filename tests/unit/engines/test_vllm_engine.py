"""The vLLM engine behind the Engine protocol, over an engine core that does nothing by itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from vllm.v1.engine.exceptions import EngineDeadError

from app.engines import progress, vllm
from app.engines.base import EngineSpec
from app.engines.plugins.nixl_checksum import CHECKS, CHECKSUMS, SUMS_METHOD
from app.engines.plugins.nixl_lease import LATE_READS
from app.engines.vllm import VllmEngine, _phases, _Running, build_engine_args, samples_first_token
from app.engines.vllm_surface import PullTimes
from app.errors import EngineDead, EngineFailed, InvalidRequest
from app.messages import GenerateRequest, Role, TokenDelta, TransferDescriptor
from tests.unit.waiting import until

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


@pytest.mark.parametrize(
    ("role", "engine_args", "policy"),
    [
        ("prefill", {}, "priority"),
        ("decode", {}, "fcfs"),
        ("prefill", {"scheduling_policy": "fcfs"}, "fcfs"),
        ("decode", {"scheduling_policy": "priority"}, "priority"),
    ],
)
def test_prefill_goes_by_priority_unless_the_engine_args_say_otherwise(
    spec: EngineSpec, role: Role, engine_args: dict[str, Any], policy: str
) -> None:
    spec = msgspec.structs.replace(spec, is_disaggregated=False, role=role, engine_args=engine_args)
    assert build_engine_args(spec).scheduling_policy == policy


class Core(VllmEngine):
    """What the engine core puts out for a request is put out by the test."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()

    async def _run(self, request: GenerateRequest, params: Any, on_output: Callable[[Any, Any], None], *_: Any) -> None:
        while (output := await self.outputs.get()) is not None:
            if isinstance(output, Exception):
                raise output
            on_output(output, None)


def output(**fields: Any) -> Any:
    usual: dict[str, Any] = dict.fromkeys(
        ("finish_reason", "stop_reason", "new_logprobs", "new_prompt_logprobs_tensors", "prefill_stats")
    )
    return SimpleNamespace(**usual, new_token_ids=[5], kv_transfer_params=fields)


def step_output(request_id: str, finish_reason: str | None) -> Any:
    """What the engine core puts out for one of several requests."""
    made = output()
    made.request_id, made.finish_reason, made.finished = request_id, finish_reason, finish_reason is not None
    return made


@pytest.mark.parametrize(("engine_args", "priority"), [({}, 0), ({"scheduling_policy": "priority"}, -5)])
async def test_only_a_prompt_for_another_replica_has_a_priority_unless_engine_args_say_so(
    spec: EngineSpec, engine_args: dict[str, Any], priority: int
) -> None:
    asked: list[int] = []

    class Asked(Core):
        async def _run(self, request: GenerateRequest, *arguments: Any) -> None:
            asked.append(request.priority)
            await super()._run(request, *arguments)

    engine = Asked(msgspec.structs.replace(spec, engine_args=engine_args))
    request = msgspec.structs.replace(REQUEST, priority=-5)
    for each in (output(remote_host="h"), None, output(), None):
        engine.outputs.put_nowait(each)
    await engine.prefill(request)
    await engine.generate(request, None, lambda _: None)
    assert asked == [-5, priority]


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
    tokenized = SimpleNamespace(all_stop_token_ids=set(), bad_words_token_ids=None)
    made = SimpleNamespace(request_id="r-1", sampling_params=tokenized)
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


class Running:
    """An engine core with one request under way, and what the engine does to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spec: EngineSpec) -> None:
        self.outputs: asyncio.Queue[Any] = asyncio.Queue()
        self.answers = True
        self.num_asked = 0
        self.config = SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=False, num_gpu_blocks=7, block_size=16),
            model_config=SimpleNamespace(max_model_len=100, get_vocab_size=lambda: 2048),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
        )
        self.core = SimpleNamespace(
            vllm_config=self.config,
            resources=SimpleNamespace(engine_dead=False),
            get_output_async=self._output,
            call_utility_async=self._answer,
            add_request_async=self._add,
            abort_requests_async=self._abort,
            shutdown=lambda _: None,
        )
        params = SimpleNamespace(all_stop_token_ids=set(), bad_words_token_ids=None)
        self.made = SimpleNamespace(request_id="r-1", sampling_params=params)
        self.aborted: list[str] = []
        processor = SimpleNamespace(
            process_inputs=lambda *_, **__: copy(self.made), assign_request_id=lambda request: None
        )
        monkeypatch.setattr("app.engines.vllm.os", SimpleNamespace(environ={}))
        monkeypatch.setattr(VllmEngine, "_start_core", lambda _: (self.core, processor))
        self.engine: Any = VllmEngine(spec)
        self.killed: list[str] = []
        monkeypatch.setattr(self.engine._processes, "kill", lambda: self.killed.append("killed"))

    async def _output(self) -> Any:
        output = await self.outputs.get()
        if isinstance(output, Exception):
            raise output
        return output

    async def _answer(self, method: str) -> bool:
        self.num_asked += 1
        assert method == "is_scheduler_paused"
        await (asyncio.sleep(0) if self.answers else asyncio.Event().wait())
        return False

    async def _add(self, request: Any) -> None: ...

    async def _abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def begin(self) -> asyncio.Task[None]:
        await self.engine.start()
        task = asyncio.create_task(self.engine.generate(REQUEST, None, lambda _: None))
        await until(lambda: self.engine._running)
        return task


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (EngineDeadError(), "the engine process died"),
        (ValueError("what is this"), "what is this"),
        (SimpleNamespace(outputs=None, scheduler_stats=None), "not iterable"),
    ],
)
async def test_whatever_ends_the_handing_out_of_tokens_ends_the_engine(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, error: Any, said: str
) -> None:
    running = Running(monkeypatch, spec)
    task = await running.begin()
    running.outputs.put_nowait(error)
    with pytest.raises(EngineDead, match=said):
        await asyncio.wait_for(task, 5)
    with pytest.raises(EngineDead, match=said):
        await running.engine.check_health()
    assert running.killed, "nobody would read what it puts out"
    await running.engine.stop()


async def test_an_output_that_is_not_taken_fails_its_request_and_no_other(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(monkeypatch, spec)
    taken: list[TokenDelta] = []
    await running.engine.start()
    running.made.request_id = "bad"
    bad = asyncio.create_task(running.engine.generate(REQUEST, None, lambda _: 1 / 0))
    await until(lambda: "bad" in running.engine._running)
    running.made.request_id = "good"
    good = asyncio.create_task(running.engine.generate(REQUEST, None, taken.append))
    await until(lambda: "good" in running.engine._running)
    outputs = [step_output("bad", None), step_output("good", None), step_output("good", "stop")]
    running.outputs.put_nowait(SimpleNamespace(outputs=outputs, scheduler_stats=None))
    with pytest.raises(EngineFailed, match="an output was not taken: ZeroDivisionError"):
        await asyncio.wait_for(bad, 5)
    await asyncio.wait_for(good, 5)
    assert [delta.finish_reason for delta in taken] == [None, "stop"]
    assert running.aborted == ["bad"]
    await running.engine.stop()


async def test_a_request_that_comes_as_the_engine_core_dies_hears_of_its_death(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(monkeypatch, spec)
    await running.engine.start()

    async def die(_: Any) -> None:
        raise EngineDeadError

    running.core.add_request_async = die
    monkeypatch.setattr("app.engines.vllm.rejection", lambda descriptor: None)
    with pytest.raises(EngineDead):
        await running.engine.generate(REQUEST, None, lambda _: None)
    with pytest.raises(EngineDead):
        await running.engine.release("r", handoff())
    await running.engine.stop()


async def test_an_engine_core_that_hangs_is_dead_and_its_requests_fail(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REST_S", 0.01)
    monkeypatch.setattr(progress, "IDLE_FLOOR_S", 0.1)
    running = Running(monkeypatch, spec)
    task = await running.begin()
    await until(lambda: running.num_asked > 2)
    await running.engine.check_health()
    running.answers = False
    with pytest.raises(EngineDead, match="it made no step for"):
        await asyncio.wait_for(task, 5)
    for call in (running.engine.check_health, running.engine.stats):
        with pytest.raises(EngineDead, match="it made no step for"):
            await call()
    assert running.killed
    await running.engine.stop()


# What would end vLLM's workers


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"thinking_token_budget": 2**31}, "thinking_token_budget"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"stop_token_ids": list(range(100))}, "stop_token_ids"),
        ({"bad_words": ["a", "b"]}, "bad_words"),
    ],
)
async def test_what_its_tensors_cannot_hold_is_refused(spec: EngineSpec, sampling: dict[str, Any], named: str) -> None:
    """The last two show only when the model's own stop tokens are known and the words have become tokens."""

    async def add_request_async(request: Any) -> None:
        pytest.fail("the engine core got it")

    tokenized = SimpleNamespace(all_stop_token_ids=set(sampling.get("stop_token_ids", ())), bad_words_token_ids=None)
    if named == "bad_words":
        tokenized.bad_words_token_ids = [[1] * 513, [1] * 513]
    else:
        tokenized.all_stop_token_ids.update(range(1000, 1050))
    made = SimpleNamespace(request_id="r-1", sampling_params=tokenized)
    engine: Any = VllmEngine(spec)
    engine._vocab_size = 2048
    engine._core = SimpleNamespace(add_request_async=add_request_async)
    engine._input_processor = SimpleNamespace(process_inputs=lambda *_, **__: made)
    with pytest.raises(InvalidRequest, match=rf"^{named}\b"):
        await engine.generate(msgspec.structs.replace(REQUEST, sampling=sampling), None, lambda _: None)


async def test_a_grammar_is_checked_beside_the_loop(spec: EngineSpec) -> None:
    import vllm.sampling_params  # noqa: F401  which takes longer than any grammar

    checked_in: list[threading.Thread] = []

    def process_inputs(*_: Any, **__: Any) -> Any:
        checked_in.append(threading.current_thread())
        raise ValueError("no grammar")

    engine: Any = VllmEngine(spec)
    engine._core = SimpleNamespace()
    engine._input_processor = SimpleNamespace(process_inputs=process_inputs)
    for sampling in ({"structured_outputs": {"regex": "a"}}, {}):
        with pytest.raises(InvalidRequest, match="no grammar"):
            await engine.generate(msgspec.structs.replace(REQUEST, sampling=sampling), None, lambda _: None)
    assert [thread is threading.main_thread() for thread in checked_in] == [False, True]


@pytest.mark.parametrize("caches_prefixes", [True, False])
async def test_it_publishes_events_if_it_caches_prefixes(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, caches_prefixes: bool
) -> None:
    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=caches_prefixes, num_gpu_blocks=7, block_size=16),
        model_config=SimpleNamespace(max_model_len=100, get_vocab_size=lambda: 2048),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=4),
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
    assert info.chunk_tokens == 64
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


@pytest.mark.parametrize(
    ("sampling", "is_sampled"),
    [
        ({}, True),
        ({"temperature": 0.0, "max_tokens": 8, "logprobs": 2, "ignore_eos": True, "stop_token_ids": [5]}, True),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "logit_bias": {7: 1.0}}, True),
        ({"temperature": 0.0, "seed": 7}, True),
        ({"seed": 7}, False),
        ({"temperature": 0.7, "seed": 7}, False),
        ({"presence_penalty": 1.0}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"min_tokens": 2}, False),
        ({"structured_outputs": {"regex": "a"}}, False),
        ({"prompt_logprobs": 1}, False),
        ({"bad_words": ["a"]}, False),
        ({"of_tomorrow": 1}, False),
    ],
)
def test_prefill_samples_what_does_not_depend_on_earlier_tokens(sampling: dict[str, Any], is_sampled: bool) -> None:
    assert samples_first_token(sampling) == is_sampled


def known_length(engine: VllmEngine, max_model_len: int = 4096) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    engine._core = cast(Any, SimpleNamespace(vllm_config=config))


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "ended_by", "said"),
    [
        (8, 4096, "length", None),  # by the one token that prefill was asked for
        (1, 4096, "length", "length"),
        (8, 51, "length", "length"),  # the prompt has 50 tokens
        (8, 4096, "stop", "stop"),
    ],
)
async def test_the_first_token_ends_the_answer_only_if_it_is_the_last(
    spec: EngineSpec, max_tokens: int, max_model_len: int, ended_by: str, said: str | None
) -> None:
    engine = Core(spec)
    known_length(engine, max_model_len)
    request = msgspec.structs.replace(REQUEST, sampling={"temperature": 0.0, "max_tokens": max_tokens})
    sampled = output(remote_num_tokens=50)
    sampled.finish_reason = ended_by
    engine.outputs.put_nowait(sampled)
    engine.outputs.put_nowait(None)
    first = (await engine.prefill(request)).first_token
    assert first is not None
    assert (first.token_ids, first.finish_reason, first.report) == ([5], said, None)


@pytest.mark.parametrize(
    ("sampling", "held"),
    [({"temperature": 0.0, "presence_penalty": 1.0}, 50), ({"temperature": 0.0}, 49)],
    ids=["decode has to know what it generated", "prefill left a token to decode"],
)
async def test_a_token_that_decode_would_not_have_sampled_is_dropped(
    spec: EngineSpec, sampling: dict[str, Any], held: int
) -> None:
    engine = Core(spec)
    known_length(engine)
    engine.outputs.put_nowait(output(remote_num_tokens=held))
    engine.outputs.put_nowait(None)
    descriptor = await engine.prefill(msgspec.structs.replace(REQUEST, sampling=sampling))
    assert descriptor.first_token is None


@pytest.mark.parametrize(
    ("mode", "arguments"), [("corrupted", {}), ("remote", {"logits_processors": ["some.Processor"]})]
)
async def test_decode_samples_where_prefills_token_would_be_another(
    spec: EngineSpec, mode: Any, arguments: dict[str, Any]
) -> None:
    engine = Core(msgspec.structs.replace(spec, engine_args=arguments))
    known_length(engine)
    engine.outputs.put_nowait(output(remote_num_tokens=50))
    engine.outputs.put_nowait(None)
    assert (await engine.prefill(msgspec.structs.replace(REQUEST, prefill_mode=mode))).first_token is None


def handoff(**fields: Any) -> TransferDescriptor:
    usual: dict[str, Any] = {
        "engine": "vllm",
        "replica_id": "prefill",
        "request_id": "r",
        "prompt_tokens": 50,
        "cached_tokens": 16,
        "ready_at": time.time(),
        "lease_s": 30,
        "params": {"remote_num_tokens": 51},
    }
    return TransferDescriptor(**{**usual, **fields})


class Asked(Core):
    """Remembers what the engine core was asked for, and what decode released."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.asked: list[tuple[list[int], Any]] = []
        self.released: list[str] = []

    async def _run(self, request: GenerateRequest, params: Any, on_output: Callable[[Any, Any], None], *_: Any) -> None:
        self.asked.append((request.prompt_token_ids, params))
        await super()._run(request, params, on_output)

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        self.released.append(request_id)


@pytest.mark.parametrize(("max_tokens", "left"), [({"max_tokens": 8}, 7), ({}, 15), ({"max_tokens": None}, None)])
async def test_a_first_token_goes_out_before_the_kv_is_pulled(
    spec: EngineSpec, max_tokens: dict[str, Any], left: int | None
) -> None:
    engine = Asked(spec)
    known_length(engine)
    request = msgspec.structs.replace(REQUEST, sampling=max_tokens)
    emitted: list[TokenDelta] = []
    task = asyncio.create_task(engine.generate(request, handoff(first_token=TokenDelta([9])), emitted.append))
    await asyncio.sleep(0)
    ((prompt, params),) = engine.asked
    assert prompt == [*REQUEST.prompt_token_ids, 9]
    assert params.max_tokens == left
    assert params.extra_args["kv_transfer_params"] == {"remote_num_tokens": 50}  # prefill has no KV of that token
    assert [delta.token_ids for delta in emitted] == [[9]]
    assert emitted[0].report is not None
    assert (emitted[0].report.kind, emitted[0].report.cached_tokens) == ("remote", 16)
    assert not emitted[0].report.is_complete
    engine.outputs.put_nowait(None)
    await task
    assert engine.released == []


async def test_no_kv_is_pulled_for_an_answer_of_one_token(spec: EngineSpec) -> None:
    engine = Asked(spec)
    known_length(engine)
    emitted: list[TokenDelta] = []
    last = TokenDelta([9], finish_reason="stop")
    await engine.generate(REQUEST, handoff(first_token=last), emitted.append)
    assert (engine.asked, engine.released) == ([], [REQUEST.request_id])
    (delta,) = emitted
    assert (delta.token_ids, delta.finish_reason) == ([9], "stop")
    assert delta.report is not None
    assert (delta.report.kind, delta.report.transferred_tokens) == ("remote", 0)


@pytest.mark.parametrize("why", ["it is cancelled", "vLLM refuses it", "its parameters are refused"])
async def test_the_kv_of_a_request_that_the_engine_core_never_gets_is_released(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    import vllm.sampling_params  # noqa: F401  which takes long

    is_under_way, may_go_on = threading.Event(), threading.Event()

    def process_inputs(*_: Any, **__: Any) -> Any:
        is_under_way.set()
        may_go_on.wait(5)
        raise ValueError("no grammar")

    released: list[Any] = []

    async def add_request_async(request: Any) -> None:
        released.append(request)

    monkeypatch.setattr("app.engines.vllm.rejection", lambda descriptor: descriptor)
    engine: Any = VllmEngine(spec)
    engine._core = SimpleNamespace(add_request_async=add_request_async)
    engine._input_processor = SimpleNamespace(process_inputs=process_inputs)
    engine._vocab_size = 2048
    kind = "regexp" if why == "its parameters are refused" else "regex"
    request = msgspec.structs.replace(REQUEST, sampling={"structured_outputs": {kind: "a"}})
    descriptor = handoff()
    task = asyncio.create_task(engine.generate(request, descriptor, lambda _: None))
    if why == "it is cancelled":
        await until(is_under_way.is_set)
        task.cancel()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError if why == "it is cancelled" else InvalidRequest):
        await task
    assert released == [descriptor]


async def test_a_dead_engine_passes_no_first_token_on(spec: EngineSpec) -> None:
    emitted: list[TokenDelta] = []
    with pytest.raises(EngineDead):
        await Asked(spec).generate(REQUEST, handoff(first_token=TokenDelta([9])), emitted.append)
    assert emitted == []


def test_the_phases_of_a_pull_follow_each_other() -> None:
    running: Any = SimpleNamespace(began_at=1.0, pull=PullTimes(1.25, 1.5, 2.5))
    scheduled: Any = SimpleNamespace(type=SimpleNamespace(name="SCHEDULED"), timestamp=3.0)
    queued: Any = SimpleNamespace(type=SimpleNamespace(name="QUEUED"), timestamp=1.125)
    said: Any = SimpleNamespace(events=[queued, scheduled])
    assert _phases(running, said, 4.0) == {
        "admission": 0.25,
        "connection": 0.25,
        "transfer": 1.0,
        "next_step": 0.5,
        "step": 1.0,
    }
    assert _phases(running, cast(Any, SimpleNamespace(events=None)), 4.0) == {}


@pytest.mark.parametrize(("late", "reason"), [(["r-1"], "descriptor_expired"), (["another"], "transfer_failed")])
async def test_why_kv_was_not_used_is_said(spec: EngineSpec, late: list[str], reason: str) -> None:
    engine = VllmEngine(spec)
    running = _Running(lambda *_: None, asyncio.get_running_loop().create_future(), 0.0)
    engine._running["r-1"] = running
    stats: Any = SimpleNamespace(kv_connector_stats={LATE_READS: late, "num_kv_expired_reqs": [1]})
    engine._record(stats)
    computed: Any = SimpleNamespace(
        prefill_stats=SimpleNamespace(num_local_cached_tokens=0, num_external_cached_tokens=0)
    )
    assert engine._report(computed, running, handoff()).reason == reason
    assert engine._moved.num_kv_expired_reqs == 1


@pytest.mark.parametrize("positions", [[-3, -1], []])
async def test_kv_that_was_not_what_prefill_computed_is_counted_and_said(
    spec: EngineSpec, positions: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = VllmEngine(spec)
    running = _Running(lambda *_: None, asyncio.get_running_loop().create_future(), 0.0)
    engine._running["r-1"] = running
    result = "mismatch" if positions else "match"
    checks = [["r-1", result, positions], ["aborted meanwhile", "mismatch", [-1]], ["other", "skipped", []]]
    engine._record(cast(Any, SimpleNamespace(kv_connector_stats={CHECKS: checks})))
    computed: Any = SimpleNamespace(
        prefill_stats=SimpleNamespace(num_local_cached_tokens=0, num_external_cached_tokens=0)
    )
    reason = engine._report(computed, running, handoff(replica_id="prefill-7")).reason
    assert reason == ("kv_changed" if positions else "transfer_failed")
    assert [engine._checks[name] for name in ("match", "mismatch", "skipped")] == [
        not positions,
        1 + bool(positions),
        1,
    ]
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == bool(positions)
    for part in ("replica", "prefill-7", "2 blocks", "[-3, -1]") if positions else ():
        assert part in said[0]


class Workers:
    """The workers of a prefill engine, which sum up KV when the test lets them."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked: list[Any] = []

    async def collective_rpc_async(self, method: str, *, args: Any) -> Any:
        self.asked.append((method, args))
        return await self.answer


async def begin_prefill(spec: EngineSpec, rate: float) -> tuple[Workers, asyncio.Task[TransferDescriptor]]:
    """Prefill a request, which has been computed when this returns."""
    engine = Core(msgspec.structs.replace(spec, transfer_checksum_rate=rate))
    workers = Workers()
    engine._core = cast(Any, workers)
    sampling = {"presence_penalty": 1.0}  # so that decode samples the first token
    engine.outputs.put_nowait(output(remote_host="h", remote_block_ids=[[5, 2]]))
    engine.outputs.put_nowait(None)
    task = asyncio.create_task(engine.prefill(msgspec.structs.replace(REQUEST, sampling=sampling)))
    await asyncio.sleep(0.01)
    return workers, task


async def test_a_descriptor_has_checksums_if_the_request_is_sampled(spec: EngineSpec) -> None:
    workers, task = await begin_prefill(spec, 1.0)
    assert not task.done()
    workers.answer.set_result([["layout", [7, 8]]])
    assert (await task).params == {
        "remote_host": "h",
        "remote_block_ids": [[5, 2]],
        CHECKSUMS: [["layout", [7, 8]]],
    }
    assert workers.asked == [(SUMS_METHOD, ([[5, 2]],))]


async def test_nobody_sums_up_kv_of_requests_that_are_not_sampled(spec: EngineSpec) -> None:
    workers, task = await begin_prefill(spec, 0.0)
    assert CHECKSUMS not in (await task).params
    assert workers.asked == []


async def test_without_sums_the_descriptor_is_as_good(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it that workers fail, that they are slow, or that the request is cancelled: decode has to free the KV."""
    workers, task = await begin_prefill(spec, 1.0)
    workers.answer.set_exception(RuntimeError("out of memory"))
    assert (await task).params[CHECKSUMS] == []
    workers, task = await begin_prefill(spec, 1.0)
    task.cancel()
    assert (await task).params[CHECKSUMS] == []
    assert task.cancelling() == 0
    monkeypatch.setattr(vllm, "CHECKSUM_TIMEOUT_S", 0.01)
    workers, task = await begin_prefill(spec, 1.0)
    assert (await task).params[CHECKSUMS] == []
