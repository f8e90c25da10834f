"""The SGLang engine behind the Engine protocol, over an object that answers as SGLang's ``Engine`` does."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest

from app.config import parse
from app.engines import progress
from app.engines.base import EngineInfo, EngineSpec
from app.engines.owned_args import OWNED_ARGS
from app.engines.registry import create_engine
from app.engines.sglang import CONNECT_TIMEOUT_S, SglangEngine, build_engine_args
from app.engines.transport import NamedTransport
from app.errors import ConfigError, EngineDead, EngineFailed, InvalidRequest, PrefillFailed
from app.messages import UNKNOWN_RANK, EngineName, GenerateRequest, Logprobs, Role, TokenDelta, TransferDescriptor
from tests.conftest import eventually

VOCAB_SIZE = 100
PROMPT = [11, 12, 13]
EOS, STOP = 2, 50
HANG = "hang"
NO_SUCH_PORT_S = 1.0
"""How long a refused connection may take at most, far less than SGLang's own attempts."""

Step = dict[str, Any] | Exception | str


def output(*token_ids: int, reason: dict[str, Any] | None = None, cached: int = 0, **meta: Any) -> dict[str, Any]:
    """What SGLang yields for a request that streams."""
    facts = {"id": "x", "finish_reason": reason, "cached_tokens": cached, "prompt_tokens": len(PROMPT), **meta}
    return {"text": "", "output_ids": list(token_ids), "meta_info": facts}


LENGTH = {"type": "length", "length": 2}


def stopped(matched: int) -> dict[str, Any]:
    return {"type": "stop", "matched": matched}


def aborted(status_code: int | None = None, message: str = "KV transfer failed") -> dict[str, Any]:
    return output(reason={"type": "abort", "message": message, "status_code": status_code, "err_type": None})


ANSWER: list[Step] = [output(20, cached=1), output(21, 22, reason=LENGTH)]


class FakeSglang:
    """SGLang's ``Engine``: follows a script for each request in turn, the last one for all further requests."""

    def __init__(self) -> None:
        self.scripts: list[list[Step]] = [ANSWER]
        self.asked: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.num_open = 0
        self.loads: list[Any] = []
        self.pids: list[int | None] = []
        self.num_shutdowns = 0
        self.answers = True
        self.num_asked = 0
        self.tokenizer_manager = SimpleNamespace(
            load_snapshot_reader=SimpleNamespace(read_all=lambda: self.loads), get_internal_state=self._answer
        )

    async def _answer(self) -> list[dict[str, Any]]:
        self.num_asked += 1
        await (asyncio.sleep(0) if self.answers else asyncio.Event().wait())
        return [{}]

    async def async_generate(self, **arguments: Any) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(arguments)
        return self._follow(self.scripts[min(len(self.asked), len(self.scripts)) - 1], arguments["rid"])

    async def _follow(self, script: list[Step], rid: str) -> AsyncGenerator[dict[str, Any], None]:
        self.num_open += 1
        try:
            for step in script:
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, str):
                    await asyncio.Event().wait()
                else:
                    yield step
        except BaseException:
            self.aborted.append(rid)
            raise
        finally:
            self.num_open -= 1

    def get_all_child_pids(self) -> list[int | None]:
        return self.pids

    def shutdown(self) -> None:
        self.num_shutdowns += 1


