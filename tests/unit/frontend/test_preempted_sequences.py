"""Flex sequences that give way to a higher class: what becomes of them, of those they give way to, and of their KV."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import pytest

from app.errors import DeadlineExceeded, TakenElsewhere
from app.frontend.attempt import Handoff
from app.frontend.orchestrator import Orchestrator
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, PrefillReport, ReplicaLoad, TokenDelta, local_prefill
from app.routing.decision import RoutingHints, ServiceClass
from app.routing.preemption import MAX_PREEMPTIONS
from tests.unit.frontend.test_orchestrator import (
    DEADLINE_S,
    FIRST,
    HANG,
    LAST,
    LOST,
    REMOTE,
    SAMPLED_BY_PREFILL,
    Call,
    FakeDecode,
    FakePrefill,
    Script,
    ended,
    line_of,
    loads,
    orchestrator,
    request,
)
from tests.unit.waiting import until

NUM_TOKENS = 30
ONE = {"num_blocks": 1}
"""Replicas with room for one sequence."""


class Engine(FakeDecode):
    """Computes each token from all before it, and stands still as long as the test says so."""

    def __init__(self, *replicas: str) -> None:
        super().__init__(list(replicas))
        self.stands: set[int] = set()
        """First tokens of the prompts with which it does not go on."""

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        self.calls.append(Call(request, handoff, local_reason, replica))
        tokens, let_go = list(request.prompt_token_ids), asyncio.Event()
        progress.let_go = let_go.set
        report: PrefillReport | None = local_prefill(replica, 0)
        for number in range(request.num_replayed + 1, NUM_TOKENS + 1):
            tokens.append(sum(place * token for place, token in enumerate(tokens, 1)) % 1009)
            progress.take(TokenDelta(tokens[-1:], "length" if number == NUM_TOKENS else None, report=report))
            report = None
            await asyncio.sleep(0)
            while tokens[0] in self.stands and not let_go.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if let_go.is_set():
                raise TakenElsewhere


class Client:
    """One sequence and what came of it.  `number` tells its prompt from others."""

    def __init__(
        self,
        server: Orchestrator,
        number: int,
        service_class: ServiceClass = "flex",
        *,
        deadline_s: float = 1e6,
        clock: Callable[[], float] = time.monotonic,
        **sampling: Any,
    ) -> None:
        self.received: list[TokenDelta] = []
        self.progress = SequenceProgress(self.received.append, clock)
        asked = msgspec.structs.replace(request(prompt=[number, 2, 3]), sampling=sampling)
        hints = RoutingHints(service_class=service_class)
        deadline = self.progress.arrived_at + deadline_s
        self.task = asyncio.create_task(server.run(asked, self.progress, hints=hints, deadline=deadline))

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.received for token in delta.token_ids]

    async def end(self) -> list[int]:
        """Wait for the end of the answer, and return its tokens."""
        async with asyncio.timeout(DEADLINE_S):
            await self.task
        return self.tokens


async def undisturbed(number: int) -> list[int]:
    return await Client(orchestrator(None, Engine("d")), number).end()


async def crowded(engine: FakeDecode, *numbers: int, **options: Any) -> tuple[Orchestrator, list[Client]]:
    """A server whose replicas have room for one sequence each, and as many flex ones that run."""
    server = orchestrator(None, engine, **{"info": ONE, **options})
    if isinstance(engine, Engine):
        engine.stands.update(numbers)
    clients = [Client(server, number) for number in numbers]
    await until(lambda: all(client.received for client in clients))
    return server, clients


def assert_nothing_is_left(server: Orchestrator) -> None:
    assert line_of(server) == (0, 0)
    assert not any(loads(server).values())
    assert not server.line.preemption.candidates()
    assert not server.line.preemption._running


async def test_a_higher_class_gets_the_place_at_once_and_the_answer_goes_on_later_token_for_token() -> None:
    engine = Engine("d")
    server, (flex,) = await crowded(engine, 1, max_attempts=1)
    while server.retry_budget.take():
        pass
    engine.stands.add(2)
    first = len(flex.tokens)
    default = Client(server, 2, "default")
    await until(lambda: default.received)
    await asyncio.sleep(0.1)
    assert len(flex.tokens) == first < NUM_TOKENS
    assert (loads(server)["decode"], line_of(server)) == ({"d": 1}, (1, 3 + first))
    engine.stands.clear()
    assert await default.end() == await undisturbed(2)
    assert await flex.end() == await undisturbed(1)
    assert [delta.report is not None for delta in flex.received] == [True] + [False] * (NUM_TOKENS - 1)
    assert flex.progress.resume_reasons == ["preempted"]
    assert default.progress.resume_reasons == []
    assert engine.calls[-1].request.num_replayed == first
    assert server._router.ejections.describe() == []
    assert_nothing_is_left(server)


@pytest.mark.parametrize("service_class", ["default", "flex"])
async def test_none_gives_way_to_its_own_class(service_class: ServiceClass) -> None:
    engine = Engine("d")
    server = orchestrator(None, engine, info=ONE)
    engine.stands.add(1)
    first = Client(server, 1, service_class)
    await until(lambda: first.received)
    second = Client(server, 2, service_class)
    await asyncio.sleep(0.15)
    assert (line_of(server), second.received) == ((1, 3), [])
    engine.stands.clear()
    await asyncio.gather(first.end(), second.end())
    assert first.progress.resume_reasons == []


async def test_default_does_not_give_way_to_priority() -> None:
    engine = Engine("d")
    server = orchestrator(None, engine, info=ONE)
    engine.stands.add(1)
    default = Client(server, 1, "default")
    await until(lambda: default.received)
    priority = Client(server, 2, "priority")
    await asyncio.sleep(0.15)
    engine.stands.clear()
    await asyncio.gather(default.end(), priority.end())
    assert default.progress.resume_reasons == []


@pytest.mark.parametrize(
    ("before", "gives_way"),
    [([], False), ([SAMPLED_BY_PREFILL], False), ([REMOTE], True)],
    ids=["before the first token", "before the KV", "with the KV"],
)
async def test_none_gives_way_before_decode_has_its_kv(before: Script, gives_way: bool) -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [*before, HANG], [REMOTE, LAST])
    server = orchestrator(prefill, decode, info={"max_sequences": 1})
    flex = Client(server, 1)
    await decode.is_hanging.wait()
    default = Client(server, 2, "default")
    if gives_way:
        assert await default.end() == [10, 11]
        assert await flex.end() == [10, 10, 11]
        assert not any(handoff.is_cancelled for handoff in prefill.handoffs)
    else:
        await asyncio.sleep(0.15)
        assert len(decode.calls) == 1
        await ended(default.task)
        await ended(flex.task)
    assert_nothing_is_left(server)


async def test_none_gives_way_to_a_request_that_waits_for_prefill() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [REMOTE, HANG], [REMOTE, LAST])
    server = orchestrator(prefill, decode, info={"max_sequences": 1})
    flex = Client(server, 1)
    await decode.is_hanging.wait()
    server._router.pools["prefill"].on_load("p", ReplicaLoad(9, 1_000_000))
    default = Client(server, 2, "default")
    await asyncio.sleep(0.15)
    assert server.line.lacks == "prefill"
    assert flex.progress.is_paused is False
    await ended(default.task)
    await ended(flex.task)


@pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {}])
async def test_none_gives_way_with_which_engines_cannot_go_on(sampling: dict[str, Any]) -> None:
    engine = Engine("d")
    engine.stands.add(1)
    server = orchestrator(None, engine, info=ONE, can_resume_counting=False)
    flex = Client(server, 1, **sampling)
    await until(lambda: flex.received)
    default = Client(server, 2, "default")
    if sampling:
        await asyncio.sleep(0.15)
        assert default.received == []
    else:
        await default.end()
    engine.stands.clear()
    await asyncio.gather(flex.end(), default.end())
    assert flex.progress.resume_reasons == ["preempted"] * (not sampling)


async def test_one_that_is_being_taken_elsewhere_does_not_give_way() -> None:
    engine = Engine("d0")
    server, (flex,) = await crowded(engine, 1)
    server._router.pools["decode"].join(msgspec.structs.replace(_info(server), replica_id="d1"))
    flex.progress.on_leaving()
    assert server.line.preemption.candidates() == []
    engine.stands.clear()
    assert await flex.end() == await undisturbed(1)
    assert flex.progress.resume_reasons == ["drained"]


async def test_one_that_gave_way_does_not_go_before_a_higher_class() -> None:
    engine = Engine("d")
    server, (flex,) = await crowded(engine, 1)
    engine.stands |= {2, 3}
    first = await gives_way_now(server, flex)
    await until(lambda: first.received)
    second = Client(server, 3, "default")
    await until(lambda: server.line.num_waiting == 2)
    engine.stands.remove(2)
    await until(lambda: second.received)
    assert flex.progress.is_paused
    engine.stands.clear()
    await asyncio.gather(first.end(), second.end(), flex.end())
    assert flex.progress.resume_reasons == ["preempted"]


async def test_a_sequence_gives_way_only_so_often() -> None:
    engine = Engine("d")
    server, (flex,) = await crowded(engine, 1)
    for number in range(1, MAX_PREEMPTIONS + 1):
        await until(server.line.preemption.candidates)
        (held,) = server.line.preemption.candidates()
        assert held.num_tokens == 3 + len(flex.tokens)
        assert await Client(server, 2, "default").end() == await undisturbed(2)
        await until(partial(_has_tokens, flex, number + 1))
    default = Client(server, 2, "default")
    await asyncio.sleep(0.15)
    assert default.received == []
    engine.stands.clear()
    assert await flex.end() == await undisturbed(1)
    assert await default.end() == await undisturbed(2)
    assert flex.progress.resume_reasons == ["preempted"] * MAX_PREEMPTIONS


async def test_no_limit_but_the_deadline_bounds_the_pause() -> None:
    """The clocks of the sequences move only as the test says, and limits are looked at all the time."""
    begin = now = time.monotonic()
    engine = Engine("d")
    engine.stands |= {1, 2, 3}
    server = orchestrator(None, engine, info={"max_sequences": 2}, itl_timeout_s=0.01, ttft_timeout_s=0.01)
    flex = [Client(server, 1, clock=lambda: now), Client(server, 2, clock=lambda: now, deadline_s=500.0)]
    await until(lambda: all(client.received for client in flex))
    defaults = [Client(server, 3, "default", clock=lambda: begin) for _ in flex]
    await until(lambda: all(client.received for client in defaults))
    now += 400.0
    await asyncio.sleep(0.1)
    assert line_of(server) == (2, 2 * (3 + 1))
    now += 200.0
    with pytest.raises(DeadlineExceeded):
        await flex[1].end()
    engine.stands.clear()
    assert await flex[0].end() == await undisturbed(1)
    assert flex[0].progress.resume_gaps_s == [pytest.approx(600.0)]
    await asyncio.gather(*(client.end() for client in defaults))
    assert_nothing_is_left(server)


async def test_a_token_is_overdue_again_after_the_pause() -> None:
    begin = now = time.monotonic()
    decode = FakeDecode(["d"], [FIRST, HANG], [FIRST, LAST], [HANG])
    server = orchestrator(None, decode, info=ONE, ttft_timeout_s=0.05, itl_timeout_s=0.01)
    flex = Client(server, 1, clock=lambda: now)
    await until(lambda: flex.received)
    await Client(server, 2, "default", clock=lambda: begin).end()
    await until(lambda: len(decode.calls) == 3)
    now += 0.04
    await asyncio.sleep(0.05)
    assert not flex.task.done()
    now += 0.02
    with pytest.raises(TimeoutError):
        await flex.end()


async def gives_way_now(server: Orchestrator, flex: Client) -> Client:
    """Have `flex` give way at this very moment.  Returns the client that gets its place."""
    server.line._will_look = True  # it looks when this does
    default = Client(server, 2, "default")
    await until(lambda: server.line.num_waiting)
    server.line._look()
    assert flex.progress.is_paused
    return default


@pytest.mark.parametrize("num_steps", [0, 1, 2, 20])
async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(num_steps: int) -> None:
    """Also in the very moment in which its sequence gives way, and the steps after it."""
    engine = Engine("d")
    server, (flex,) = await crowded(engine, 1)
    engine.stands.add(2)
    default = await gives_way_now(server, flex)
    for _ in range(num_steps):
        await asyncio.sleep(0)
    assert flex.progress.is_paused
    assert isinstance(await ended(flex.task), asyncio.CancelledError)
    assert line_of(server) == (0, 0)
    assert loads(server)["decode"] == {"d": 1}
    engine.stands.clear()
    await default.end()
    assert_nothing_is_left(server)


async def test_the_client_that_others_gave_way_for_may_leave_too() -> None:
    engine = Engine("d")
    server, (flex,) = await crowded(engine, 1)
    default = await gives_way_now(server, flex)
    await ended(default.task)
    engine.stands.clear()
    assert await flex.end() == await undisturbed(1)
    assert_nothing_is_left(server)


async def test_a_replica_that_is_lost_after_the_pause_is_a_loss_like_any_other() -> None:
    decode = FakeDecode(["d"], [FIRST, HANG], [FIRST, LAST], [FIRST, LOST], [FIRST, LAST])
    server = orchestrator(None, decode, info=ONE)
    flex = Client(server, 1)
    await until(lambda: flex.received)
    await Client(server, 2, "default").end()
    server._router.pools["decode"].join(msgspec.structs.replace(_info(server), replica_id="e"))
    assert await flex.end() == [10, 10, 10, 11]
    assert flex.progress.resume_reasons == ["preempted", "lost"]
    assert [call.request.num_replayed for call in decode.calls] == [0, 0, 1, 2]


def _has_tokens(client: Client, number: int) -> bool:
    return len(client.tokens) >= number


def _info(server: Orchestrator) -> Any:
    (state,) = server._router.pools["decode"].replicas.values()
    return state.info


async def test_several_give_way_and_go_on_in_that_order_each_with_its_own_tokens() -> None:
    engine = Engine("d0", "d1", "d2")
    server, flex = await crowded(engine, 1, 2, 3)
    gave_way: list[Client] = []
    engine.stands.update({4, 5, 6})
    defaults = []
    for number in (4, 5, 6):
        defaults.append(Client(server, number, "default"))
        await until(partial(_has_tokens, defaults[-1], 1))
        gave_way += [client for client in flex if client.progress.is_paused and client not in gave_way]
    new = Client(server, 7)
    await until(lambda: server.line.num_waiting == 4)
    came_back: list[Client] = []
    for number in (4, 5, 6):
        engine.stands.remove(number)
        await until(partial(_are_running, flex, 1 + len(came_back)))
        came_back += [client for client in flex if not client.progress.is_paused and client not in came_back]
    assert len(gave_way) == 3
    assert came_back == gave_way
    assert new.received == []
    engine.stands.clear()
    for number, client in enumerate([*flex, *defaults, new], 1):
        assert await client.end() == await undisturbed(number)
    assert [client.progress.resume_reasons for client in flex] == [["preempted"]] * 3
    assert_nothing_is_left(server)


def _are_running(clients: Sequence[Client], number: int) -> bool:
    return sum(not client.progress.is_paused for client in clients) == number
