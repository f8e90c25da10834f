"""What many requests see of a replica that fails, and many replicas of a request that ends engines."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest

from app import errors
from app.errors import BatonError, EngineDead, NoReplica, PrefillFailed, ReplicaLost
from app.frontend.attempt import Handoff
from app.frontend.orchestrator import Orchestrator
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, KvUpdate, PrefillReport, TokenDelta
from tests.unit.frontend.test_orchestrator import DEADLINE_S, FakeDecode, FakePrefill, orchestrator, served
from tests.unit.routing.fleet import Timers
from tests.unit.routing.samples import hashes, prompt
from tests.unit.waiting import PATIENCE_S, until

NUM_REQUESTS = 20
PROMPT = prompt(160)
POISON = prompt(32, start=1000)


class Decode(FakeDecode):
    """Decode replicas of which some cannot receive KV, and whose engines die of POISON."""

    def __init__(self, replicas: list[str], *, deaf: Collection[str] = (), prefill: FakePrefill | None = None) -> None:
        """With `prefill`, it is the prefill engines that die of POISON, and nobody knows of it yet."""
        super().__init__(replicas)
        self.deaf = set(deaf)
        self.prefill = prefill
        self.served_by: Counter[str] = Counter()

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        await asyncio.sleep(0)
        if request.prompt_token_ids == POISON:
            if self.prefill is not None:
                raise PrefillFailed("Bootstrap failed")
            raise EngineDead
        if handoff is not None and replica in self.deaf:
            raise PrefillFailed("KVTransferError")
        self.served_by[replica] += 1
        kind: Any = "local" if handoff is None else "remote"
        report = PrefillReport(kind, local_reason, handoff.replica if handoff else None, replica, 0, len(PROMPT), "")
        progress.take(TokenDelta([1], finish_reason="stop", report=report))


def sglang(prefill: FakePrefill, decode: FakeDecode, **options: Any) -> Orchestrator:
    return orchestrator(prefill, decode, can_decode_prefill=False, hands_over_early=True, **options)


def hold_prompt(server: Orchestrator, role: Any, *replicas: str) -> None:
    for replica in replicas:
        server._router.pools[role].on_kv(replica, KvUpdate(hashes(len(PROMPT)), []))


async def outcomes(server: Orchestrator, token_ids: list[int], number: int = NUM_REQUESTS) -> Counter[str]:
    """How many requests, one after the other, ended how."""
    ends: Counter[str] = Counter()
    for _ in range(number):
        try:
            await served(server, prompt=token_ids)
            ends["served"] += 1
        except BatonError as error:
            ends[type(error).__name__] += 1
    return ends


# One replica of a pair


async def test_a_decode_replica_that_cannot_receive_kv_fails_no_request_although_it_holds_the_prefix() -> None:
    prefill, decode = FakePrefill("p0", "p1", "p2"), Decode(["d0", "d1"], deaf=["d0"])
    server = sglang(prefill, decode)
    hold_prompt(server, "decode", "d0")
    assert await outcomes(server, PROMPT) == Counter(served=NUM_REQUESTS)
    assert decode.served_by == Counter(d1=NUM_REQUESTS)
    assert len(prefill.picked) <= NUM_REQUESTS + 3  # few were tried twice
    assert [replica for replica in prefill.ready if server._router.ejections.is_ejected(replica)] == []
    assert server._router.ejections.is_ejected("d0")


async def test_a_prefill_replica_whose_kv_nobody_gets_fails_no_request_although_it_holds_the_prefix() -> None:
    class Mute(Decode):
        async def generate(self, request: GenerateRequest, handoff: Any, *rest: Any) -> None:
            if handoff.replica == "p0":
                raise PrefillFailed("KVTransferError")
            await super().generate(request, handoff, *rest)

    decode = Mute(["d0", "d1", "d2"])
    server = sglang(FakePrefill("p0", "p1"), decode)
    hold_prompt(server, "prefill", "p0")
    assert await outcomes(server, PROMPT) == Counter(served=NUM_REQUESTS)
    assert [replica for replica in decode.ready if server._router.ejections.is_ejected(replica)] == []


async def test_a_single_pair_over_which_no_kv_comes_is_avoided_and_both_ends_serve_with_others() -> None:
    class Cut(Decode):
        async def generate(self, request: GenerateRequest, handoff: Any, reason: str, replica: str, *rest: Any) -> None:
            used[handoff.replica, replica] += 1
            if (handoff.replica, replica) == ("p0", "d0"):
                raise PrefillFailed("KVTransferError")
            await super().generate(request, handoff, reason, replica, *rest)

    used: Counter[tuple[str, str]] = Counter()
    server = sglang(FakePrefill("p0", "p1"), Cut(["d0", "d1"]))
    for number in range(100):
        await served(server, prompt=prompt(160, start=1000 * number))
    assert used["p0", "d0"] <= 1
    assert not any(server._router.ejections.is_ejected(replica) for replica in ("p0", "p1", "d0", "d1"))
    assert used["p0", "d1"] + used["p1", "d0"] > 20


async def test_a_decode_replica_that_times_out_is_avoided() -> None:
    class Stands(Decode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            if rest[2] == "d0":
                tried.append(rest[2])
                await asyncio.Event().wait()
            await super().generate(request, *rest)

    tried: list[str] = []
    decode = Stands(["d0", "d1"])
    server = orchestrator(None, decode, ttft_timeout_s=0.02)
    hold_prompt(server, "decode", "d0")
    ends: Counter[str] = Counter()
    for _ in range(NUM_REQUESTS):
        try:
            await served(server, prompt=PROMPT)
            ends["served"] += 1
        except TimeoutError:
            ends["late"] += 1
    assert ends == Counter(served=NUM_REQUESTS - 1, late=1)
    assert tried == ["d0"]


async def test_internal_errors_of_one_replica_alone_have_it_avoided() -> None:
    class Broken(Decode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            if rest[2] == "d0":
                raise errors.EngineFailed("CUDA error")
            await super().generate(request, *rest)

    server = orchestrator(None, decode := Broken(["d0", "d1"]))
    hold_prompt(server, "decode", "d0")
    assert await outcomes(server, PROMPT) == Counter(served=NUM_REQUESTS)
    assert server._router.ejections.is_ejected("d0")
    assert decode.served_by == Counter(d1=NUM_REQUESTS)


async def test_a_replica_that_got_a_request_when_its_time_was_nearly_over_is_not_blamed() -> None:
    clock, decode = Timers(), FakeDecode(["d0", "d1"], ["hang"])
    server = orchestrator(None, decode, ttft_timeout_s=0.1)
    progress = SequenceProgress(lambda delta: None, clock)
    clock.advance(0.08)  # in the line
    request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling={})
    task = asyncio.create_task(server.run(request, progress))
    await decode.is_hanging.wait()
    clock.advance(0.03)
    await asyncio.wait([task], timeout=DEADLINE_S)
    assert isinstance(task.exception(), TimeoutError)
    assert not any(server._router.ejections.is_ejected(replica) for replica in decode.ready)


async def test_a_replica_that_stops_in_the_middle_is_blamed_however_long_its_request_was_in_line() -> None:
    clock, decode = Timers(), FakeDecode(["d0", "d1"], [TokenDelta([1]), "hang"])
    server = orchestrator(None, decode, ttft_timeout_s=100, itl_timeout_s=0.02)
    progress = SequenceProgress(lambda delta: None, clock)
    clock.advance(90)  # in the line
    request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling={})
    task = asyncio.create_task(server.run(request, progress))
    await decode.is_hanging.wait()
    clock.advance(1)
    await asyncio.wait([task], timeout=DEADLINE_S)
    assert isinstance(task.exception(), TimeoutError)
    assert [server._router.ejections.is_ejected(call.replica) for call in decode.calls] == [True]


async def test_decode_that_prefills_as_prefill_is_gone_answers_for_itself() -> None:
    prefill = FakePrefill("p0", fails=ReplicaLost("p0"))
    server = orchestrator(prefill, FakeDecode(["d0"], [errors.EngineFailed("CUDA error")]))
    assert await outcomes(server, PROMPT, 3) == Counter(EngineFailed=3)
    assert server._router.ejections.is_ejected("d0")


@pytest.mark.parametrize(("waited_s", "num_needed"), [(1.0, None), (60.0, 3)], ids=["soon", "late"])
async def test_clients_that_give_up_speak_against_a_replica_only_if_they_waited_long(
    waited_s: float, num_needed: int | None
) -> None:
    clock, decode = Timers(), FakeDecode(["d0", "d1"], ["hang"])
    server = orchestrator(None, decode)
    hold_prompt(server, "decode", "d0")
    for number in range(6):
        assert server._router.ejections.is_ejected("d0") is (num_needed is not None and number >= num_needed)
        decode.is_hanging.clear()
        request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling={})
        task = asyncio.create_task(server.run(request, SequenceProgress(lambda delta: None, clock)))
        async with asyncio.timeout(DEADLINE_S):
            await decode.is_hanging.wait()
        clock.advance(waited_s)
        task.cancel()
        await asyncio.wait([task])


# Poison


async def tries(server: Orchestrator, number: int) -> list[str]:
    ends = []
    for _ in range(number):
        with pytest.raises(BatonError) as caught:
            await served(server, prompt=POISON)
        ends.append(type(caught.value).__name__)
    return ends


async def test_a_request_that_kills_engines_kills_two_and_is_then_refused_for_good_reasons() -> None:
    decode = Decode([f"d{number}" for number in range(12)])
    server = orchestrator(None, decode)
    assert await tries(server, 3) == ["Quarantined"] * 3
    assert sum(server._router.ejections.is_ejected(replica) for replica in decode.ready) == 2
    assert await outcomes(server, PROMPT) == Counter(served=NUM_REQUESTS)  # everybody else is served


async def test_a_refusal_says_why_and_for_how_long() -> None:
    server = orchestrator(None, Decode(["d0", "d1", "d2"]))
    with pytest.raises(errors.Quarantined, match=r"2 engines died.*refused for 600 s"):
        await served(server, prompt=POISON)


async def test_a_death_without_a_retry_counts_when_the_client_tries_again() -> None:
    decode = Decode(["d0", "d1", "d2", "d3"])
    server = orchestrator(None, decode, max_attempts=1)
    assert await tries(server, 3) == ["NoReplica", "Quarantined", "Quarantined"]
    assert sum(server._router.ejections.is_ejected(replica) for replica in decode.ready) == 2


async def test_replicas_whose_connections_break_have_not_died_of_a_prompt_unless_serve_removes_them_too() -> None:
    """As when their node fails, or a switch: the prompt is innocent."""
    broken = ReplicaLost("d", "its connection ended")
    decode = FakeDecode([f"d{number}" for number in range(6)], [broken])
    server = orchestrator(None, decode)
    assert await tries(server, 2) == ["NoReplica"] * 2
    replicas = [call.replica for call in decode.calls]
    for replica in replicas:
        server._router.pools["decode"].leave(replica)
        server._router.pools["decode"].on_end(replica, "the same node")
    assert await tries(server, 1) == ["NoReplica"]
    server._router.pools["decode"].on_end(decode.calls[-1].replica, None)
    assert await tries(server, 1) == ["Quarantined"]


async def test_who_could_not_be_given_the_handoff_has_not_died_of_it() -> None:
    not_taken = errors.HandoffNotTaken("d", "it cannot be given the handoff")
    decode = FakeDecode(["d0", "d1", "d2", "d3"], [not_taken])
    server = orchestrator(FakePrefill("p0"), decode)
    assert await tries(server, 1) == ["NoReplica"]
    assert len(decode.calls) == 3, "no engine had it, so it is tried as often as allowed"
    for call in decode.calls:
        server._router.pools["decode"].on_end(call.replica, call.replica)
    assert await tries(server, 1) == ["NoReplica"]


async def test_the_only_replica_gets_a_request_again_that_it_was_too_slow_to_take() -> None:
    class SlowOnce(Decode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            tried.append(rest[2])
            if len(tried) == 1:
                raise errors.HandoffNotTaken("d0", "it cannot be given the handoff")
            await super().generate(request, *rest)

    tried: list[str] = []
    assert await outcomes(orchestrator(FakePrefill("p0"), SlowOnce(["d0"])), PROMPT, 1) == Counter(served=1)
    assert tried == ["d0", "d0"]


async def test_a_prefill_engine_that_says_that_it_died_counts_at_once() -> None:
    class PrefillDies(Decode):
        async def generate(self, request: GenerateRequest, handoff: Any, *rest: Any) -> None:
            handoff.lost.set_result(EngineDead())
            raise PrefillFailed("the prefill replica is gone")

    prefill = FakePrefill("p0", "p1", "p2")
    server = sglang(prefill, PrefillDies(["d0"]))
    assert await tries(server, 2) == ["Quarantined"] * 2
    assert len(prefill.picked) == 2


async def test_prefill_engines_that_die_count_too_as_soon_as_that_is_known() -> None:
    prefill = FakePrefill(*(f"p{number}" for number in range(4)))
    server = sglang(prefill, Decode([f"d{number}" for number in range(4)], prefill=prefill))
    assert await tries(server, 1) == ["NoReplica"]
    assert len(prefill.picked) == 2
    for replica in prefill.picked:
        server._router.pools["prefill"].leave(replica)
        server._router.pools["prefill"].on_end(replica, None)
    assert await tries(server, 2) == ["Quarantined"] * 2
    assert len(prefill.picked) == 2


async def test_a_replica_that_dies_under_many_sequences_makes_none_of_them_poison() -> None:
    class DiesOnce(Decode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            if rest[2] == "d0":
                is_there.release()
                await dies.wait()
                server._router.pools["decode"].leave("d0")
                raise ReplicaLost("d0", "its connection ended")
            await super().generate(request, *rest)

    is_there, dies = asyncio.Semaphore(0), asyncio.Event()
    decode = DiesOnce(["d0", "d1"])
    server = orchestrator(None, decode)
    prompts = [prompt(160, start=1000 * number) for number in range(16)]
    tasks = [asyncio.create_task(served(server, prompt=each)) for each in prompts]
    await is_there.acquire()
    dies.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [list] * 16
    for each in prompts:
        await served(server, prompt=each)


class Killable(Decode):
    """Decode engines that compute no token before `computes` is set, and that a test can kill."""

    def __init__(self, replicas: list[str]) -> None:
        super().__init__(replicas)
        self.computes = asyncio.Event()
        self.running: dict[str, dict[int, asyncio.Future[None]]] = {replica: {} for replica in replicas}
        """On each replica, by the first token of its prompt: what ends the sequence."""

    @property
    def num_running(self) -> int:
        return sum(map(len, self.running.values()))

    def kill_that_of(self, token_ids: list[int]) -> None:
        replica = next(replica for replica, running in self.running.items() if token_ids[0] in running)
        killed, self.running[replica] = self.running[replica], {}
        for ended in killed.values():
            ended.set_exception(EngineDead())

    async def generate(self, request: GenerateRequest, *rest: Any) -> None:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running[rest[2]][request.prompt_token_ids[0]] = ended
        computes: asyncio.Future[Any] = asyncio.ensure_future(self.computes.wait())
        try:
            await asyncio.wait([ended, computes], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
        finally:
            computes.cancel()
            self.running[rest[2]].pop(request.prompt_token_ids[0], None)
        await super().generate(request, *rest)


async def kill_two_under(victim: list[int]) -> tuple[Orchestrator, Killable, dict[int, asyncio.Task[Any]], set[int]]:
    """Kill two engines of three under 16 prompts.  Returns also their tasks, and those that were on both engines."""
    server = orchestrator(None, decode := Killable(["d0", "d1", "d2"]))
    for _ in range(1000):
        server.retry_budget.count_request()  # so that all may be tried again
    prompts = [victim, *(prompt(160, start=1000 * number) for number in range(3, 18))]
    tasks = {each[0]: asyncio.create_task(served(server, prompt=each)) for each in prompts}
    on_both = set(tasks)
    for _ in range(2):
        await until(lambda: decode.num_running == len(prompts))
        on_both &= next(set(running) for running in decode.running.values() if victim[0] in running)
        decode.kill_that_of(victim)
    await until(lambda: len(server._trial._waiters or ()) == len(on_both) - 1)
    return server, decode, tasks, on_both


@pytest.mark.parametrize("victim", [POISON, prompt(160, start=2000)], ids=["poison", "innocent"])
async def test_engines_that_die_under_many_sequences_make_no_innocent_poison(victim: list[int]) -> None:
    """Found by kills in a row under load: two engines of four died within 3 s, and prompts were refused for minutes."""
    server, decode, tasks, on_both = await kill_two_under(victim)
    assert len(on_both) > 1
    on_trial = [sum(number in running for number in on_both) for running in decode.running.values()]
    assert sum(on_trial) == 1, "one suspect is tried at a time, and all others go on"
    assert decode.num_running == len(tasks) - len(on_both) + 1
    decode.computes.set()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    ends = [type(result) for result in results]
    assert ends == [errors.Quarantined if victim is POISON else list, *[list] * 15]
    assert server.quarantine.num_quarantined == (victim is POISON)
    assert not server.quarantine._num_exposed
    assert not server._trial.locked()


async def test_a_client_that_leaves_while_its_prompt_waits_for_its_trial_keeps_no_other_waiting() -> None:
    server, decode, tasks, on_both = await kill_two_under(prompt(160, start=2000))
    gone = tasks.pop(next(iter(on_both - {n for running in decode.running.values() for n in running})))
    gone.cancel()
    decode.computes.set()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks.values())
    assert gone.cancelled()
    assert not server._trial.locked()


async def test_a_prefill_and_a_decode_replica_that_are_lost_together_are_one_death() -> None:
    class NodeFails(Decode):
        async def generate(self, request: GenerateRequest, handoff: Any, *rest: Any) -> None:
            if not self.calls:
                self.calls.append(handoff)
                handoff.lost.set_result(ReplicaLost("p"))
                raise ReplicaLost(rest[1])
            await super().generate(request, handoff, *rest)

    prefill, decode = FakePrefill("p0", "p1"), NodeFails(["d0", "d1"])
    server = sglang(prefill, decode)
    await served(server, prompt=PROMPT)
    assert set(prefill.picked) == {"p0", "p1"}
    assert server._router.ejections.is_ejected(prefill.picked[0])


async def test_engines_that_were_known_to_be_dead_did_not_die_of_a_prompt() -> None:
    class AllDead(FakeDecode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            raise EngineDead

    server = orchestrator(None, AllDead(["d0", "d1", "d2"]))
    for number in range(3):
        with pytest.raises((NoReplica, errors.Quarantined)):
            await served(server, prompt=[number])
    assert await tries(server, 3) == ["NoReplica"] * 3


# The retry budget


async def test_retries_of_a_frontend_stay_within_a_tenth_of_its_requests() -> None:
    class AllDead(FakeDecode):
        async def generate(self, request: GenerateRequest, *rest: Any) -> None:
            calls.append(rest[2])
            raise ReplicaLost(rest[2])

    calls: list[str] = []
    server = orchestrator(None, AllDead([f"d{number}" for number in range(8)]))
    for number in range(400):
        with pytest.raises((NoReplica, errors.Quarantined)):
            await served(server, prompt=[number])
    assert len(calls) - 400 <= 400 / 10
    assert len(calls) - 400 >= 10  # single failures are tried again at any load


async def test_a_prompt_that_is_served_between_two_deaths_is_no_poison_although_clients_leave_with_the_last_token() -> (
    None
):
    """As vLLM's server does: it cancels what has sent its last token, before the orchestrator hears of the end."""

    class Dying(Decode):
        dies = False

        async def generate(self, *arguments: Any) -> None:
            if self.dies:
                self.dies = False
                raise EngineDead
            await super().generate(*arguments)
            await asyncio.Event().wait()

    decode = Dying(["d0", "d1", "d2", "d3", "d4"])
    server = orchestrator(FakePrefill("p0"), decode)
    for _ in range(4):
        decode.dies = True
        ended = asyncio.Event()
        progress = SequenceProgress(lambda delta, ended=ended: ended.set())  # type: ignore[misc]
        request = GenerateRequest(request_id="r", prompt_token_ids=PROMPT, sampling={})
        task = asyncio.create_task(server.run(request, progress))
        await asyncio.wait_for(ended.wait(), DEADLINE_S)
        task.cancel()
        await asyncio.wait([task])