Start = Callable[..., tuple[SglangEngine, FakeSglang]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start engines; no prefill is left of any at the end of the test."""
    engines: list[SglangEngine] = []

    def start(role: Role = "decode", *, is_disaggregated: bool = True, **fields: Any) -> Any:
        engine = SglangEngine(spec(role, is_disaggregated=is_disaggregated, **fields))
        fake: Any = FakeSglang()
        engine._engine, engine._vocab_size, engine._page_size, engine._kv_bytes_per_token = fake, VOCAB_SIZE, 16, 4
        engine._eos_token_id = EOS
        engines.append(engine)
        return engine, fake

    yield start
    for engine in engines:
        await engine.stop()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [engine._prefills for engine in engines] == [{}] * len(engines)


def spec(role: Role = "decode", *, is_disaggregated: bool = True, device: Any = "cpu", **fields: Any) -> EngineSpec:
    given: dict[str, Any] = {
        "replica_id": f"{role}-1",
        "model_path": "/models/tiny",
        "tensor_parallel_size": 1,
        "engine_args": {},
        "kv_host": "127.0.0.1",
        "kv_port": 20000,
    }
    return EngineSpec(role=role, is_disaggregated=is_disaggregated, device=device, **{**given, **fields})


def request(request_id: str = "r", *, prompt: list[int] = PROMPT, priority: int = 0, **sampling: Any) -> Any:
    return GenerateRequest(request_id=request_id, prompt_token_ids=prompt, sampling=sampling, priority=priority)


def descriptor(port: int, room: int = 7) -> TransferDescriptor:
    return TransferDescriptor(
        engine="sglang",
        replica_id="prefill-1",
        request_id="r",
        prompt_tokens=len(PROMPT),
        cached_tokens=0,
        ready_at=time.time(),
        lease_s=30,
        params={"host": "127.0.0.1", "port": port, "room": room},
    )


class Bootstrap:
    """The bootstrap server of a prefill engine."""

    def __init__(self) -> None:
        self.port = 0
        self.num_connections = 0

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[Bootstrap]:
        async def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_connections += 1
            writer.close()

        server = await asyncio.start_server(count, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        yield self
        server.close()
        await server.wait_closed()


@pytest.fixture
async def prefill_port() -> AsyncIterator[int]:
    async with Bootstrap().listening() as bootstrap:
        yield bootstrap.port


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def generate(
    engine: SglangEngine,
    asked: GenerateRequest | None = None,
    handoff: TransferDescriptor | None = None,
    into: list[TokenDelta] | None = None,
) -> list[TokenDelta]:
    deltas: list[TokenDelta] = [] if into is None else into
    await engine.generate(asked or request(), handoff, deltas.append)
    return deltas


async def settle(condition: Callable[[], bool], what: str) -> None:
    async def is_so() -> bool:
        return condition()

    await eventually(is_so, 5, what)


# Deltas


async def test_each_output_becomes_one_delta(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    deltas = await generate(engine)
    assert [delta.token_ids for delta in deltas] == [[20], [21, 22]]
    assert [delta.finish_reason for delta in deltas] == [None, "length"]
    assert fake.aborted == []


async def test_the_request_reaches_sglang_as_it_is(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    asked = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling={"temperature": 0.5}, cache_salt="salt")
    await generate(engine, asked)
    (arguments,) = fake.asked
    del arguments["rid"]
    assert arguments == {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0.5, "max_new_tokens": 16},
        "stream": True,
        "cache_salt": "salt",
        "require_reasoning": False,
    }


async def test_the_report_comes_with_the_first_delta_only(start: Start) -> None:
    engine, _ = start(is_disaggregated=False)
    first, last = await generate(engine)
    assert last.report is None
    assert first.report is not None
    assert (first.report.kind, first.report.decode_replica) == ("local", "decode-1")
    assert (first.report.cached_tokens, first.report.transferred_tokens) == (1, 0)


@pytest.mark.parametrize(
    ("reason", "sampling", "finish_reason", "stop_reason"),
    [
        (stopped(EOS), {}, "stop", None),
        (stopped(EOS), {"stop_token_ids": [STOP]}, "stop", None),
        (stopped(EOS), {"stop_token_ids": [EOS]}, "stop", None),
        (stopped(STOP), {"stop_token_ids": [STOP]}, "stop", STOP),
        (LENGTH, {"stop_token_ids": [STOP]}, "length", None),
        (LENGTH, {}, "length", None),
    ],
    ids=[
        "end of sequence",
        "end of sequence, others named",
        "end of sequence, named",
        "named token",
        "length, others named",
        "length",
    ],
)
async def test_only_a_token_that_the_request_names_is_a_stop_reason(
    start: Start, reason: dict[str, Any], sampling: dict[str, Any], finish_reason: str, stop_reason: int | None
) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20), output(21, reason=reason)]]
    first, last = await generate(engine, request(**sampling))
    assert (first.finish_reason, first.stop_reason) == (None, None)
    assert (last.finish_reason, last.stop_reason) == (finish_reason, stop_reason)


# Log probabilities

OF_TOKENS: dict[str, Any] = {"output_token_logprobs": [(-0.5, 20, None), (-3.0, 21, None)]}
OF_CANDIDATES: dict[str, Any] = {
    "output_top_logprobs": [[(-0.5, 20, None), (-1.5, 9, None)], [(-0.25, 8, None), (-2.0, 9, None)]]
}


@pytest.mark.parametrize(
    ("num", "meta", "expected"),
    [
        (0, OF_TOKENS, Logprobs([[20], [21]], [[-0.5], [-3.0]], [UNKNOWN_RANK, UNKNOWN_RANK])),
        (
            2,
            {**OF_TOKENS, **OF_CANDIDATES},
            Logprobs([[20, 20, 9], [21, 8, 9]], [[-0.5, -0.5, -1.5], [-3.0, -0.25, -2.0]], [1, UNKNOWN_RANK]),
        ),
    ],
    ids=["tokens only", "with candidates"],
)
async def test_a_row_is_the_token_then_its_candidates(
    start: Start, num: int, meta: dict[str, Any], expected: Logprobs
) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20, 21, reason=LENGTH, **meta)]]
    (delta,) = await generate(engine, request(logprobs=num))
    assert delta.logprobs == expected
    assert delta.prompt_logprobs is None


async def test_a_tokens_rank_is_its_place_among_the_candidates(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    top = [(-0.1, 8, None), (-0.2, 20, None), (-0.3, 9, None)]
    fake.scripts = [[output(20, reason=LENGTH, output_token_logprobs=[(-0.2, 20, None)], output_top_logprobs=[top])]]
    (delta,) = await generate(engine, request(logprobs=3))
    assert delta.logprobs is not None
    assert delta.logprobs.ranks == [2]


async def test_log_probabilities_that_nobody_asked_for_are_left_out(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20, 21, reason=LENGTH, **OF_TOKENS)]]
    (delta,) = await generate(engine)
    assert (delta.logprobs, delta.prompt_logprobs) == (None, None)


OF_PROMPT: dict[str, Any] = {
    "input_token_logprobs": [(None, 11, None), (-1.0, 12, None), (-2.0, 13, None)],
    "input_top_logprobs": [None, [(-1.0, 12, None)], [(-0.5, 5, None)]],
}


async def test_the_prompts_come_once_and_without_its_first_token_which_has_none(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20, **OF_PROMPT), output(21, reason=LENGTH, **OF_PROMPT)]]
    first, last = await generate(engine, request(prompt_logprobs=1))
    assert first.prompt_logprobs == Logprobs([[12, 12], [13, 5]], [[-1.0, -1.0], [-2.0, -0.5]], [1, UNKNOWN_RANK])
    assert (last.prompt_logprobs, first.logprobs) == (None, None)


async def test_each_side_has_as_many_candidates_as_it_asked_for(start: Start) -> None:
    """SGLang has one number for both: the larger one."""
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20, 21, reason=LENGTH, **OF_TOKENS, **OF_CANDIDATES, **OF_PROMPT)]]
    (delta,) = await generate(engine, request(logprobs=2, prompt_logprobs=0))
    assert fake.asked[0]["top_logprobs_num"] == 2
    assert delta.logprobs is not None
    assert delta.prompt_logprobs is not None
    assert [len(row) for row in delta.logprobs.token_ids] == [3, 3]
    assert delta.prompt_logprobs.token_ids == [[12], [13]]
    assert delta.prompt_logprobs.ranks == [1, UNKNOWN_RANK]


# Endings


async def test_what_sglang_finds_wrong_with_a_request_is_a_refusal(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[ValueError("top_p must be in (0, 1]")]]
    with pytest.raises(InvalidRequest, match="top_p must be"):
        await generate(engine)


@pytest.mark.parametrize("is_disaggregated", [True, False])
async def test_an_abort_with_400_is_a_refusal(start: Start, prefill_port: int, is_disaggregated: bool) -> None:
    engine, fake = start(is_disaggregated=is_disaggregated)
    fake.scripts = [[aborted(400, "the grammar does not compile")]]
    with pytest.raises(InvalidRequest, match="the grammar does not compile"):
        await generate(engine, handoff=descriptor(prefill_port) if is_disaggregated else None)


@pytest.mark.parametrize("status_code", [None, 500, 503])
async def test_an_abort_before_the_first_token_is_a_failed_prefill(
    start: Start, prefill_port: int, status_code: int | None
) -> None:
    engine, fake = start()
    fake.scripts = [[aborted(status_code)]]
    with pytest.raises(PrefillFailed, match="prefill-1: KV transfer failed"):
        await generate(engine, handoff=descriptor(prefill_port))
    assert fake.num_open == 0
    assert (await engine.stats()).num_failed_transfers == 1


@pytest.mark.parametrize(("message", "num"), [("KV checksum mismatch", 1), ("KV transfer failed", 0)])
async def test_kv_that_has_changed_on_the_way_is_counted(
    start: Start, prefill_port: int, message: str, num: int
) -> None:
    engine, fake = start()
    fake.scripts = [[aborted(500, message)]]
    with pytest.raises(PrefillFailed, match=message):
        await generate(engine, handoff=descriptor(prefill_port))
    assert (await engine.stats()).num_checksum_mismatches == num


async def test_an_abort_after_the_first_token_is_a_failure_of_decode(start: Start, prefill_port: int) -> None:
    engine, fake = start()
    fake.scripts = [[output(20), aborted(500)]]
    received: list[TokenDelta] = []
    with pytest.raises(EngineFailed, match="KV transfer failed"):
        await generate(engine, handoff=descriptor(prefill_port), into=received)
    assert [delta.token_ids for delta in received] == [[20]]
    assert (await engine.stats()).num_failed_transfers == 0


async def test_an_abort_without_prefill_is_a_failure_of_the_engine(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[aborted(500)]]
    with pytest.raises(EngineFailed, match="KV transfer failed"):
        await generate(engine)


@pytest.mark.parametrize("script", [[HANG], [output(20), HANG]], ids=["before the first token", "after it"])
async def test_cancelling_aborts_the_request_in_sglang(start: Start, script: list[Step]) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [script]
    task = asyncio.create_task(generate(engine))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fake.aborted == [fake.asked[0]["rid"]]
    assert fake.num_open == 0


# What would end SGLang's scheduler


@pytest.mark.parametrize(
    ("prompt", "sampling", "named"),
    [
        ([VOCAB_SIZE], {}, "prompt"),
        ([0, -1], {}, "prompt"),
        (PROMPT, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        (PROMPT, {"stop_token_ids": [-1]}, "stop_token_ids"),
        (PROMPT, {"top_k": 2**31}, "top_k"),
        (PROMPT, {"logprobs": VOCAB_SIZE + 1}, "logprobs"),
        (PROMPT, {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_what_its_tensors_cannot_hold_is_refused(
    start: Start, prefill_port: int, role: Role, prompt: list[int], sampling: dict[str, Any], named: str
) -> None:
    engine, fake = start(role)
    asked = request(prompt=prompt, **sampling)
    with pytest.raises(InvalidRequest, match=rf"^{named}\b"):
        await (engine.prefill(asked) if role == "prefill" else generate(engine, asked, descriptor(prefill_port)))
    assert fake.asked == []


async def test_the_vocabularys_ends_are_served(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    await generate(engine, request(prompt=[0, VOCAB_SIZE - 1], stop_token_ids=[0, VOCAB_SIZE - 1]))
    assert len(fake.asked) == 1


async def test_what_cannot_be_translated_is_refused_by_prefill_already(start: Start) -> None:
    engine, fake = start("prefill")
    with pytest.raises(InvalidRequest, match="bad_words"):
        await engine.prefill(request(bad_words=["no"]))
    assert fake.asked == []


@pytest.mark.parametrize(
    ("engine_args", "priority", "expected"),
    [({}, 0, None), ({"enable_priority_scheduling": True}, 0, None), ({"enable_priority_scheduling": True}, -3, -3)],
    ids=["none", "usual", "set"],
)
async def test_a_priority_reaches_sglang(
    start: Start, engine_args: dict[str, Any], priority: int, expected: int | None
) -> None:
    engine, fake = start(is_disaggregated=False, engine_args=engine_args)
    await generate(engine, request(priority=priority))
    assert fake.asked[0].get("priority") == expected


async def test_a_priority_that_the_pool_does_not_schedule_by_is_refused(start: Start) -> None:
    engine, _ = start(is_disaggregated=False)
    with pytest.raises(InvalidRequest, match=r"^priority: .*enable_priority_scheduling"):
        await generate(engine, request(priority=1))


@pytest.mark.parametrize(
    ("engine_args", "sampling"),
    [({"enable_deterministic_inference": True}, {"seed": 5}), ({"reasoning_parser": "qwen3"}, {})],
    ids=["seed", "reasoning"],
)
async def test_what_the_pools_arguments_allow_is_served(
    start: Start, engine_args: dict[str, Any], sampling: dict[str, Any]
) -> None:
    asked = GenerateRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling={**sampling, "structured_outputs": {"regex": "a"}},
        reasoning_ended="seed" in sampling,
    )
    refusing, _ = start(is_disaggregated=False)
    with pytest.raises(InvalidRequest):
        await generate(refusing, asked)
    engine, fake = start(is_disaggregated=False, engine_args=engine_args)
    assert await generate(engine, asked)
    assert fake.asked[0]["require_reasoning"] is not asked.reasoning_ended


async def test_no_request_id_of_sglangs_is_the_beginning_of_another(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    for request_id in ("r", "r", "r1", "r1-longer"):
        await generate(engine, request(request_id))
    rids = [arguments["rid"] for arguments in fake.asked]
    assert len(set(rids)) == 4
    assert len({len(rid) for rid in rids}) == 1


# Prefill


async def test_prefill_returns_while_its_leg_goes_on(start: Start) -> None:
    engine, fake = start("prefill", kv_host="10.0.0.1", kv_port=21000, transfer_lease_s=12)
    fake.scripts = [[HANG]]
    handoff = await engine.prefill(request())
    assert (handoff.replica_id, handoff.prompt_tokens, handoff.lease_s) == ("prefill-1", len(PROMPT), 12)
    assert not handoff.has_expired(0.0)
    await settle(lambda: len(fake.asked) == 1, "the leg has begun")
    assert fake.aborted == []
    assert list(engine._prefills) == ["r"]


async def test_both_legs_meet_in_the_room_of_the_descriptor(start: Start, prefill_port: int) -> None:
    prefill, prefilling = start("prefill", kv_port=prefill_port)
    decode, decoding = start("decode")
    decoding.scripts = [[output(20, 21, reason=LENGTH, **OF_TOKENS, **OF_CANDIDATES)]]
    handoff = await prefill.prefill(request(logprobs=1))
    await generate(decode, request(logprobs=1), handoff)
    rooms = [
        {name: value for name, value in fake.asked[0].items() if name.startswith("bootstrap_")}
        for fake in (prefilling, decoding)
    ]
    room = handoff.params["room"]
    assert rooms == [{"bootstrap_host": "127.0.0.1", "bootstrap_port": prefill_port, "bootstrap_room": room}] * 2
    assert prefilling.asked[0]["input_ids"] == decoding.asked[0]["input_ids"] == PROMPT
    assert prefilling.asked[0]["top_logprobs_num"] == 1  # prefill samples the first token


async def test_each_prefill_has_a_room_of_its_own(start: Start) -> None:
    engine, _ = start("prefill")
    rooms = {(await engine.prefill(request(str(number)))).params["room"] for number in range(50)}
    assert len(rooms) == 50
    assert all(0 <= room < 2**63 for room in rooms)  # SGLang's rooms are signed 64-bit integers


async def test_releasing_ends_the_leg_of_that_request_only(start: Start) -> None:
    engine, fake = start("prefill")
    fake.scripts = [[HANG]]
    await engine.prefill(request("r"))
    await engine.prefill(request("r-1"))
    await settle(lambda: len(fake.asked) == 2, "both legs have begun")
    await engine.release("r")
    await settle(lambda: "r" not in engine._prefills, "the leg has ended")
    assert fake.aborted == [fake.asked[0]["rid"]]
    assert list(engine._prefills) == ["r-1"]


async def test_releasing_what_is_not_there_is_harmless(start: Start) -> None:
    engine, fake = start("prefill")
    fake.scripts = [[output(20, reason=LENGTH)]]
    await engine.release("never")
    await engine.prefill(request())
    await settle(lambda: not engine._prefills, "the leg has ended")
    await engine.release("r")
    assert fake.aborted == []


async def test_releasing_a_prefill_that_has_just_begun_leaves_nothing(start: Start) -> None:
    engine, fake = start("prefill")
    fake.scripts = [[HANG]]
    await engine.prefill(request())
    await asyncio.sleep(0)
    await engine.release("r")
    await settle(lambda: not engine._prefills, "the leg has ended")


@pytest.mark.parametrize(
    ("step", "num_expired"),
    [
        (aborted(500, "Request 1 timed out after 30 s in KVPoll.Bootstrapping"), 1),
        (aborted(500, "the decode engine is gone"), 0),
        (ValueError("input is too long"), 0),
    ],
    ids=["lease ran out", "decode gone", "refused"],
)
async def test_a_leg_that_ends_badly_leaves_nothing_and_is_counted(start: Start, step: Step, num_expired: int) -> None:
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    engine, fake = start("prefill")
    fake.scripts = [[step]]
    await engine.prefill(request())
    await settle(lambda: not engine._prefills, "the leg has ended")
    gc.collect()
    assert unhandled == []
    assert (await engine.stats()).num_expired_handoffs == num_expired


@pytest.mark.parametrize("ending", ["end", "release"])
async def test_a_prompt_is_queued_until_its_leg_has_ended(start: Start, ending: str) -> None:
    engine, fake = start("prefill")
    fake.scripts = [[HANG if ending == "release" else output(20, reason=LENGTH)]]
    asked = msgspec.structs.replace(request(prompt=[1] * 50), expected_cached_tokens=16)
    await engine.prefill(asked)
    assert engine.prompt_queue.queued_tokens == 34
    if ending == "release":
        await settle(lambda: len(fake.asked) == 1, "the leg has begun")
        assert engine.prompt_queue.queued_tokens == 34
        await engine.release("r")
    await settle(lambda: not engine.prompt_queue.queued_tokens, "the leg has ended")


async def test_a_prompt_that_is_served_here_is_queued_until_its_first_token(start: Start) -> None:
    engine, fake = start(is_disaggregated=False)
    fake.scripts = [[output(20), HANG]]
    received: list[int] = []
    task = asyncio.create_task(
        engine.generate(request(), None, lambda _: received.append(engine.prompt_queue.queued_tokens))
    )
    await settle(lambda: len(fake.asked) == 1, "it was asked")
    assert received or engine.prompt_queue.queued_tokens == len(PROMPT)
    await settle(lambda: bool(received), "the first token")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert received == [0]
    fake.scripts = [[ValueError("no")]]
    with pytest.raises(InvalidRequest):
        await generate(engine)
    assert engine.prompt_queue.queued_tokens == 0


async def test_a_prompt_whose_kv_comes_from_prefill_is_not_queued(start: Start, prefill_port: int) -> None:
    engine, fake = start()
    fake.scripts = [[HANG]]
    task = asyncio.create_task(generate(engine, handoff=descriptor(prefill_port)))
    await settle(lambda: len(fake.asked) == 1, "it was asked")
    assert engine.prompt_queue.queued_tokens == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert engine.prompt_queue.queued_tokens == 0


# Decode from a prefill


async def test_decode_reports_the_prefill_whose_kv_it_got(start: Start, prefill_port: int) -> None:
    engine, _ = start()
    engine.transport_watch = NamedTransport("intra-node tcp/lo")
    first, last = await generate(engine, handoff=descriptor(prefill_port))
    assert last.report is None
    assert first.report is not None
    assert (first.report.kind, first.report.reason) == ("remote", "")
    assert (first.report.prefill_replica, first.report.decode_replica) == ("prefill-1", "decode-1")
    assert (first.report.cached_tokens, first.report.transferred_tokens) == (1, len(PROMPT))
    assert first.report.transport == "intra-node tcp/lo"
    stats = await engine.stats()
    assert (stats.num_transfers, stats.transferred_bytes) == (1, 4 * len(PROMPT))


async def test_decode_cannot_go_without_a_prefill(start: Start) -> None:
    engine, fake = start()
    with pytest.raises(PrefillFailed):
        await generate(engine)
    assert fake.asked == []


async def test_a_prefill_engine_that_does_not_listen_is_noticed_at_once(start: Start) -> None:
    engine, fake = start()
    began = time.monotonic()
    with pytest.raises(PrefillFailed, match="prefill-1 does not listen"):
        await generate(engine, handoff=descriptor(closed_port()))
    assert time.monotonic() - began < NO_SUCH_PORT_S < CONNECT_TIMEOUT_S
    assert fake.asked == []
    assert (await engine.stats()).num_failed_transfers == 1


async def test_a_prefill_engine_that_never_answers_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("app.engines.sglang.CONNECT_TIMEOUT_S", 0.01)
    monkeypatch.setattr(asyncio, "open_connection", connect)
    engine, _ = start()
    with pytest.raises(PrefillFailed, match="TimeoutError"):
        await asyncio.wait_for(generate(engine, handoff=descriptor(1)), 5)


async def test_a_prefill_engine_is_not_polled_for_every_request(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engines.sglang.HEARTBEAT_S", 60.0)
    engine, _ = start()
    async with Bootstrap().listening() as bootstrap:
        for _ in range(5):
            await generate(engine, handoff=descriptor(bootstrap.port))
        await settle(lambda: bootstrap.num_connections > 0, "the connection was counted")
        assert bootstrap.num_connections == 1


async def test_a_prefill_engine_that_was_gone_is_found_again(start: Start) -> None:
    engine, _ = start()
    port = closed_port()
    with pytest.raises(PrefillFailed):
        await generate(engine, handoff=descriptor(port))
    async with Bootstrap().listening(port):
        assert await generate(engine, handoff=descriptor(port))


async def test_a_prefill_engine_that_has_gone_is_noticed_at_the_next_poll(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.sglang.HEARTBEAT_S", 0.0)
    engine, _ = start()
    async with Bootstrap().listening() as bootstrap:
        await generate(engine, handoff=descriptor(bootstrap.port))
    with pytest.raises(PrefillFailed):
        await generate(engine, handoff=descriptor(bootstrap.port))


# The engine itself


def load(**fields: Any) -> Any:
    usual = {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_used_tokens": 0, "max_total_num_tokens": 160}
    return SimpleNamespace(**{**usual, "disaggregation": None, "queues": None, **fields})


async def test_its_load_is_the_sum_of_all_ranks_in_blocks(start: Start) -> None:
    engine, fake = start()
    in_flight = SimpleNamespace(prefill_inflight_queue_reqs=3, prefill_bootstrap_queue_reqs=5)
    on_decode = SimpleNamespace(prefill_inflight_queue_reqs=0, prefill_bootstrap_queue_reqs=0)
    fake.loads = [
        load(num_running_reqs=1, num_waiting_reqs=4, num_used_tokens=17),
        load(num_running_reqs=2, num_used_tokens=16, disaggregation=in_flight),
        load(max_total_num_tokens=0, disaggregation=on_decode, queues=SimpleNamespace(prealloc_ready=7)),
    ]
    stats = await engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1 + 2 + 3, 4)
    assert (stats.num_blocks, stats.num_used_blocks) == (20, 3)
    assert stats.num_held_up == 5 + 7


async def test_it_is_dead_with_any_of_its_processes(start: Start) -> None:
    engine, fake = start()
    spawn = multiprocessing.get_context("spawn")
    schedulers = [spawn.Process(target=time.sleep, args=(60,), daemon=True) for _ in range(2)]
    for scheduler in schedulers:
        scheduler.start()
    fake.pids = [scheduler.pid for scheduler in schedulers]
    await engine.check_health()
    schedulers[1].kill()  # and nobody waits for it: it is still in the table of processes

    async def is_dead() -> bool:
        with suppress(EngineDead):
            await engine.check_health()
            return False
        return True

    await eventually(is_dead, 5, "the death was noticed")
    with pytest.raises(EngineDead):
        await engine.stats()
    schedulers[0].kill()
    schedulers[0].join()


@pytest.mark.parametrize("script", [[HANG], [output(20), HANG]])
async def test_if_it_hangs_it_is_dead_and_its_requests_fail(
    start: Start, monkeypatch: pytest.MonkeyPatch, script: list[Step]
) -> None:
    monkeypatch.setattr(progress, "REST_S", 0.01)
    monkeypatch.setattr(progress, "IDLE_FLOOR_S", 0.1)
    engine, fake = start(is_disaggregated=False)
    engine._tasks.keep("sglang-progress", engine._progress.run)
    fake.scripts = [script]
    await asyncio.sleep(0.05)
    assert fake.num_asked == 0, "it has no work"
    task = asyncio.create_task(engine.generate(request(), None, lambda _: None))
    await settle(lambda: fake.num_asked > 2, "it was asked")
    assert not task.done(), "it may take long over one request"
    fake.answers = False
    with pytest.raises(EngineDead, match="it made no step for"):
        await asyncio.wait_for(task, 5)
    for call in (engine.check_health, engine.stats):
        with pytest.raises(EngineDead, match="it made no step for"):
            await call()
    assert (fake.num_open, len(fake.aborted)) == (0, 1)


async def test_a_load_that_a_stopped_scheduler_has_locked_is_given_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engines.sglang.LOAD_TIMEOUT_S", 0.05)
    engine, fake = start()
    goes_on = threading.Event()
    num_reads = 0

    def read_all() -> list[Any]:
        nonlocal num_reads
        num_reads += 1
        goes_on.wait(5)
        return fake.loads

    fake.tokenizer_manager.load_snapshot_reader.read_all = read_all
    for _ in range(3):
        with pytest.raises(EngineFailed, match="did not tell its load"):
            await engine.stats()
    assert num_reads == 1, "one thread waits, not one for each call"
    fake.loads = [load(num_running_reqs=2)]
    goes_on.set()
    assert (await engine.stats()).num_running == 2


async def test_it_is_dead_before_it_starts() -> None:
    with pytest.raises(EngineDead):
        await SglangEngine(spec()).check_health()


async def test_stopping_ends_prefills_and_the_processes_once(start: Start) -> None:
    engine, fake = start("prefill")
    fake.scripts = [[HANG]]
    await engine.prefill(request())
    await settle(lambda: len(fake.asked) == 1, "the leg has begun")
    await engine.stop()
    await engine.stop()
    await settle(lambda: not engine._prefills, "the leg has ended")
    assert (len(fake.aborted), fake.num_shutdowns) == (1, 1)


async def test_stopping_what_did_not_start_is_harmless() -> None:
    await SglangEngine(spec()).stop()


class Starting:
    """SGLang's package, as far as a start needs it."""

    def __init__(self, refuses: Exception | None = None) -> None:
        self.refuses = refuses
        self.chunked_prefill_size: int | None = 1024
        self.arguments: dict[str, Any] = {}
        self.num_loops = 0

    def launch(self, arguments: dict[str, Any]) -> Any:
        if self.refuses:
            raise self.refuses
        self.arguments = arguments
        config = SimpleNamespace(
            vocab_size=VOCAB_SIZE,
            dtype=SimpleNamespace(itemsize=2),
            attention_arch=SimpleNamespace(name="MHA"),
            get_total_num_kv_heads=lambda: 2,
            head_dim=8,
            v_head_dim=8,
            num_hidden_layers=3,
        )
        manager = SimpleNamespace(
            model_config=config,
            context_len=4096,
            auto_create_handle_loop=self.count_loop,
            tokenizer=SimpleNamespace(eos_token_id=2),
        )
        return SimpleNamespace(
            tokenizer_manager=manager,
            server_args=SimpleNamespace(
                page_size=16, kv_cache_dtype="auto", chunked_prefill_size=self.chunked_prefill_size
            ),
            _scheduler_init_result=SimpleNamespace(scheduler_infos=[{"max_total_num_tokens": 1000}]),
            shutdown=lambda: None,
        )

    def count_loop(self) -> None:
        self.num_loops += 1


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Starting], None]:
    """Put a package in SGLang's place; what an engine sets of its environment is lost."""

    def install(package: Starting) -> None:
        monkeypatch.setattr("app.engines.sglang.os", SimpleNamespace(environ={}))
        monkeypatch.setattr("app.engines.sglang_surface.launch", package.launch)
        monkeypatch.setattr("app.engines.sglang_surface.version", lambda: "0.5.23")
        monkeypatch.setattr("app.engines.sglang_surface.check_environment", lambda _: None)
        monkeypatch.setattr("app.engines.sglang_surface.has_cache_salt", lambda: True)
        monkeypatch.setattr("app.engines.plugins.cpu_waits.check_sglang", lambda: None)

    return install


