"""The frontend's half of a handoff: what befalls it ends a sequence before the first token and never after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from app.channel.client import SubmittedSequence
from app.errors import HandoffNotTaken, PrefillFailed, ReplicaLost, TakenElsewhere
from app.frontend.attempt import Lost
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport, TokenDelta
from app.routing.role_pools import RolePools
from deployments.frontend import pools
from deployments.frontend.pools import RayDeployment, RayHandoff
from tests.unit.waiting import until

DEADLINE_S = 5.0
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={})
FIRST, LAST = TokenDelta([1]), TokenDelta([2], finish_reason="stop")


class FakeChannel:
    """One sequence at a time, whose deltas the test puts."""

    channel_id = "channel"
    is_closed = False

    def __init__(self) -> None:
        self.lost: Lost = asyncio.get_running_loop().create_future()
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
        self.prefill_lost: Lost = loop.create_future()
        self.deltas: list[TokenDelta] = []
        channels = SimpleNamespace(channel=lambda replica: self.channel)
        monkeypatch.setattr(pools, "PoolChannels", lambda *_: channels)
        handle = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._attach))
        pool = RayDeployment(handle, RolePools({}), "decode")
        handoff = RayHandoff("p", "reference", self.prefill_lost, lambda: None)
        self.progress = SequenceProgress(self.deltas.append)
        self.task = asyncio.create_task(pool.generate(REQUEST, handoff, "", "d", self.progress))

    async def _attach(self, *arguments: Any, replica_id: str) -> None:
        self.attached.append((*arguments, replica_id))
        await asyncio.shield(self.answer)

    async def begin(self, *deltas: TokenDelta) -> SubmittedSequence:
        """`attach` is on its way, and these deltas have come."""
        await until(lambda: bool(self.attached))
        (sequence,) = self.channel.sequences
        for delta in deltas:
            sequence.emit(delta)
        return sequence


Trouble = Callable[[Served], None]
TROUBLES: dict[str, tuple[Trouble, type[Exception]]] = {
    "attach refused": (lambda served: served.answer.set_exception(ReplicaLost("d")), HandoffNotTaken),
    "prefill replica gone": (lambda served: served.prefill_lost.set_result(ReplicaLost("p")), PrefillFailed),
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


async def test_what_waits_for_kv_of_a_prefill_replica_that_is_gone_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    await served.begin(TokenDelta([1], report=PrefillReport("remote", "", "p", "d", 0, None, "")))
    served.prefill_lost.set_result(ReplicaLost("p"))
    with pytest.raises(PrefillFailed):
        await asyncio.wait_for(served.task, DEADLINE_S)


async def test_attach_is_not_called_again_when_decode_is_gone(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    served = Served(monkeypatch)
    sequence = await served.begin()
    served.channel.is_closed = True
    sequence.fail(ReplicaLost("d"))
    with pytest.raises(ReplicaLost):
        await served.task
    served.answer.set_exception(RayActorError())
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "attach"])
    assert len(served.attached) == 1


async def test_a_replica_that_leaves_is_let_go_when_the_orchestrator_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    asked: list[Callable[[], object]] = []
    served.progress.on_leaving = asked.append
    sequence = await served.begin(FIRST)
    sequence.on_leaving()
    assert not sequence.ended.done()
    asked[0]()
    with pytest.raises(TakenElsewhere):
        await served.task
    assert served.channel.finished == [sequence]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(pools, "ATTACH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(pools, "ATTACH_AGAIN_S", 0.001)
    monkeypatch.setattr(pools, "ATTACH_DEADLINE_S", 0.3)
    monkeypatch.setattr(pools, "CALL_TIMEOUT_S", 0.1)


Answer = Callable[[Served], None]
NO_ANSWER: dict[str, Answer] = {
    "lost": lambda served: served.answer.set_exception(RayActorError()),
    "late": lambda served: None,
}
no_answer = pytest.mark.parametrize("lose", NO_ANSWER.values(), ids=NO_ANSWER)


@no_answer
async def test_a_lost_answer_to_attach_is_asked_for_again_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, quick: None, lose: Answer
) -> None:
    """The call may have come through; decode takes a reference once, however often it comes."""
    monkeypatch.setattr(pools, "ATTACH_DEADLINE_S", 60.0)
    served = Served(monkeypatch)
    sequence = await served.begin()
    lose(served)
    await until(lambda: len(served.attached) > 2)
    served.answer = asyncio.get_running_loop().create_future()
    served.answer.set_result(None)
    await until(lambda: not attaching())
    assert not served.task.done()
    assert set(map(str, served.attached)) == {"('channel', 0, ['reference'], 'd')"}
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await served.task


@no_answer
async def test_the_first_token_answers_for_attach(monkeypatch: pytest.MonkeyPatch, quick: None, lose: Answer) -> None:
    monkeypatch.setattr(pools, "ATTACH_DEADLINE_S", 60.0)
    served = Served(monkeypatch)
    sequence = await served.begin()
    lose(served)
    sequence.emit(FIRST)
    await until(lambda: not attaching())
    assert not served.task.done()
    sequence.ended.set_result(None)
    await served.task


@no_answer
async def test_without_an_answer_and_without_a_token_the_sequence_fails_after_a_while(
    monkeypatch: pytest.MonkeyPatch, quick: None, lose: Answer
) -> None:
    served = Served(monkeypatch)
    await served.begin()
    lose(served)
    with pytest.raises(HandoffNotTaken, match="it cannot be given the handoff"):
        await asyncio.wait_for(served.task, DEADLINE_S)
    assert len(served.attached) > 1
    await until(lambda: not attaching())


async def test_what_a_second_attach_is_told_says_nothing_of_the_first(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(pools, "ATTACH_DEADLINE_S", 60.0)
    served = Served(monkeypatch)
    sequence = await served.begin()
    served.answer.set_exception(RayActorError())
    await until(lambda: len(served.attached) > 1)
    served.answer = asyncio.get_running_loop().create_future()
    served.answer.set_exception(ReplicaLost("d"))  # as when Serve has just removed the replica
    num_before = len(served.attached)
    await until(lambda: len(served.attached) > num_before + 1)
    assert not served.task.done()
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await served.task


def attaching() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "attach"]


class Unanswered:
    """A prefill replica that takes no call; it counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[str] = []
        channel = FakeChannel()
        monkeypatch.setattr(pools, "PoolChannels", lambda *_: SimpleNamespace(channel=lambda replica: channel))
        monkeypatch.setattr(pools, "object_ref_of", lambda call: call)
        self.pool = RayDeployment(SimpleNamespace(options=self._method), RolePools({}), "prefill")

    def _method(self, *, method_name: str, **_: Any) -> Any:
        async def call(*_: Any, replica_id: str) -> None:
            self.called.append(method_name)
            await asyncio.Event().wait()

        return SimpleNamespace(remote=call)


