"""The order in which a sequence is served, and how every ending unwinds it."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.config import LimitsConfig, PredictedPlacement, RemotePlacement, RoutingConfig, SloConfig
from app.errors import (
    BatonError,
    CannotResume,
    DeadlineExceeded,
    DeltaNotTaken,
    EngineDead,
    EngineFailed,
    InvalidRequest,
    NoReplica,
    Overloaded,
    PrefillFailed,
    Quarantined,
    ReplicaLost,
    TakenElsewhere,
)
from app.frontend.attempt import LOOK_AGAIN_AT, LOOK_AGAIN_S, Handoff, Lost
from app.frontend.orchestrator import MAX_TTFT_OF_SLO, Orchestrator
from app.frontend.sequence_progress import SequenceProgress
from app.frontend.waking import Waker
from app.messages import GenerateRequest, PrefillMode, PrefillReport, ReplicaLoad, Role, TokenDelta
from app.pace import Pace
from app.routing.capacity import MIN_BATCH
from app.routing.decision import SERVICE_CLASSES, Decision, RoutingHints
from app.routing.ejection import STRONG
from app.routing.router import Router
from app.routing.times import PromptTimes
from app.routing.waiting_line import LEVELS_OF_CLASS
from tests.unit.routing.samples import replica_info
from tests.unit.waiting import until

HANG, LEAVES = "hang", "leaves"
PROMPT = [1, 2, 3]
FIRST = TokenDelta([10])
LAST = TokenDelta([11], finish_reason="stop")
LOST = ReplicaLost("d", "killed")
NO_KV = PrefillFailed("the prefill engine died")
DEADLINE_S = 5.0
REMOTELY = RemotePlacement(policy="remote")
SLO = SloConfig()

Script = list[TokenDelta | Exception | str]


def request(prefill_mode: PrefillMode = "auto", prompt: Sequence[int] = PROMPT) -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=list(prompt), sampling={}, prefill_mode=prefill_mode)


def first_delta(kind: Any, reason: str) -> TokenDelta:
    report = PrefillReport(kind, reason, None, "d", cached_tokens=0, transferred_tokens=0, transport="")
    return TokenDelta([10], report=report)


REMOTE = first_delta("remote", "")
"""A first token for which decode has got the KV."""


class FakeHandoff:
    def __init__(self, replica: str) -> None:
        self.replica = replica
        self.lost: Lost = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakePrefill:
    """Starts prefills at once, or loses its replicas, or never gets to it."""

    def __init__(self, *replicas: str, fails: Exception | None = None, hangs: bool = False) -> None:
        self.ready = list(replicas)
        self.fails = fails
        self.picked: list[str] = []
        self.prompts: list[list[int]] = []
        self.request_ids: list[str] = []
        self.priorities: list[int] = []
        self.handoffs: list[FakeHandoff] = []
        self.may_start = asyncio.Event()
        self.num_called = asyncio.Semaphore(0)
        self.is_cancelled = False
        if not hangs:
            self.may_start.set()

    async def start(self, request: GenerateRequest, replica: str) -> FakeHandoff:
        self.picked.append(replica)
        self.prompts.append(request.prompt_token_ids)
        self.request_ids.append(request.request_id)
        self.priorities.append(request.priority)
        self.num_called.release()
        try:
            await self.may_start.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        if self.fails is not None:
            raise self.fails
        self.handoffs.append(FakeHandoff(replica))
        return self.handoffs[-1]


class Call(NamedTuple):
    request: GenerateRequest
    handoff: Handoff | None
    local_reason: str
    replica: str


class FakeDecode:
    """Follows a script for each call in turn, the last one for all further calls."""

    def __init__(self, replicas: list[str], *scripts: Script) -> None:
        self.ready = replicas
        self.scripts = scripts
        self.calls: list[Call] = []
        self.num_open = 0
        self.is_hanging = asyncio.Event()

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append(Call(request, handoff, local_reason, replica))
        self.num_open += 1
        let_go = asyncio.Event()
        progress.let_go = let_go.set
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, TokenDelta):
                    progress.take(step)
                    await asyncio.sleep(0)
                elif step == LEAVES:
                    progress.on_leaving()
                    if let_go.is_set():
                        raise TakenElsewhere
                else:
                    self.is_hanging.set()
                    await let_go.wait()
                    raise TakenElsewhere
        finally:
            self.num_open -= 1


def orchestrator(
    prefill: FakePrefill | None,
    decode: FakeDecode,
    *,
    aggregated: FakeDecode | None = None,
    on_prefill: FakeDecode | None = None,
    can_decode_prefill: bool = True,
    hands_over_early: bool = False,
    can_resume_counting: bool = True,
    waker: Waker | None = None,
    placement: RemotePlacement | PredictedPlacement = REMOTELY,
    slo: SloConfig = SLO,
    info: dict[str, Any] | None = None,
    **limits: Any,
) -> Orchestrator:
    """`info` are fields of all replicas' `ReplicaInfo`."""
    router = Router(
        RoutingConfig(placement=placement),
        slo,
        has_prefill=prefill is not None,
        has_aggregated=aggregated is not None,
        can_decode_prefill=can_decode_prefill,
        can_prefill_decode=on_prefill is not None,
    )
    pools: dict[Role, FakePrefill | FakeDecode | None] = {
        "prefill": prefill,
        "decode": decode,
        "aggregated": aggregated,
    }
    for role, pool in pools.items():
        for replica in pool.ready if pool else ():
            router.pools[role].join(replica_info(replica, role, **(info or {})))
    return Orchestrator(
        router,
        prefill,
        decode,
        LimitsConfig(**limits),
        aggregated=aggregated,
        on_prefill=on_prefill,
        hands_over_early=hands_over_early,
        can_resume_counting=can_resume_counting,
        waker=waker,
    )


def loads(server: Orchestrator) -> dict[str, Counter[str]]:
    """The sequences that the router counts on each replica, by role."""
    return {
        role: Counter({name: state.sequences.own for name, state in pool.replicas.items() if state.sequences.own})
        for role, pool in server._router.pools.items()
    }


def depending_on_prefill(prefill: FakePrefill, decode: FakeDecode, **limits: Any) -> Orchestrator:
    """With an engine whose decode replicas cannot prefill."""
    return orchestrator(prefill, decode, can_decode_prefill=False, **limits)


async def served(
    orchestrator: Orchestrator,
    prefill_mode: PrefillMode = "auto",
    into: list[TokenDelta] | None = None,
    prompt: Sequence[int] = PROMPT,
) -> list[TokenDelta]:
    received = [] if into is None else into
    async with asyncio.timeout(DEADLINE_S):
        await orchestrator.run(request(prefill_mode, prompt), SequenceProgress(received.append))
    return received


async def test_a_prefill_engine_gets_the_level_of_its_class_and_decode_what_the_client_said() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [LAST])
    server = orchestrator(prefill, decode)
    for service_class in SERVICE_CLASSES:
        async with asyncio.timeout(DEADLINE_S):
            hints = RoutingHints(service_class=service_class)
            await server.run(request("auto", PROMPT), SequenceProgress(lambda delta: None), hints=hints)
    levels = [-LEVELS_OF_CLASS, 0, LEVELS_OF_CLASS]
    assert prefill.priorities == levels
    assert {call.request.priority for call in decode.calls} == {0}