async def test_it_starts_and_says_what_it_is(install: Callable[[Starting], None]) -> None:
    package = Starting()
    install(package)
    engine = SglangEngine(spec())
    info = await engine.start()
    assert info == EngineInfo(
        engine="sglang",
        version="0.5.23",
        num_blocks=62,
        block_size_tokens=16,
        max_model_len=4096,
        chunk_tokens=1024,
        prefix_cache="published",
    )
    settings = json.loads(package.arguments.pop("kv_events_config"))
    assert package.arguments == build_engine_args(spec())
    assert package.num_loops == 1
    assert (engine._vocab_size, engine._kv_bytes_per_token) == (VOCAB_SIZE, 3 * 2 * (8 + 8) * 2)
    sockets = Path(settings["endpoint"].removeprefix("ipc://")).parent
    assert sockets.is_dir()
    await engine.stop()
    assert not sockets.exists()
    assert [events async for events in engine.kv_events()] == []


@pytest.mark.parametrize("size", [-1, None])
async def test_prompts_that_sglang_does_not_cut_are_computed_in_one_step(
    install: Callable[[Starting], None], size: int | None
) -> None:
    package = Starting()
    package.chunked_prefill_size = size
    install(package)
    engine = SglangEngine(spec())
    assert (await engine.start()).chunk_tokens == 4096
    await engine.stop()


