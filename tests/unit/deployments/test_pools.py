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
from deployments.ready_replicas import ReadyReplicas
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


def deployment_of(
    replica: str, channels: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> RayDeployment:
    """Return a deployment of one replica, which Ray calls by `call`."""
    ready = ReadyReplicas()
    ready.update([SimpleNamespace(replica_id=SimpleNamespace(unique_id=replica), replica_metadata={})])
    monkeypatch.setattr(pools, "PoolChannels", lambda *_: channels)
    monkeypatch.setattr(pools, "deployment_id_of", lambda handle: handle)
    monkeypatch.setattr(pools, "ready_replicas_of", lambda _: ready)
    monkeypatch.setattr(pools, "call_by_reference", call)
    return RayDeployment(SimpleNamespace(options=lambda: None), RolePools({}), "decode")


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
        pool = deployment_of("d", channels, self._attach, monkeypatch)
        handoff = RayHandoff("p", "reference", self.prefill_lost, lambda: None)
        self.progress = SequenceProgress(self.deltas.append)
        self.task = asyncio.create_task(pool.generate(REQUEST, handoff, "", "d", self.progress))

    async def _attach(self, replica: Any, method: str, *arguments: Any) -> None:
        assert method == "attach"
        self.attached.append((*arguments, replica.replica_id.unique_id))
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
    asked: list[None] = []
    served.progress.on_leaving = lambda: asked.append(None)
    sequence = await served.begin(FIRST)
    sequence.on_leaving()
    assert not sequence.ended.done()
    assert asked
    served.progress.let_go()
    with pytest.raises(TakenElsewhere):
        await served.task
    assert served.channel.finished == [sequence]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(pools, "ATTACH_TIMEOUT_S", 0.05)
    monkeypatch.setattr(pools, "ATTACH_AGAIN_S", 0.001)
    monkeypatch.setattr(pools, "ATTACH_DEADLINE_S", 0.3)
    monkeypatch.setattr(pools, "ABANDON_TIMEOUT_S", 0.1)


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


async def test_a_prefill_is_sent_at_once_and_abandoned_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    answered = asyncio.get_running_loop().create_future()
    answered.set_result(None)

    def call(replica: Any, *words: Any) -> Any:
        calls.append((replica.replica_id.unique_id, *words))
        return answered

    channel = FakeChannel()
    pool = deployment_of("p", SimpleNamespace(channel=lambda _: channel), call, monkeypatch)
    handoff = await pool.start(REQUEST, "p")
    assert calls == [("p", "prefill", REQUEST)]
    assert (handoff.ref, handoff.lost) == (answered, channel.lost)
    handoff.cancel()
    await until(lambda: not pool._abandoning)
    assert calls[1:] == [("p", "abandon", "r")]


@pytest.mark.parametrize("error", [RayActorError(), None], ids=["Ray cannot send it", "Serve has removed it"])
async def test_a_prefill_that_cannot_be_sent_says_that_its_replica_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def call(*_: Any) -> None:
        assert error is not None
        raise error

    channels = SimpleNamespace(channel=lambda _: FakeChannel())
    pool = deployment_of("p" if error else "another", channels, call, monkeypatch)
    with pytest.raises(ReplicaLost):
        await pool.start(REQUEST, "p")


async def test_an_abandoned_prefill_that_is_not_answered_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    never = asyncio.get_running_loop().create_future()
    channel = FakeChannel()
    pool = deployment_of("p", SimpleNamespace(channel=lambda _: channel), lambda *_: never, monkeypatch)
    (await pool.start(REQUEST, "p")).cancel()
    await until(lambda: not pool._abandoning)


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
    deltas: list[TokenDelta] = []
    pool = deployment_of("p", SimpleNamespace(channel=lambda _: channel), lambda *_: None, monkeypatch)
    serving = pool.generate(REQUEST, None, "decode_full", "p", SequenceProgress(deltas.append))
    task = asyncio.create_task(serving)
    await until(lambda: channel.sequences)
    (sequence,) = channel.sequences
    sequence.emit(LAST)
    sequence.ended.set_result(None)
    await task
    assert (deltas, channel.finished) == ([LAST], [sequence])
    assert channel.submitted == [{"has_handoff": False, "local_reason": "decode_full"}]