async def test_a_request_waits_for_a_replica_that_is_about_to_join() -> None:
    """In an update of a pool of one Serve tells of the new replica and of the end of the old one at once."""
    decode = FakeDecode(["old"], [LAST])
    server = orchestrator(None, decode)
    pool = server._router.pools["decode"]

    async def connect() -> None:
        await asyncio.sleep(0.01)
        pool.join(replica_info("new", "decode"))
        pool.joining.clear()

    pool.leave("old")
    pool.joining["new"] = asyncio.create_task(connect())
    assert await served(server) == [LAST]
    assert [call.replica for call in decode.calls] == ["new"]
    pool.leave("new")
    with pytest.raises(NoReplica):
        await served(server)


async def test_a_request_waits_for_a_model_that_sleeps_and_joins_the_line_when_it_is_awake() -> None:
    """What it waited for replicas to start is no reason to refuse it for being late."""
    decode, wishes = FakeDecode([], [LAST]), list[None]()

    async def wish() -> None:
        wishes.append(None)

    server = orchestrator(None, decode, waker=Waker("tiny", wish, DEADLINE_S), max_ttft_ms=50_000.0)
    decisions: list[Decision] = []
    arrived_at = time.monotonic() - 60.0

    def run() -> asyncio.Task[None]:
        progress = SequenceProgress(lambda delta: None, iter([arrived_at, *[time.monotonic()] * 99]).__next__)
        return asyncio.create_task(server.run(request(), progress, on_decision=decisions.append))

    tasks = [run(), run()]  # the second one waits in line for the first one's place
    await until(lambda: bool(wishes))
    server._router.pools["decode"].join(replica_info("d", "decode", max_sequences=1))
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*tasks)
    assert [call.replica for call in decode.calls] == ["d", "d"]
    assert all(decision.waited_s >= 60.0 for decision in decisions)


async def test_a_model_that_has_all_its_pools_is_not_waited_for() -> None:
    decode = FakeDecode(["d"], [LOST])

    async def wish() -> None:
        raise AssertionError("nothing sleeps")

    with pytest.raises(NoReplica):
        await served(orchestrator(None, decode, waker=Waker("tiny", wish, DEADLINE_S)))


# Placement


async def test_decode_gets_the_handoff_of_the_prefill_that_was_started() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [FIRST, LAST])
    assert await served(orchestrator(prefill, decode)) == [FIRST, LAST]
    assert prefill.prompts == [PROMPT]
    assert decode.calls == [Call(request(), prefill.handoffs[0], "", "d")]


async def test_without_a_prefill_pool_decode_serves_alone() -> None:
    decode = FakeDecode(["d"], [LAST])
    assert await served(orchestrator(None, decode)) == [LAST]
    assert decode.calls == [Call(request(), None, "aggregated", "d")]


async def test_a_request_that_asks_for_local_prefill_starts_no_other() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [LAST])
    await served(orchestrator(prefill, decode), "local")
    assert prefill.picked == []
    assert decode.calls[0].local_reason == "requested"


@pytest.mark.parametrize(
    ("replicas", "fails"), [([], None), (["p"], ReplicaLost("p"))], ids=["no replica", "a lost replica"]
)
async def test_decode_prefills_itself_when_no_prefill_replica_can(replicas: list[str], fails: Exception | None) -> None:
    decode = FakeDecode(["d"], [LAST])
    assert await served(orchestrator(FakePrefill(*replicas, fails=fails), decode)) == [LAST]
    assert decode.calls[0].handoff is None
    assert decode.calls[0].local_reason == "no_prefill_replica"


async def test_a_prefill_replica_that_was_lost_is_avoided() -> None:
    prefill = FakePrefill("p0", "p1", fails=ReplicaLost("p"))
    server = orchestrator(prefill, FakeDecode(["d"], [LAST]))
    await served(server)
    prefill.fails = None
    for _ in range(10):
        await served(server)
    assert set(prefill.picked[1:]) == {"p0", "p1"} - {prefill.picked[0]}


SAMPLED_BY_PREFILL = TokenDelta([9], report=PrefillReport("remote", "", "p", "d", 0, None, ""))
"""A first token whose KV is still on its way."""


@pytest.mark.parametrize("before", [[], [SAMPLED_BY_PREFILL]], ids=["at once", "after prefill's own first token"])
async def test_a_prefill_replica_whose_handoff_did_not_work_is_avoided(before: list[Any]) -> None:
    prefill = FakePrefill("p0", "p1")
    decode = FakeDecode(["d"], [*before, first_delta("local", "prefill_failed"), LAST], [REMOTE, LAST])
    server = orchestrator(prefill, decode)
    for _ in range(11):
        await served(server)
    assert set(prefill.picked[1:]) == {"p0", "p1"} - {prefill.picked[0]}


async def test_a_handoff_counts_as_done_once_the_kv_is_there() -> None:
    cases: list[tuple[Script, bool]] = [
        ([SAMPLED_BY_PREFILL, LAST], True),
        ([SAMPLED_BY_PREFILL, REMOTE, LAST], False),
    ]
    for deltas, is_cancelled in cases:
        prefill = FakePrefill("p")
        await served(orchestrator(prefill, FakeDecode(["d"], deltas)))
        assert prefill.handoffs[0].is_cancelled == is_cancelled


async def test_a_prefill_replica_is_not_blamed_when_decode_had_the_prompt_cached() -> None:
    prefill = FakePrefill("p0", "p1")
    server = orchestrator(prefill, FakeDecode(["d"], [first_delta("local", "already_cached"), LAST]))
    for _ in range(4):
        await served(server)
    ejections = server._router.ejections
    assert not any(
        ejections.is_ejected(replica) or ejections.is_pair_ejected(replica, "d") for replica in prefill.ready
    )


async def test_how_long_the_kv_took_is_learnt_from_the_engines_report() -> None:
    """It comes with the second token, as the first was prefill's."""
    report = PrefillReport("remote", "", "p", "d", 0, 4000, "tcp", phases={"transfer": 1.2})
    prefill = FakePrefill("p")
    decode = FakeDecode(["d"], [SAMPLED_BY_PREFILL, TokenDelta([1], report=report), LAST])
    serving = orchestrator(prefill, decode)
    await served(serving, "remote")
    assert serving._router.predictor.pull_s(4000) == pytest.approx(1.1, rel=0.1)


async def test_a_corrupted_request_prefills_another_prompt_than_it_decodes() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [LAST])
    await served(orchestrator(prefill, decode), "corrupted")
    assert prefill.prompts[0] != PROMPT
    assert decode.calls[0].request.prompt_token_ids == PROMPT


async def test_requests_spread_over_the_prefill_replicas_even_while_those_still_start() -> None:
    prefill = FakePrefill(*(f"p{number}" for number in range(10)), hangs=True)
    server = orchestrator(prefill, FakeDecode(["d"], [LAST]))
    tasks = [asyncio.create_task(served(server)) for _ in prefill.ready]
    for _ in tasks:
        await prefill.num_called.acquire()
    prefill.may_start.set()
    await asyncio.gather(*tasks)
    assert sorted(prefill.picked) == sorted(prefill.ready)


# Failover