@pytest.mark.parametrize(
    ("role", "is_disaggregated", "engine_args", "expected"),
    [
        ("prefill", True, {"disable_radix_cache": True}, "none"),
        ("decode", False, {"disable_radix_cache": True}, "none"),
        ("decode", True, {"disaggregation_decode_enable_radix_cache": False}, "none"),
        ("decode", True, {"disable_radix_cache": True}, "none"),
        ("decode", False, {"speculative_algorithm": "EAGLE"}, "silent"),
    ],
)
async def test_without_a_prefix_cache_of_which_tokens_are_told_there_are_no_events(
    install: Callable[[Starting], None],
    role: Role,
    is_disaggregated: bool,
    engine_args: dict[str, Any],
    expected: str,
) -> None:
    package = Starting()
    install(package)
    engine = SglangEngine(spec(role, is_disaggregated=is_disaggregated, engine_args=engine_args))
    info = await engine.start()
    assert info.prefix_cache == expected
    assert "kv_events_config" not in package.arguments
    assert [events async for events in engine.kv_events()] == []
    await engine.stop()


@pytest.mark.parametrize("error", [TypeError("unexpected keyword 'x'"), ValueError("unexpected keyword 'x'")])
async def test_arguments_that_sglang_refuses_are_an_error_of_the_configuration(
    install: Callable[[Starting], None], error: Exception
) -> None:
    install(Starting(error))
    with pytest.raises(ConfigError, match="unexpected keyword 'x'") as caught:
        await SglangEngine(spec()).start()
    assert caught.value.field == "engine_args"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_environment_has_the_configurations_times(device: str) -> None:
    engine = SglangEngine(spec(device=device, transfer_lease_s=12, transfer_timeout_s=2.5))
    environment = engine._environment()
    assert environment["SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"] == "12"
    assert environment["SGLANG_DISAGGREGATION_WAITING_TIMEOUT"] == "3"
    assert environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"
    assert ("SGLANG_USE_CPU_ENGINE" in environment) == (device == "cpu")


