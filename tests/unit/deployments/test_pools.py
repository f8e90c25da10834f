"""The frontend's half of a handoff: what befalls it ends a sequence before the first token and never after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from app.channel.client import SubmittedSequence
from app.errors import PrefillFailed, ReplicaLost
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, TokenDelta
from app.routing.pool_state import PoolState
from app.routing.prefix_index import PrefixIndex
from deployments.frontend import pools
from deployments.frontend.pools import RayDecodePool, RayHandoff, RayPrefillPool
from tests.unit.waiting import until

DEADLINE_S = 5.0
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={})
FIRST, LAST = TokenDelta([1]), TokenDelta([2], finish_reason="stop")


class FakeChannel:
    """One sequence at a time, whose deltas the test puts."""

    channel_id = "channel"

    def __init__(self) -> None:
        self.sequences: list[SubmittedSequence] = []
        self.submitted: list[dict[str, Any]] = []
        self.finished: list[SubmittedSequence] = []

    def submit(self, request: GenerateRequest, emit: Callable[[TokenDelta], None], **said: Any) -> SubmittedSequence:
        self.submitted.append(said)
        self.sequences.append(SubmittedSequence(len(self.sequences), emit))
        return self.sequences[-1]

    def finish(self, sequence: SubmittedSequence) -> None:
        self.finished.append(sequence)


class Served:
    """A sequence with a handoff that is being decoded, and what Ray has still to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.channel = FakeChannel()
        self.attached: list[tuple[Any, ...]] = []
        self.answer: asyncio.Future[None] = loop.create_future()
        """Ray's, to `attach`."""
        self.prefill_lost: asyncio.Future[None] = loop.create_future()
        self.deltas: list[TokenDelta] = []
        channels = SimpleNamespace(channel=lambda replica: self.channel)
        monkeypatch.setattr(pools, "PoolChannels", lambda handle, view: channels)
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._attach))
        pool = RayDecodePool(handle, PoolState(PrefixIndex()))
        handoff = RayHandoff("p", "reference", self.prefill_lost, lambda: None)
        progress = SequenceProgress(self.deltas.append)
        self.task = asyncio.create_task(pool.generate(REQUEST, handoff, "", "d", progress))

    async def _attach(self, *arguments: Any, replica_id: str) -> None:
        self.attached.append((*arguments, replica_id))
        await self.answer

    async def begin(self, *deltas: TokenDelta) -> SubmittedSequence:
        """`attach` is on its way, and these deltas have come."""
        await until(lambda: bool(self.attached))
        (sequence,) = self.channel.sequences
        for delta in deltas:
            sequence.emit(delta)
        return sequence


Trouble = Callable[[Served], None]
TROUBLES: dict[str, tuple[Trouble, type[Exception]]] = {
    "attach unanswered": (lambda served: served.answer.set_exception(RayActorError()), ReplicaLost),
    "prefill replica gone": (lambda served: served.prefill_lost.set_result(None), PrefillFailed),
}
trouble = pytest.mark.parametrize(("strike", "error"), TROUBLES.values(), ids=TROUBLES)


async def test_decode_is_sent_the_reference_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    sequence = await served.begin(LAST)
    sequence.ended.set_result(None)
    await served.task
    assert served.attached == [("channel", 0, ["reference"], "d")]
    assert served.channel.finished == [sequence]


@trouble
async def test_trouble_before_the_first_token_fails_the_sequence(
    monkeypatch: pytest.MonkeyPatch, strike: Trouble, error: type[Exception]
) -> None:
    served = Served(monkeypatch)
    sequence = await served.begin()
    strike(served)
    with pytest.raises(error):
        await asyncio.wait_for(served.task, DEADLINE_S)
    assert served.channel.finished == [sequence]


@trouble
async def test_trouble_after_the_first_token_is_none_of_the_sequences(
    monkeypatch: pytest.MonkeyPatch, strike: Trouble, error: type[Exception]
) -> None:
    """The answer of an `attach` that arrived may be lost; decode has what it needs."""
    served = Served(monkeypatch)
    sequence = await served.begin(FIRST)
    strike(served)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not served.task.done()
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await served.task
    assert served.deltas == [FIRST, LAST]


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["ended", "cancelled"])
async def test_attach_outlives_its_sequence(monkeypatch: pytest.MonkeyPatch, is_cancelled: bool) -> None:
    served = Served(monkeypatch)
    sequence = await served.begin()
    if is_cancelled:
        served.task.cancel()
    else:
        sequence.ended.set_result(None)
    await asyncio.wait([served.task])
    assert served.task.cancelled() is is_cancelled
    assert served.channel.finished == [sequence]
    attaching = [task for task in asyncio.all_tasks() if task.get_name() == "attach"]
    assert len(attaching) == 1
    served.answer.set_result(None)
    await asyncio.wait(attaching)
    served.prefill_lost.set_result(None)  # nobody listens any more


async def test_a_prefill_replica_gets_whole_sequences_on_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = FakeChannel()
    monkeypatch.setattr(pools, "PoolChannels", lambda handle, view: SimpleNamespace(channel=lambda replica: channel))
    handle = SimpleNamespace(options=lambda **_: None)
    deltas: list[TokenDelta] = []
    pool = RayPrefillPool(handle, PoolState(PrefixIndex()))
    serving = pool.generate(REQUEST, None, "decode_full", "p", SequenceProgress(deltas.append))
    task = asyncio.create_task(serving)
    await until(lambda: channel.sequences)
    (sequence,) = channel.sequences
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await task
    assert (deltas, channel.finished) == ([LAST], [sequence])
    assert channel.submitted == [{"has_handoff": False, "local_reason": "decode_full"}]