@pytest.mark.parametrize("error", [LOST, EngineDead()], ids=["replica lost", "engine dead"])
async def test_before_the_first_token_another_replica_decodes_with_a_prefill_of_its_own(error: Exception) -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [error], [FIRST, LAST])
    assert await served(orchestrator(prefill, decode)) == [FIRST, LAST]
    first, second = decode.calls
    assert {first.replica, second.replica} == {"d0", "d1"}
    assert [first.handoff, second.handoff] == prefill.handoffs
    assert len(prefill.handoffs) == 2
    assert prefill.handoffs[0].is_cancelled


async def test_after_the_first_token_the_sequence_goes_on_elsewhere_after_the_tokens_that_there_are() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [REMOTE, TokenDelta([20, 21]), LOST], [REMOTE, LAST])
    received: list[TokenDelta] = []
    await served(orchestrator(prefill, decode), into=received)
    assert [token for delta in received for token in delta.token_ids] == [10, 20, 21, 10, 11]
    assert [delta.report is not None for delta in received] == [True, False, False, False]
    first, rest = decode.calls
    assert {first.replica, rest.replica} == {"d0", "d1"}
    assert rest.request == request().resumed([10, 20, 21])
    assert (rest.request.prompt_token_ids, rest.request.num_replayed) == ([*PROMPT, 10, 20, 21], 3)
    assert prefill.prompts == [PROMPT, [*PROMPT, 10, 20, 21]]
    assert rest.handoff is prefill.handoffs[1]


@pytest.mark.parametrize("before", [[LOST], [FIRST, LOST]], ids=["before its first token", "after it"])
async def test_what_lost_its_replica_joins_the_line_as_served_before(before: list[Any]) -> None:
    server = orchestrator(None, FakeDecode(["d0", "d1"], before, [LAST]))
    join, joined = server.line.join, list[bool]()

    def noting(*args: Any, was_served: bool, was_preempted: bool) -> Any:
        assert not was_preempted
        joined.append(was_served)
        return join(*args, was_served=was_served)

    server.line.join = noting  # type: ignore[assignment,method-assign]
    await served(server)
    assert joined == [False, True]


async def test_each_loss_is_resumed_from_all_tokens_until_no_attempt_is_left() -> None:
    decode = FakeDecode(["d0", "d1", "d2", "d3"], [FIRST, LOST])
    received: list[TokenDelta] = []
    with pytest.raises(ReplicaLost, match="killed") as caught:
        await served(orchestrator(FakePrefill("p"), decode, max_attempts=3), into=received)
    assert received == [FIRST] * 3
    assert [call.request.num_replayed for call in decode.calls] == [0, 1, 2]
    assert len({call.replica for call in decode.calls}) == 3
    assert caught.value.replica_id == decode.calls[-1].replica


async def test_what_an_engine_cannot_resume_ends_with_its_reason() -> None:
    decode = FakeDecode(["d0", "d1", "d2"], [FIRST, LOST], [CannotResume("penalties")])
    with pytest.raises(CannotResume, match="penalties"):
        await served(orchestrator(FakePrefill("p"), decode))
    assert len(decode.calls) == 2


async def test_the_kv_of_a_resumed_sequence_is_given_back_if_it_was_not_pulled() -> None:
    """Also if the attempt before had pulled its own."""
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1", "d2"], [REMOTE, LOST], [LOST], [REMOTE, LAST])
    await served(orchestrator(prefill, decode))
    assert [handoff.is_cancelled for handoff in prefill.handoffs] == [False, True, False]


async def test_sequences_are_resumed_when_the_retry_budget_is_spent() -> None:
    server = orchestrator(FakePrefill("p"), FakeDecode(["d0", "d1"], [FIRST, LOST], [FIRST, LAST]))
    while server.retry_budget.take():
        pass
    assert await served(server) == [FIRST, FIRST, LAST]


async def test_what_is_told_of_the_prompt_is_not_told_again() -> None:
    asked = msgspec.structs.replace(request(), sampling={"prompt_logprobs": 3, "logprobs": 2})
    assert asked.resumed([7]).sampling == {"logprobs": 2}


# A replica that is being removed


async def test_a_sequence_leaves_its_replica_once_another_has_a_place_for_it() -> None:
    prefill = FakePrefill("p")
    decode = FakeDecode(["d0", "d1"], [REMOTE, TokenDelta([20, 21]), LEAVES, HANG], [REMOTE, LAST])
    server, received = orchestrator(prefill, decode), list[TokenDelta]()
    progress = SequenceProgress(received.append)
    async with asyncio.timeout(DEADLINE_S):
        await server.run(request(), progress)
    assert [token for delta in received for token in delta.token_ids] == [10, 20, 21, 10, 11]
    first, rest = decode.calls
    assert {first.replica, rest.replica} == {"d0", "d1"}
    assert rest.request == request().resumed([10, 20, 21])
    assert progress.resume_reasons == ["drained"]
    assert server._router.ejections.describe() == []
    assert not any(loads(server).values())


async def test_what_was_drained_costs_no_attempt_and_no_retry() -> None:
    decode = FakeDecode(["d0", "d1", "d2", "d3"], [FIRST, LEAVES], [FIRST, LEAVES], [FIRST, LOST], [FIRST, LAST])
    server = orchestrator(FakePrefill("p"), decode, max_attempts=3)
    while server.retry_budget.take():
        pass
    assert await served(server) == [FIRST, FIRST, FIRST, FIRST, LAST]
    assert len({call.replica for call in decode.calls}) == 4


async def test_before_its_first_token_a_sequence_begins_anew_elsewhere() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [LEAVES, HANG], [REMOTE, LAST])
    assert await served(orchestrator(prefill, decode)) == [REMOTE, LAST]
    assert [call.request for call in decode.calls] == [request()] * 2
    assert [handoff.is_cancelled for handoff in prefill.handoffs] == [True, False]


@pytest.mark.parametrize("why", ["no other replica", "not known to leave", "no room", "left out"])
async def test_without_a_place_elsewhere_a_sequence_stays_and_is_asked_for_again(why: str) -> None:
    """Nobody else is there, maybe as Serve has not told of its leaving yet, or has room, or is not left out itself."""
    decode = FakeDecode(["d0"], [FIRST, LEAVES, HANG])
    server = orchestrator(None, decode, info={"max_sequences": 2})
    pool = server._router.pools["decode"]
    progress = SequenceProgress(lambda delta: None)
    task = asyncio.create_task(server.run(request(), progress))
    await decode.is_hanging.wait()
    assert len(decode.calls) == 1
    if why != "not known to leave":
        pool.leave("d0")
    if why in ("no room", "left out"):
        pool.join(replica_info("d1", "decode", max_sequences=1))
    if why == "no room":
        pool.on_load("d1", ReplicaLoad(sequences=1, decoding=1))
    if why == "left out":
        server._router.ejections.failed("d1", STRONG, server._router.clock())
    let_go: list[None] = []
    progress.let_go = partial(let_go.append, None)
    progress.on_leaving()
    assert not let_go
    assert loads(server)["decode"] == ({"d0": 1} if why == "not known to leave" else {})
    pool.join(replica_info("d2", "decode", max_sequences=1))
    progress.on_leaving()
    assert let_go
    assert loads(server)["decode"] == {"d2": 1} | ({"d0": 1} if why == "not known to leave" else {})
    task.cancel()
    await asyncio.wait([task])
    assert not any(loads(server).values()), "the place of a client that left is still taken"