# Arguments

COMMON = {
    "model_path": "/models/tiny",
    "tp_size": 2,
    "host": "127.0.0.1",
    "log_level": "warning",
    "incremental_streaming_output": True,
    "schedule_low_priority_values_first": True,
}
DECODE_CACHE = {"disaggregation_decode_enable_radix_cache": True}
TRANSFER = {
    "disaggregation_transfer_backend": "nixl",
    "disaggregation_bootstrap_port": 20000,
    "disaggregation_enable_kv_checksum": False,
}


@pytest.mark.parametrize(
    ("role", "is_disaggregated", "device", "others"),
    [
        ("decode", False, "cuda", {}),
        ("decode", False, "cpu", {"sleep_on_idle": True}),
        ("prefill", True, "cuda", {"disaggregation_mode": "prefill", **TRANSFER}),
        ("prefill", True, "cpu", {"disaggregation_mode": "prefill", "sleep_on_idle": True, **TRANSFER}),
        ("decode", True, "cuda", {"disaggregation_mode": "decode", **DECODE_CACHE, **TRANSFER}),
        (
            "decode",
            True,
            "cpu",
            {
                "disaggregation_mode": "decode",
                "sleep_on_idle": True,
                "disaggregation_decode_retraction_backup": "cpu_tensor",
                **DECODE_CACHE,
                **TRANSFER,
            },
        ),
    ],
)
def test_an_engines_arguments_follow_from_its_role_and_device(
    role: Role, is_disaggregated: bool, device: str, others: dict[str, Any]
) -> None:
    built = build_engine_args(spec(role, is_disaggregated=is_disaggregated, device=device, tensor_parallel_size=2))
    assert built == {**COMMON, "device": device, **others}


