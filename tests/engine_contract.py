"""Tests of what app/engines/base.py promises for every engine.

tests/unit/engines/test_contract.py runs them on the sim and the scripted engine, and tests/engines/test_contract.py on
vLLM and SGLang.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from app.engines.base import Engine
from app.errors import EngineDead
from app.messages import GenerateRequest, TokenDelta, TransferDescriptor
from tests.conftest import eventually

SOON_S = 5.0
"""How soon KV must be freed that nobody needs any more; leases are much longer."""


def new_id() -> str:
    return f"contract-{uuid.uuid4().hex[:8]}"


@dataclass
class Pair:
    """A running prefill engine and a running decode engine."""

    prefill: Engine
    decode: Engine
    make_prompt: Callable[[int], list[int]]
    """Returns a prompt of so many tokens, none of which is cached."""
    num_tokens_of_slow: int = 800
    """The length of a prompt that takes long enough to be interrupted."""
    slow_prefill: dict[str, Any] = field(default_factory=dict)
    slow_decode: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters that make a leg slow if many tokens do not."""
    can_decode_prefill: bool = True
    can_prefill_decode: bool = True
    is_exact: bool = True
    """Whether a token is the same whatever else its step computes; in bfloat16 it may be another one of two that are
    about as likely."""
    keeps_kv: bool = True
    """Whether a prompt's KV exists before decode asks for it."""

    def request(self, num_tokens: int = 40, **sampling: Any) -> GenerateRequest:
        sampling = {"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, **sampling}
        return GenerateRequest(request_id=new_id(), prompt_token_ids=self.make_prompt(num_tokens), sampling=sampling)

    def begin(self, request: GenerateRequest, descriptor: TransferDescriptor | None) -> Running:
        """Start decoding `request`."""
        return Running(self.decode, request, descriptor)

    def begin_on_prefill(self, request: GenerateRequest) -> Running:
        """Start the whole of `request` on the prefill engine."""
        return Running(self.prefill, request, None)

    async def are_idle(self) -> bool:
        """Return whether no engine holds KV, runs a request or counts a prompt as queued."""
        for engine in (self.prefill, self.decode):
            stats = await engine.stats()
            if stats.num_used_blocks or stats.num_running or stats.num_waiting or engine.prompt_queue.queued_tokens:
                return False
        return True

    async def is_kv_kept(self) -> bool:
        """Return whether prefill holds KV."""
        return (await self.prefill.stats()).num_used_blocks > 0

    async def until_idle(self) -> None:
        await eventually(self.are_idle, SOON_S, "all KV and all queues are as before")


class Running:
    """A request that decode is working on."""

    def __init__(self, engine: Engine, request: GenerateRequest, descriptor: TransferDescriptor | None) -> None:
        self.deltas: list[TokenDelta] = []
        self._has_delta = asyncio.Event()
        self.task = asyncio.create_task(engine.generate(request, descriptor, self._emit))

    def _emit(self, delta: TokenDelta) -> None:
        self.deltas.append(delta)
        self._has_delta.set()

    def tokens(self) -> list[int]:
        """Return the tokens so far."""
        return [token for delta in self.deltas for token in delta.token_ids]

    async def until_first_delta(self) -> None:
        first = asyncio.create_task(self._has_delta.wait())
        await asyncio.wait([first, self.task], return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            first.cancel()
            await self.task

    async def abort(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


def check_deltas(deltas: list[TokenDelta], num_tokens: int) -> None:
    assert sum(len(delta.token_ids) for delta in deltas) == num_tokens
    reports = [delta.report for delta in deltas]
    assert reports[0] is not None
    if not reports[0].is_complete:  # prefill sampled the first token; the next delta tells of the KV
        assert len(deltas[0].token_ids) == 1
        assert reports[0].kind == "remote"
        del reports[0]
    assert reports[0] is not None
    assert reports[0].is_complete
    assert reports[1:] == [None] * len(reports[1:])
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]


class EngineContract:
    """The tests, which use the fixture `pair`.  Each leaves the engines as it found them."""

    async def test_the_first_delta_carries_the_report_and_the_last_a_finish_reason(self, pair: Pair) -> None:
        request = pair.request()
        descriptor = await pair.prefill.prefill(request)
        assert (descriptor.request_id, descriptor.prompt_tokens) == (request.request_id, 40)
        running = pair.begin(request, descriptor)
        await running.task
        check_deltas(running.deltas, 40)
        report = [delta.report for delta in running.deltas if delta.report][-1]
        assert (report.kind, report.prefill_replica) == ("remote", descriptor.replica_id)
        assert report.transferred_tokens
        await pair.until_idle()

    async def test_decode_computes_a_prompt_itself_where_it_can(self, pair: Pair) -> None:
        if not pair.can_decode_prefill:
            pytest.skip("this decode engine cannot prefill")
        running = pair.begin(pair.request(), None)
        await running.task
        check_deltas(running.deltas, 40)
        report = running.deltas[0].report
        assert report is not None
        assert (report.kind, report.prefill_replica, report.transferred_tokens) == ("local", None, 0)
        await pair.until_idle()

    @pytest.mark.parametrize("is_remote", [True, False], ids=["remote", "local"])
    async def test_a_sequence_goes_on_after_what_another_has_generated(self, pair: Pair, is_remote: bool) -> None:
        if not is_remote and not pair.can_decode_prefill:
            pytest.skip("this decode engine cannot prefill")
        request = pair.request()
        whole = pair.begin(request, await pair.prefill.prefill(request))
        await whole.task
        for cut in (1, 17, 39):
            again = msgspec.structs.replace(request, request_id=new_id(), cache_salt=new_id())
            rest = again.resumed(whole.tokens()[:cut])
            running = pair.begin(rest, await pair.prefill.prefill(rest) if is_remote else None)
            await running.task
            check_deltas(running.deltas, 40 - cut)
            report = running.deltas[0].report
            assert report is not None
            assert report.kind == ("remote" if is_remote else "local")
            if pair.is_exact:
                assert running.tokens() == whole.tokens()[cut:]
        await pair.until_idle()

    async def test_prefill_runs_whole_sequences_where_it_can_and_keeps_nothing_of_them(self, pair: Pair) -> None:
        if not pair.can_prefill_decode:
            pytest.skip("this prefill engine cannot decode")
        request = pair.request()
        there, here = pair.begin_on_prefill(request), pair.begin(request, None)
        await asyncio.gather(there.task, here.task)
        check_deltas(there.deltas, 40)
        assert there.tokens() == here.tokens()
        report = there.deltas[0].report
        assert report is not None
        assert (report.kind, report.transferred_tokens) == ("local", 0)
        await pair.until_idle()

    async def test_aborting_a_whole_sequence_on_prefill_frees_its_kv(self, pair: Pair) -> None:
        if not pair.can_prefill_decode:
            pytest.skip("this prefill engine cannot decode")
        running = pair.begin_on_prefill(pair.request(max_tokens=500, **pair.slow_decode))
        await running.until_first_delta()
        await running.abort()
        await pair.until_idle()

    async def test_kv_that_nobody_fetches_is_freed_at_once_when_it_is_released(self, pair: Pair) -> None:
        expired = (await pair.prefill.stats()).num_expired_handoffs
        request = pair.request()
        descriptor = await pair.prefill.prefill(request)
        if pair.keeps_kv:
            await eventually(pair.is_kv_kept, SOON_S, "the KV is kept")
        for _ in range(2):
            await pair.prefill.release(request.request_id)
            await pair.decode.release(request.request_id, descriptor)
            await pair.until_idle()
        assert (await pair.prefill.stats()).num_expired_handoffs == expired

    async def test_releasing_what_is_unknown_or_was_fetched_does_no_harm(self, pair: Pair) -> None:
        request = pair.request()
        descriptor = await pair.prefill.prefill(request)
        await pair.begin(request, descriptor).task
        for engine in (pair.prefill, pair.decode):
            await engine.release("never heard of")
        await pair.prefill.release(request.request_id)
        await pair.decode.release(request.request_id, descriptor)
        again = pair.request()
        running = pair.begin(again, await pair.prefill.prefill(again))
        await running.task
        check_deltas(running.deltas, 40)
        await pair.until_idle()

    async def test_aborting_a_prefill_frees_its_kv(self, pair: Pair) -> None:
        request = pair.request(pair.num_tokens_of_slow, **{"max_tokens": 8, **pair.slow_prefill})
        task = asyncio.create_task(pair.prefill.prefill(request))
        async with asyncio.timeout(SOON_S):
            while not pair.prefill.prompt_queue.queued_tokens:
                await asyncio.sleep(0)
                await pair.prefill.stats()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await pair.prefill.release(request.request_id)  # SGLang's `prefill` had returned
        await pair.until_idle()

    @pytest.mark.parametrize("moment", ["at once", "after the first delta"])
    async def test_aborting_a_request_on_decode_frees_its_kv_on_both_sides(self, pair: Pair, moment: str) -> None:
        request = pair.request(max_tokens=500, **pair.slow_decode)
        descriptor = await pair.prefill.prefill(request)
        running = pair.begin(request, descriptor)
        await (asyncio.sleep(0) if moment == "at once" else running.until_first_delta())
        await running.abort()
        if not running.deltas:  # it may not have started to fetch the KV
            await pair.prefill.release(request.request_id)
            await pair.decode.release(request.request_id, descriptor)
        await pair.until_idle()

    async def test_a_prompt_is_queued_until_it_is_computed(self, pair: Pair) -> None:
        queue = pair.prefill.prompt_queue
        await pair.prefill.stats()
        before = queue.computed_prompts, queue.computed_tokens
        request = pair.request()
        running = pair.begin(request, await pair.prefill.prefill(request))
        await running.task
        await pair.until_idle()
        assert (queue.computed_prompts, queue.computed_tokens) == (before[0] + 1, before[1] + 40)


async def check_death(pair: Pair, kill: Callable[[Engine], Awaitable[None]]) -> None:
    """The methods of a dead decode engine raise EngineDead, and it can be stopped, even twice."""
    events = asyncio.create_task(_read_to_the_end(pair.decode))
    await pair.decode.check_health()
    await kill(pair.decode)

    async def is_said() -> bool:
        with suppress(EngineDead):
            await pair.decode.check_health()
            return False
        return True

    await eventually(is_said, SOON_S, "the death is said")
    with pytest.raises(EngineDead):
        await pair.decode.stats()
    with pytest.raises(EngineDead):
        await pair.decode.generate(pair.request(), None, lambda _: None)
    for engine in (pair.decode, pair.prefill):
        await engine.stop()
        await engine.stop()
        with pytest.raises(EngineDead):
            await engine.check_health()
    await asyncio.wait_for(events, SOON_S)


async def _read_to_the_end(engine: Engine) -> None:
    async for _ in engine.kv_events():
        pass