@pytest.mark.parametrize("sampling", [{"presence_penalty": 0.5}, {"structured_outputs": {"json": "{}"}}, {}])
@pytest.mark.parametrize("has_token", [False, True])
async def test_what_the_engines_cannot_resume_stays_once_it_has_tokens(sampling: Any, has_token: bool) -> None:
    decode = FakeDecode(["d0", "d1"], [*[FIRST] * has_token, LEAVES, LAST], [LAST])
    server = orchestrator(FakePrefill("p"), decode, can_resume_counting=False)
    async with asyncio.timeout(DEADLINE_S):
        await server.run(msgspec.structs.replace(request(), sampling=sampling), SequenceProgress(lambda delta: None))
    assert len(decode.calls) == (1 if sampling and has_token else 2)


async def test_an_error_of_the_request_itself_is_not_tried_again() -> None:
    decode = FakeDecode(["d0", "d1"], [InvalidRequest("no")])
    with pytest.raises(InvalidRequest):
        await served(orchestrator(FakePrefill("p"), decode))
    assert len(decode.calls) == 1


@pytest.mark.parametrize("replicas", [["d0", "d1", "d2"], ["d0"]], ids=["of three", "of one"])
async def test_what_an_engine_failed_alone_is_tried_once_more_and_elsewhere_if_there_is_another(
    replicas: list[str],
) -> None:
    decode = FakeDecode(replicas, [EngineFailed("no")], [REMOTE, LAST])
    server = orchestrator(FakePrefill("p"), decode)
    assert await served(server) == [REMOTE, LAST]
    assert len({call.replica for call in decode.calls}) == min(len(replicas), 2)
    decode = FakeDecode(replicas, [EngineFailed("no")])
    with pytest.raises(EngineFailed):
        await served(server := orchestrator(FakePrefill("p"), decode))
    assert len(decode.calls) == 2
    assert server.quarantine.num_quarantined == 0


async def test_what_an_engine_failed_after_its_first_token_goes_on_elsewhere_once() -> None:
    failed = EngineFailed("no")
    decode, received = FakeDecode(["d0", "d1", "d2"], [FIRST, failed], [FIRST, LAST]), list[TokenDelta]()
    progress = SequenceProgress(received.append)
    server = orchestrator(FakePrefill("p"), decode)
    async with asyncio.timeout(DEADLINE_S):
        await server.run(request(), progress)
    assert received == [FIRST, FIRST, LAST]
    assert progress.resume_reasons == ["failed"]
    first, rest = decode.calls
    assert first.replica != rest.replica
    assert rest.request == request().resumed(FIRST.token_ids)
    assert not any(loads(server).values())
    decode = FakeDecode(["d0", "d1", "d2"], [FIRST, failed])
    with pytest.raises(EngineFailed):
        await served(orchestrator(FakePrefill("p"), decode))
    assert len(decode.calls) == 2


async def test_what_an_engine_failed_and_no_other_can_resume_keeps_its_error() -> None:
    decode = FakeDecode(["d0", "d1"], [FIRST, EngineFailed("no")])
    server = orchestrator(FakePrefill("p"), decode, can_resume_counting=False)
    counting = msgspec.structs.replace(request(), sampling={"presence_penalty": 0.5})
    with pytest.raises(EngineFailed):
        await server.run(counting, SequenceProgress(lambda delta: None))
    assert len(decode.calls) == 1


async def test_a_token_that_the_frontend_could_not_take_is_not_asked_for_again() -> None:
    decode = FakeDecode(["d0", "d1"], [FIRST, DeltaNotTaken("ValueError")])
    server = orchestrator(FakePrefill("p"), decode)
    with pytest.raises(DeltaNotTaken):
        await served(server)
    assert len(decode.calls) == 1
    assert server._router.ejections.describe() == []


async def test_what_engines_fail_is_tried_again_only_within_the_retry_budget() -> None:
    decode = FakeDecode(["d0", "d1"], [EngineFailed("no")])
    server = orchestrator(FakePrefill("p"), decode)
    while server.retry_budget.take():
        pass
    with pytest.raises(EngineFailed):
        await served(server)
    assert len(decode.calls) == 1


async def test_no_replica_is_left_once_the_only_one_was_tried() -> None:
    decode = FakeDecode(["d"], [LOST])
    with pytest.raises(NoReplica, match="decode"):
        await served(orchestrator(FakePrefill("p"), decode))
    assert [call.replica for call in decode.calls] == ["d"]


async def test_without_a_decode_replica_no_prefill_is_started() -> None:
    prefill = FakePrefill("p")
    with pytest.raises(NoReplica, match="decode"):
        await served(orchestrator(prefill, FakeDecode([], [LAST])))
    assert prefill.picked == []


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
@pytest.mark.parametrize("error", [LOST, EngineDead()])
async def test_after_an_engine_has_died_at_most_one_more_is_tried(error: BatonError, max_attempts: int) -> None:
    decode = FakeDecode([f"d{number}" for number in range(5)], [error])
    with pytest.raises(NoReplica if max_attempts == 1 or error is LOST else Quarantined):
        await served(orchestrator(FakePrefill("p"), decode, max_attempts=max_attempts))
    assert len(decode.calls) == min(max_attempts, 2)


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
async def test_no_more_replicas_are_tried_than_allowed_if_none_of_them_got_the_request(max_attempts: int) -> None:
    class Start(FakePrefill):
        async def start(self, request: GenerateRequest, replica: str) -> FakeHandoff:
            (chosen,) = loads(server)["decode"]
            server._router.pools["decode"].leave(chosen)
            return await super().start(request, replica)

    decode = FakeDecode([f"d{number}" for number in range(5)], [LOST])
    server = orchestrator(Start("p"), decode, max_attempts=max_attempts)
    with pytest.raises(NoReplica):
        await served(server)
    assert len(decode.calls) == max_attempts


async def test_a_decode_replica_that_was_lost_is_avoided() -> None:
    decode = FakeDecode(["d0", "d1"], [LOST], [LAST])
    server = orchestrator(None, decode)
    for _ in range(10):
        await served(server)
    assert {call.replica for call in decode.calls[1:]} == {"d0", "d1"} - {decode.calls[0].replica}


# Prefill that fails where decode cannot do it


async def test_decode_that_cannot_prefill_needs_a_prefill_replica() -> None:
    decode = FakeDecode(["d0", "d1"], [LAST])
    with pytest.raises(NoReplica, match="prefill"):
        await served(depending_on_prefill(FakePrefill(), decode))
    assert decode.calls == []


async def test_a_failed_prefill_is_tried_again_elsewhere_for_the_same_decode_replica() -> None:
    prefill, decode = FakePrefill("p0", "p1"), FakeDecode(["d"], [NO_KV], [REMOTE, LAST])
    assert await served(depending_on_prefill(prefill, decode)) == [REMOTE, LAST]
    assert sorted(prefill.picked) == ["p0", "p1"]
    assert [call.replica for call in decode.calls] == ["d", "d"]
    assert [call.handoff for call in decode.calls] == prefill.handoffs


async def test_a_prefill_replica_that_is_lost_as_it_starts_is_replaced() -> None:
    class LosesTheFirst(FakePrefill):
        async def start(self, request: GenerateRequest, replica: str) -> FakeHandoff:
            self.fails = None if self.picked else ReplicaLost(replica)
            return await super().start(request, replica)

    prefill, decode = LosesTheFirst("p0", "p1"), FakeDecode(["d"], [REMOTE, LAST])
    assert await served(depending_on_prefill(prefill, decode)) == [REMOTE, LAST]
    assert sorted(prefill.picked) == ["p0", "p1"]
    assert len(decode.calls) == 1