def test_the_users_arguments_win_over_batons_defaults() -> None:
    built = build_engine_args(spec(engine_args={"log_level": "info", "sleep_on_idle": False, "page_size": 32}))
    assert (built["log_level"], built["sleep_on_idle"], built["page_size"]) == ("info", False, 32)


@pytest.mark.parametrize(
    "engine_args", [{"disable_radix_cache": True}, {"enable_hisparse": True}, {"speculative_algorithm": "NGRAM"}]
)
def test_decode_has_no_prefix_cache_where_sglang_would_refuse_or_overrule(engine_args: dict[str, Any]) -> None:
    assert build_engine_args(spec(engine_args=engine_args))["disaggregation_decode_enable_radix_cache"] is False
    wanted = {**engine_args, **DECODE_CACHE}
    assert build_engine_args(spec(engine_args=wanted))["disaggregation_decode_enable_radix_cache"] is True


def test_what_baton_must_decide_is_refused_from_the_user() -> None:
    defaults = {"log_level", "schedule_low_priority_values_first", "sleep_on_idle"}
    may_change = {*defaults, *DECODE_CACHE, "disaggregation_decode_retraction_backup"}
    assert set(build_engine_args(spec())) - may_change <= set(OWNED_ARGS["sglang"])


@pytest.mark.parametrize(
    ("engine", "name"), [(engine, name) for engine in get_args(EngineName) for name in OWNED_ARGS[engine]]
)
@pytest.mark.parametrize("place", ["model", "prefill", "decode"])
def test_an_argument_that_baton_sets_is_refused_for_every_engine(engine: EngineName, name: str, place: str) -> None:
    pools: dict[str, dict[str, Any]] = {"prefill": {"engine": engine}, "decode": {"engine": engine}}
    model: dict[str, Any] = {"name": "tiny", "source": "owner/tiny", **pools}
    (model if place == "model" else pools[place])["engine_args"] = {name: 1}
    with pytest.raises(ConfigError) as caught:
        parse({"models": [model], "transfer": {}})
    assert f"engine_args.{name} " in caught.value.problem
    assert OWNED_ARGS[engine][name] in caught.value.problem


@pytest.mark.parametrize("engine", get_args(EngineName))
def test_every_engine_is_known_by_its_name(engine: EngineName) -> None:
    assert type(create_engine(engine, spec())).__name__.lower() == f"{engine}engine"
    (model,) = parse({"models": [{"name": "tiny", "source": "owner/tiny", "decode": {"engine": engine}}]}).models
    assert model.can_decode_prefill is (engine != "sglang")
    assert OWNED_ARGS[engine]


def test_all_kv_is_compared_on_gpus_or_none() -> None:
    chosen = msgspec.structs.replace(spec(device="cuda"), transfer_checksum_rate=1.0)
    assert build_engine_args(chosen)["disaggregation_enable_kv_checksum"] is True
    assert build_engine_args(spec(device="cuda"))["disaggregation_enable_kv_checksum"] is False
    with pytest.raises(ConfigError, match="need a GPU"):
        build_engine_args(msgspec.structs.replace(chosen, device="cpu"))