async def test_a_prefill_that_its_replica_does_not_take_is_given_up(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    prefill = Unanswered(monkeypatch)
    with pytest.raises(ReplicaLost, match="it does not take the call"):
        await asyncio.wait_for(prefill.pool.start(REQUEST, "p"), DEADLINE_S)
    await until(lambda: prefill.called == ["prefill", "abandon"])
    await until(lambda: not prefill.pool._abandoning)


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
    (task,) = attaching()
    served.answer.set_result(None)
    await asyncio.wait([task])
    served.prefill_lost.set_result(ReplicaLost("p"))  # nobody listens any more


async def test_a_prefill_replica_gets_whole_sequences_on_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = FakeChannel()
    monkeypatch.setattr(pools, "PoolChannels", lambda *_: SimpleNamespace(channel=lambda replica: channel))
    handle = SimpleNamespace(options=lambda **_: None)
    deltas: list[TokenDelta] = []
    pool = RayDeployment(handle, RolePools({}), "prefill")
    serving = pool.generate(REQUEST, None, "decode_full", "p", SequenceProgress(deltas.append))
    task = asyncio.create_task(serving)
    await until(lambda: channel.sequences)
    (sequence,) = channel.sequences
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await task
    assert (deltas, channel.finished) == ([LAST], [sequence])
    assert channel.submitted == [{"has_handoff": False, "local_reason": "decode_full"}]