async def test_a_pair_over_which_no_kv_came_is_avoided_by_the_next_requests_and_its_ends_are_not() -> None:
    prefill, decode = FakePrefill("p0", "p1"), FakeDecode(["d"], [NO_KV], [REMOTE, LAST])
    server = depending_on_prefill(prefill, decode)
    for _ in range(10):
        await served(server)
    assert set(prefill.picked[1:]) == {"p0", "p1"} - {prefill.picked[0]}
    assert not any(server._router.ejections.is_ejected(replica) for replica in ("p0", "p1", "d"))


async def test_the_only_prefill_replica_is_tried_again() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [NO_KV], [REMOTE, LAST])
    assert await served(depending_on_prefill(prefill, decode)) == [REMOTE, LAST]


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
@pytest.mark.parametrize("fails", [None, ReplicaLost("p")], ids=["no KV", "lost as it starts"])
async def test_no_more_prefills_are_tried_than_allowed(fails: Exception | None, max_attempts: int) -> None:
    prefill = FakePrefill(*(f"p{number}" for number in range(5)), fails=fails)
    with pytest.raises(NoReplica, match="prefill"):
        await served(depending_on_prefill(prefill, FakeDecode(["d"], [NO_KV]), max_attempts=max_attempts))
    # Without KV nobody knows yet whether the prefill engine died of the request.
    expected = max_attempts if fails else min(max_attempts, 2)
    assert len(prefill.picked) == len(set(prefill.picked)) == expected


@pytest.mark.parametrize("error", [NO_KV, LOST, EngineDead()], ids=["no KV", "decode lost", "decode engine dead"])
async def test_each_prefill_of_a_sequence_has_a_request_id_of_its_own(error: Exception) -> None:
    prefill, decode = FakePrefill("p0", "p1"), FakeDecode(["d0", "d1", "d2"], [error], [REMOTE, LAST])
    await served(depending_on_prefill(prefill, decode))
    assert len(set(prefill.request_ids)) == 2
    assert all(request_id.startswith("r") for request_id in prefill.request_ids)  # the log can be searched for it
    assert {call.request.request_id for call in decode.calls} == {"r"}


async def test_a_retried_prefill_is_corrupted_again() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [NO_KV], [REMOTE, LAST])
    await served(depending_on_prefill(prefill, decode), "corrupted")
    assert prefill.prompts[0] == prefill.prompts[1] != PROMPT


async def test_local_prefill_is_refused_where_decode_cannot_do_it() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [LAST])
    with pytest.raises(InvalidRequest, match="baton_prefill"):
        await served(depending_on_prefill(prefill, decode), "local")
    assert (prefill.picked, decode.calls) == ([], [])


@pytest.mark.parametrize(
    ("error", "pool"), [(NO_KV, "prefill"), (LOST, "decode")], ids=["no KV", "decode replica lost"]
)
async def test_the_error_names_the_pool_that_failed_last(error: Exception, pool: str) -> None:
    decode = FakeDecode(["d0", "d1", "d2"], [LOST if error is NO_KV else NO_KV], [error])
    with pytest.raises(NoReplica, match=pool):
        await served(depending_on_prefill(FakePrefill("p0", "p1"), decode, max_attempts=2))


endings = st.sampled_from([NO_KV, LOST, EngineDead(), EngineFailed("no"), REMOTE])


@given(st.lists(endings, min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4))
@example([NO_KV], 2, 2, 1)
@example([LOST, NO_KV, REMOTE], 3, 2, 2)
def test_a_decode_that_cannot_prefill_never_has_to(
    attempts: list[TokenDelta | Exception], max_attempts: int, num_prefill: int, num_decode: int
) -> None:
    prefill = FakePrefill(*(f"p{number}" for number in range(num_prefill)))
    scripts: list[Script] = [[ending, LAST] for ending in attempts]
    decode = FakeDecode([f"d{number}" for number in range(num_decode)], *scripts)

    async def serve() -> None:
        server = depending_on_prefill(prefill, decode, max_attempts=max_attempts)
        await asyncio.gather(served(server), return_exceptions=True)

    asyncio.run(serve())
    assert len(prefill.picked) <= max_attempts
    assert all(call.local_reason == "" for call in decode.calls)
    assert [call.handoff for call in decode.calls] == prefill.handoffs
    arrived = [attempts[min(number, len(attempts) - 1)] is REMOTE for number in range(len(decode.calls))]
    assert [handoff.is_cancelled for handoff in prefill.handoffs] == [not has_kv for has_kv in arrived]


# An aggregated pool beside


async def test_what_is_to_be_prefilled_locally_goes_to_the_aggregated_pool() -> None:
    prefill, decode, aggregated = FakePrefill("p"), FakeDecode(["d"], [LAST]), FakeDecode(["a"], [LAST])
    server = orchestrator(prefill, decode, aggregated=aggregated, can_decode_prefill=False)
    await served(server, "local")
    assert (prefill.picked, decode.calls) == ([], [])
    assert aggregated.calls == [Call(request("local"), None, "requested", "a")]


async def test_the_aggregated_pool_serves_what_prefill_failed_to() -> None:
    prefill, decode, aggregated = FakePrefill("p"), FakeDecode(["d"], [NO_KV]), FakeDecode(["a"], [LAST])
    server = orchestrator(prefill, decode, aggregated=aggregated, can_decode_prefill=False)
    assert await served(server) == [LAST]
    assert [call.local_reason for call in aggregated.calls] == ["no_prefill_replica"]


async def test_a_lost_replica_of_the_aggregated_pool_is_replaced_by_the_other_two() -> None:
    prefill, decode, aggregated = FakePrefill("p"), FakeDecode(["d"], [REMOTE, LAST]), FakeDecode(["a"], [LOST])
    server = orchestrator(prefill, decode, aggregated=aggregated, can_decode_prefill=False)
    with pytest.raises(NoReplica, match="aggregated"):
        await served(server, "local")
    assert await served(server) == [REMOTE, LAST]


# Waiting for room


async def crowded(decode: FakeDecode, **limits: Any) -> tuple[Orchestrator, asyncio.Task[Any]]:
    """A server with room for one sequence, and a task that serves one which hangs."""
    server = orchestrator(None, decode, info={"num_blocks": 1}, **limits)
    running = asyncio.create_task(served(server))
    await decode.is_hanging.wait()
    return server, running


async def waiting(server: Orchestrator) -> asyncio.Task[list[TokenDelta]]:
    """A task for one more sequence, which waits in the line."""
    before = server.line.num_waiting
    task = asyncio.create_task(served(server))
    await until(lambda: server.line.num_waiting > before)
    return task


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    task.cancel()
    await asyncio.wait([task])
    return asyncio.CancelledError() if task.cancelled() else task.exception()


NOBODY = {"decode": Counter[str]()}


def line_of(server: Orchestrator) -> tuple[int, int]:
    return server.line.num_waiting, server.line.queued_tokens


async def test_a_request_waits_until_a_replica_has_room() -> None:
    decode = FakeDecode(["d"], [HANG], [LAST])
    server, running = await crowded(decode)
    task = await waiting(server)
    assert line_of(server) == (1, len(PROMPT))
    assert len(decode.calls) == 1
    await ended(running)
    assert await task == [LAST]
    assert line_of(server) == (0, 0)
    assert loads(server) == NOBODY


async def test_a_request_that_is_cancelled_while_it_waits_leaves_the_line() -> None:
    decode = FakeDecode(["d"], [HANG], [LAST])
    server, running = await crowded(decode)
    first, second = await waiting(server), await waiting(server)
    assert isinstance(await ended(first), asyncio.CancelledError)
    assert line_of(server) == (1, len(PROMPT))
    await ended(running)
    assert await second == [LAST]
    assert len(decode.calls) == 2
    assert loads(server) == NOBODY


@pytest.mark.parametrize("num_steps", [0, 1])
async def test_a_request_that_is_cancelled_as_its_turn_comes_takes_no_room(num_steps: int) -> None:
    decode = FakeDecode(["d"], [HANG], [LAST])
    server, running = await crowded(decode)
    task = await waiting(server)
    await ended(running)
    server.line._look()
    assert loads(server) == {"decode": Counter(d=1)}  # its turn has come, and it does not know yet
    for _ in range(num_steps):
        await asyncio.sleep(0)
    assert isinstance(await ended(task), asyncio.CancelledError)
    assert len(decode.calls) == 1
    assert line_of(server) == (0, 0)
    assert loads(server) == NOBODY


async def test_the_time_to_the_first_token_runs_while_a_request_waits() -> None:
    server, running = await crowded(FakeDecode(["d"], [HANG]), ttft_timeout_s=0.05)
    with pytest.raises(TimeoutError):
        await served(server)
    assert line_of(server) == (0, 0)
    await ended(running)


async def test_what_goes_wrong_while_a_request_waits_is_its_error() -> None:
    server, running = await crowded(FakeDecode(["d"], [HANG]))
    task = await waiting(server)
    server._router.pools["decode"].leave("d")
    with pytest.raises(NoReplica, match="decode"):
        await task
    assert line_of(server) == (0, 0)
    await ended(running)


async def test_a_request_that_would_wait_too_long_is_refused() -> None:
    server, running = await crowded(FakeDecode(["d"], [HANG]), max_ttft_ms=1e-3)
    with pytest.raises(Overloaded):
        await served(server)
    assert line_of(server) == (0, 0)
    await ended(running)


async def test_how_long_a_request_may_wait_follows_from_the_slo_unless_it_is_set() -> None:
    decode = FakeDecode(["d"], [LAST])
    by_slo = orchestrator(None, decode, slo=SloConfig(ttft_ms=300))
    assert by_slo.line._max_ttft_s == pytest.approx(MAX_TTFT_OF_SLO * 0.3)
    assert orchestrator(None, decode, max_ttft_ms=700).line._max_ttft_s == pytest.approx(0.7)


async def test_who_waits_is_told_of_first_tokens_and_of_ends() -> None:
    decode = FakeDecode(["d0", "d1"], [LOST], [FIRST, LAST])
    server, told = orchestrator(None, decode), list[int]()
    server.line.on_news = lambda: told.append(len(decode.calls))  # type: ignore[method-assign]
    await served(server)
    assert told == [1, 2, 2]  # the failed attempt's end, then the first token and the end of the other


# The choice of the decode replica when prefill is nearly done

SLOW = Pace(prefill_base_s=2 * LOOK_AGAIN_S / LOOK_AGAIN_AT, prefill_s_per_token=1e-5, step_base_s=0.001)
"""Prefill takes so long that the decode replica is chosen again after twice the shortest time for which it is."""


async def prefilling(
    prefill: FakePrefill, decode: FakeDecode, **options: Any
) -> tuple[Orchestrator, asyncio.Task[list[TokenDelta]], str]:
    """A server, a task whose prefill is being computed, and the decode replica that was chosen before."""
    server = orchestrator(prefill, decode, info={"pace": SLOW}, **options)
    task = asyncio.create_task(served(server))
    await until(lambda: prefill.handoffs)
    (before,) = loads(server)["decode"]
    return server, task, before


async def test_decode_is_chosen_again_when_prefill_is_nearly_done() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [HANG])
    server, task, before = await prefilling(prefill, decode)
    server._router.pools["decode"].on_load(before, ReplicaLoad(50))
    assert decode.calls == []
    await decode.is_hanging.wait()
    (after,) = {"d0", "d1"} - {before}
    assert decode.calls == [Call(request(), prefill.handoffs[0], "", after)]
    assert loads(server)["decode"] == Counter({after: 1})
    await ended(task)
    assert loads(server) == {"prefill": Counter(), "decode": Counter()}


async def test_decode_stays_the_same_if_nothing_has_changed() -> None:
    for _ in range(3):
        decode = FakeDecode(["d0", "d1"], [REMOTE, LAST])
        server, task, before = await prefilling(FakePrefill("p"), decode)
        await task
        assert [call.replica for call in decode.calls] == [before]
        assert loads(server) == {"prefill": Counter(), "decode": Counter()}


async def test_the_replica_that_decode_moved_to_is_the_one_to_blame() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [LOST], [REMOTE, LAST])
    server, task, before = await prefilling(prefill, decode)
    server._router.pools["decode"].on_load(before, ReplicaLoad(50))
    assert await task == [REMOTE, LAST]
    (after,) = {"d0", "d1"} - {before}
    assert [call.replica for call in decode.calls] == [after, before]
    assert server._router.ejections.is_ejected(after)


async def test_a_prefill_replica_that_is_lost_meanwhile_is_replaced() -> None:
    prefill, decode = FakePrefill("p0", "p1"), FakeDecode(["d0", "d1"], [REMOTE, LAST])
    _, task, _ = await prefilling(prefill, decode)
    prefill.handoffs[0].lost.set_result(LOST)
    assert await task == [REMOTE, LAST]
    assert sorted(prefill.picked) == ["p0", "p1"]
    assert [call.handoff for call in decode.calls] == prefill.handoffs[1:]
    assert [handoff.is_cancelled for handoff in prefill.handoffs] == [True, False]


async def test_cancelling_meanwhile_cancels_the_prefill_and_lets_decode_free_what_it_has_computed() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [HANG])
    server, task, before = await prefilling(prefill, decode)
    assert isinstance(await ended(task), asyncio.CancelledError)
    assert prefill.handoffs[0].is_cancelled
    assert decode.calls == [Call(request(), prefill.handoffs[0], "", before)]
    assert loads(server) == {"prefill": Counter(), "decode": Counter()}


async def test_a_time_limit_meanwhile_is_a_time_limit() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], [HANG])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(LOOK_AGAIN_S / 2):
            await served(orchestrator(prefill, decode, info={"pace": SLOW}))
    assert len(decode.calls) == 1


@pytest.mark.parametrize(
    ("replicas", "hands_over_early"), [(["d0", "d1"], True), (["d0"], False)], ids=["prefill needs it", "only one"]
)
async def test_decode_gets_the_request_at_once_if_prefill_needs_that_or_nothing_can_change(
    replicas: list[str], hands_over_early: bool
) -> None:
    decode, clock = FakeDecode(replicas, [HANG]), asyncio.get_running_loop().time
    began_at = clock()
    _, task, _ = await prefilling(FakePrefill("p"), decode, hands_over_early=hands_over_early)
    await decode.is_hanging.wait()
    took_s = clock() - began_at
    await ended(task)
    assert took_s < LOOK_AGAIN_AT * SLOW.prompt_s(len(PROMPT))


# Whole sequences on prefill replicas


def with_full_decode(prefill: FakePrefill, decode: FakeDecode, on_prefill: FakeDecode) -> Orchestrator:
    server = orchestrator(prefill, decode, on_prefill=on_prefill, placement=PredictedPlacement())
    for replica, state in server._router.pools["decode"].replicas.items():
        server._router.pools["decode"].on_load(replica, ReplicaLoad(MIN_BATCH, 0, state.info.num_blocks))
    return server


async def test_if_decode_is_full_a_prefill_replica_serves_the_whole_sequence() -> None:
    prefill, decode, on_prefill = FakePrefill("p"), FakeDecode(["d"], [LAST]), FakeDecode([], [FIRST, LAST])
    server = with_full_decode(prefill, decode, on_prefill)
    assert await served(server) == [FIRST, LAST]
    assert (prefill.picked, decode.calls) == ([], [])
    assert on_prefill.calls == [Call(request(), None, "decode_full", "p")]
    assert loads(server) == {"prefill": Counter(), "decode": Counter()}


async def test_a_prefill_replica_that_loses_a_whole_sequence_is_replaced_by_another() -> None:
    prefill, on_prefill = FakePrefill("p0", "p1"), FakeDecode([], [LOST], [LAST])
    server = with_full_decode(prefill, FakeDecode(["d"], [LAST]), on_prefill)
    assert await served(server) == [LAST]
    first, second = (call.replica for call in on_prefill.calls)
    assert {first, second} == {"p0", "p1"}
    assert server._router.ejections.is_ejected(first)
    assert not server._router.ejections.is_ejected(second)


async def test_a_prefill_replica_serves_what_the_last_decode_replica_lost_before_its_first_token() -> None:
    prefill, decode, on_prefill = FakePrefill("p"), FakeDecode(["d"], [LOST]), FakeDecode([], [FIRST, LAST])
    server = orchestrator(prefill, decode, on_prefill=on_prefill)
    assert await served(server) == [FIRST, LAST]
    assert on_prefill.calls == [Call(request(), None, "no_decode_replica", "p")]
    assert prefill.handoffs[0].is_cancelled


async def test_a_prefill_replica_goes_on_with_the_tokens_of_the_last_decode_replica_as_output() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [REMOTE, TokenDelta([20]), LOST])
    on_prefill = FakeDecode([], [LAST])
    server = orchestrator(prefill, decode, on_prefill=on_prefill)
    assert [delta.token_ids for delta in await served(server)] == [[10], [20], [11]]
    assert on_prefill.calls == [Call(request().resumed([10, 20]), None, "no_decode_replica", "p")]
    assert on_prefill.calls[0].request.num_replayed == 2


async def test_what_has_no_room_on_prefill_waits_for_it_while_decode_is_gone() -> None:
    on_prefill = FakeDecode([], ["hang"], [LAST])
    server = orchestrator(FakePrefill("p"), FakeDecode([]), on_prefill=on_prefill, info={"num_blocks": 1})
    running = asyncio.create_task(served(server))
    await on_prefill.is_hanging.wait()
    second = await waiting(server)
    assert server.line.num_waiting == 1
    await ended(running)
    assert await second == [LAST]


async def test_new_sequences_are_decoded_by_a_decode_replica_that_comes() -> None:
    prefill, decode, on_prefill = FakePrefill("p"), FakeDecode([], [REMOTE, LAST]), FakeDecode([], [LAST])
    server = orchestrator(prefill, decode, on_prefill=on_prefill)
    assert await served(server) == [LAST]
    server._router.pools["decode"].join(replica_info("d", "decode"))
    assert await served(server) == [REMOTE, LAST]
    assert len(on_prefill.calls) == 1


# What is told of the decisions


async def test_every_attempt_tells_its_decision_before_anything_is_sent() -> None:
    decode = FakeDecode(["d0", "d1"], [LOST], [LAST])
    told: list[tuple[Decision, int]] = []
    server = orchestrator(None, decode)
    await server.run(
        request(),
        SequenceProgress(lambda delta: None),
        hints=RoutingHints(explain=True),
        on_decision=lambda decision: told.append((decision, len(decode.calls))),
    )
    assert [num_calls for _, num_calls in told] == [0, 1]
    assert [decision.serving.replica for decision, _ in told] == [call.replica for call in decode.calls]
    assert [len(decision.others.get("decode", [])) for decision, _ in told] == [1, 0]


# Endings


@pytest.mark.parametrize(
    ("script", "has_kv"),
    [
        ([REMOTE, LAST], True),
        ([REMOTE, EngineFailed("no")], True),
        ([REMOTE, LOST], True),
        ([first_delta("local", "prefill_failed"), LAST], False),
        ([first_delta("local", "already_cached"), LAST], False),
        ([EngineFailed("no")], False),
        ([InvalidRequest("no")], False),
        ([LOST], False),
        ([NO_KV], False),
    ],
    ids=["remote", "failed later", "lost later", "local", "cached", "failed", "refused", "lost", "no KV"],
)
async def test_a_prefill_is_cancelled_unless_decode_has_its_kv(script: Script, has_kv: bool) -> None:
    prefill = FakePrefill("p")
    server = orchestrator(prefill, FakeDecode(["d"], script), max_attempts=1)
    await asyncio.gather(served(server), return_exceptions=True)
    assert [handoff.is_cancelled for handoff in prefill.handoffs] == [not has_kv]


async def test_a_prefill_whose_kv_has_arrived_is_not_cancelled_meanwhile_either() -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], [REMOTE, FIRST, LAST])
    cancelled: list[bool] = []
    server = orchestrator(prefill, decode)
    await server.run(request(), SequenceProgress(lambda delta: cancelled.append(prefill.handoffs[0].is_cancelled)))
    assert cancelled == [False] * 3


@pytest.mark.parametrize(
    ("script", "has_kv"), [([HANG], False), ([REMOTE, HANG], True)], ids=["before the first token", "after it"]
)
async def test_cancelling_ends_decode_and_the_prefill_that_it_waits_for(script: Script, has_kv: bool) -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d"], script)
    task = asyncio.create_task(served(orchestrator(prefill, decode)))
    await decode.is_hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert decode.num_open == 0
    assert prefill.handoffs[0].is_cancelled is not has_kv


async def test_cancelling_while_the_prefill_is_being_started_cancels_the_start() -> None:
    prefill, decode = FakePrefill("p", hangs=True), FakeDecode(["d"], [LAST])
    task = asyncio.create_task(served(orchestrator(prefill, decode)))
    await prefill.num_called.acquire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert prefill.is_cancelled
    assert decode.calls == []


@pytest.mark.parametrize(
    ("script", "limits", "has_kv"),
    [
        ([HANG], {"ttft_timeout_s": 0.01}, False),
        ([REMOTE, HANG], {"itl_timeout_s": 0.01}, True),
    ],
    ids=["first token", "next token"],
)
async def test_a_token_that_does_not_come_in_time_ends_the_sequence(
    script: Script, limits: dict[str, Any], has_kv: bool
) -> None:
    prefill, decode = FakePrefill("p"), FakeDecode(["d0", "d1"], script)
    task = asyncio.create_task(served(orchestrator(prefill, decode, **limits)))
    await asyncio.wait([task], timeout=DEADLINE_S / 2)  # well before the deadline of `served`
    assert task.done()
    assert isinstance(task.exception(), TimeoutError)
    assert len(decode.calls) == 1
    assert decode.num_open == 0
    assert prefill.handoffs[0].is_cancelled is not has_kv


async def test_a_next_token_is_awaited_no_longer_because_the_first_might_have_taken_longer() -> None:
    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            await asyncio.sleep(0.02)
            await super().generate(*arguments)

    decode = Slow(["d"], [FIRST, HANG])
    task = asyncio.create_task(served(orchestrator(None, decode, ttft_timeout_s=60, itl_timeout_s=0.05)))
    await asyncio.wait([task], timeout=DEADLINE_S / 2)
    assert task.done()
    assert isinstance(task.exception(), TimeoutError)


async def test_the_first_token_may_take_longer_than_a_next_one() -> None:
    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            await asyncio.sleep(0.1)
            arguments[-1].take(LAST)

    assert await served(orchestrator(None, Slow(["d"]), ttft_timeout_s=60, itl_timeout_s=0.02)) == [LAST]


async def test_a_sequence_that_waits_for_its_kv_has_as_long_as_before_a_first_token() -> None:
    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            arguments[-1].take(SAMPLED_BY_PREFILL)
            await asyncio.sleep(0.1)
            arguments[-1].take(LAST)

    server = orchestrator(FakePrefill("p"), Slow(["d"]), ttft_timeout_s=60, itl_timeout_s=0.02)
    assert await served(server) == [SAMPLED_BY_PREFILL, LAST]
    never = orchestrator(FakePrefill("p"), FakeDecode(["d"], [SAMPLED_BY_PREFILL, HANG]), ttft_timeout_s=0.05)
    with pytest.raises(TimeoutError):
        await served(never)


async def test_a_failed_attempt_is_not_in_the_time_that_the_router_learns() -> None:
    now, learnt = 0.0, []

    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            nonlocal now
            now += 0.25 if self.calls else 10.0
            await super().generate(*arguments)

    server = orchestrator(None, Slow(["d0", "d1"], [LOST], [first_delta("local", ""), LAST]))
    learn_local = server._router.predictor.learn_local

    def record(expected: PromptTimes, ttft_s: float) -> None:
        learnt.append(ttft_s)
        learn_local(expected, ttft_s)

    server._router.predictor.learn_local = record  # type: ignore[method-assign]
    await server.run(request(), progress := SequenceProgress(lambda delta: None, lambda: now))
    assert learnt == [0.25]
    assert progress.ttft_s == 10.25


async def test_a_prefill_that_does_not_start_counts_against_the_time_to_the_first_token() -> None:
    prefill = FakePrefill("p", hangs=True)
    task = asyncio.create_task(served(orchestrator(prefill, FakeDecode(["d"], [LAST]), ttft_timeout_s=0.01)))
    await asyncio.wait([task], timeout=0.5)
    is_in_time = task.done()
    task.cancel()
    await asyncio.wait([task])
    assert is_in_time
    assert isinstance(task.exception(), TimeoutError)


@pytest.mark.parametrize(
    "script",
    [[FIRST, LAST], [LOST], [FIRST, LOST], [NO_KV], [EngineFailed("no")], [HANG], [FIRST, HANG]],
    ids=["served", "lost", "lost later", "no KV", "failed", "first token late", "next token late"],
)
async def test_every_ending_takes_its_load_off_the_replicas(script: Script) -> None:
    decode = FakeDecode(["d0", "d1"], script)
    server = orchestrator(FakePrefill("p"), decode, ttft_timeout_s=0.02, itl_timeout_s=0.02)
    await asyncio.gather(*(served(server, prompt=[n]) for n in range(4)), return_exceptions=True)
    assert len(decode.calls) >= 4
    assert loads(server) == {"prefill": Counter(), "decode": Counter()}


async def test_the_prefill_replica_is_relieved_at_the_first_token_and_the_decode_replica_at_the_last() -> None:
    server = orchestrator(FakePrefill("p"), FakeDecode(["d"], [FIRST, LAST]))
    seen: list[dict[str, Counter[str]]] = []
    await server.run(request(), SequenceProgress(lambda delta: seen.append(loads(server))))
    assert seen == [{"prefill": Counter(), "decode": Counter(d=1)}] * 2


async def test_tokens_that_come_in_time_never_end_a_sequence_however_long_it_takes() -> None:
    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            for _ in range(10):
                await asyncio.sleep(0.02)
                arguments[-1].take(FIRST)

    received = await served(orchestrator(None, Slow(["d"]), ttft_timeout_s=0.1, itl_timeout_s=0.1))
    assert received == [FIRST] * 10


# The deadline of a request


async def until_deadline(server: Orchestrator, seconds: float, into: list[TokenDelta] | None = None) -> None:
    progress = SequenceProgress((into if into is not None else []).append)
    async with asyncio.timeout(DEADLINE_S):
        await server.run(request(), progress, deadline=progress.arrived_at + seconds)


async def test_the_deadline_ends_a_sequence_in_decode_although_its_tokens_come_in_time() -> None:
    class Slow(FakeDecode):
        async def generate(self, *arguments: Any) -> None:
            self.num_open += 1
            try:
                while True:
                    await asyncio.sleep(0.005)
                    arguments[-1].take(FIRST)
            finally:
                self.num_open -= 1

    decode, received = Slow(["d"]), list[TokenDelta]()
    server = orchestrator(None, decode, itl_timeout_s=5.0)
    with pytest.raises(DeadlineExceeded):
        await until_deadline(server, 0.1, received)
    assert received
    assert decode.num_open == 0
    assert loads(server) == NOBODY


async def test_the_deadline_ends_a_prefill() -> None:
    prefill = FakePrefill("p", hangs=True)
    server = orchestrator(prefill, FakeDecode(["d"], [LAST]))
    with pytest.raises(DeadlineExceeded):
        await until_deadline(server, 0.01)
    assert prefill.is_cancelled


async def test_the_deadline_ends_the_waiting_in_the_line() -> None:
    server, running = await crowded(FakeDecode(["d"], [HANG]))
    with pytest.raises(DeadlineExceeded):
        await until_deadline(server, 0.01)
    assert line_of(server) == (0, 0)
    await ended(running)


async def test_a_deadline_that_has_passed_starts_no_prefill_of_a_sequence() -> None:
    prefill = FakePrefill("p", hangs=True)
    with pytest.raises(DeadlineExceeded):
        await until_deadline(orchestrator(prefill, FakeDecode(["d"], [LAST])), -1.0)


async def test_a_deadline_says_nothing_against_the_replicas_and_a_late_token_does() -> None:
    for deadline_s, is_ejected in ((0.01, False), (1e6, True)):
        server = orchestrator(None, FakeDecode(["d0", "d1"], [HANG]), ttft_timeout_s=0.02)
        for _ in range(2):
            with pytest.raises((DeadlineExceeded, TimeoutError)):
                await until_deadline(server, deadline_s)
        assert [server._router.ejections.is_ejected(replica) for replica in ("d0", "d1")] == [is_ejected] * 2
