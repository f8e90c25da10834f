"""A fleet of sim engines in virtual time: no sockets, no event loop, the same numbers for the same seed.

1. A request arrives, and the policy places it in no time.
2. The prefill replica's scheduler computes the prompt and keeps its blocks.
3. The decode replica pulls what it has not cached.  The profile gives the time for that, whatever else moves at the
   same time.  Then prefill's blocks are freed, and decode's scheduler gives out the tokens.
4. A prompt that is prefilled locally goes to decode at once.
5. After each engine step, and whenever a request comes or goes, a replica publishes its load and the changes of its
   prefix cache.  Both reach the router `message_s` later, as in production by way of `EventTranslator`.

So the production router runs here, on the sim engine's scheduler and caches.  Network and frontend are left out:
requests and tokens travel in no time.  The answers in later prompts are left out too: a trace gives the blocks of a
turn's whole prompt, but not which of them the turn before has generated, so decode cannot reuse these.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import chain, groupby, pairwise
from typing import Any

import msgspec

from app.bench.workload import MOONCAKE_BLOCK_TOKENS, Request
from app.engines.sim.profile import SimProfile
from app.engines.sim.scheduler import ScheduledSequence, Scheduler, SchedulerLimits, Step
from app.errors import Overloaded
from app.kv_cache.event_translator import EventTranslator
from app.messages import GenerateRequest, PrefillReport, ReplicaInfo, ReplicaLoad, Role
from app.routing.pool_state import PoolState
from benchmarks.routing.policies import FleetAssignment, Policy

MAX_MODEL_LEN = 131_072


class FleetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there are, and the settings of each."""

    profile: SimProfile
    num_prefill: int = 8
    num_decode: int = 8
    num_blocks: int
    """The KV blocks of each replica."""
    block_size: int
    max_model_len: int = MAX_MODEL_LEN
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    """vLLM's default, and that of the runs that the profile h200-llama-8b was fitted to."""
    message_s: float = 0.001
    """How long load and cache updates take to the router: one way through a channel."""

    def names(self, role: Role) -> list[str]:
        """Return the ids of a pool's replicas."""
        return [f"{role}-{index}" for index in range(self.num_prefill if role == "prefill" else self.num_decode)]


class Timeline:
    """Virtual time in seconds.  Calls run in the order of their moments, then in the order in which they were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_calls = 0

    def at(self, moment: float, call: Callable[..., None], *arguments: Any) -> None:
        self._num_calls += 1
        heappush(self._due, (moment, self._num_calls, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + seconds, call, *arguments)

    def run(self) -> None:
        """Run until nothing is due."""
        due = self._due
        while due:
            self.now, _, call, arguments = heappop(due)
            call(*arguments)


class Replica:
    """One engine.  It steps as long as there is something to compute."""

    def __init__(
        self,
        role: Role,
        name: str,
        spec: FleetSpec,
        timeline: Timeline,
        begin_pull: Callable[[ScheduledSequence], None],
        hand_out: Callable[[list[ScheduledSequence]], None],
        pool: PoolState | None,
    ) -> None:
        """`pool` is the pool state that the replica publishes to; with None it publishes nothing."""
        self.name = name
        self.scheduler = Scheduler(
            SchedulerLimits(
                num_blocks=spec.num_blocks,
                block_size=spec.block_size,
                max_model_len=spec.max_model_len,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
            ),
            spec.profile,
            vocabulary=range(1),
            seed=0,
        )
        self.num_sequences = 0
        self.queued_tokens = 0
        self.busy_s = 0.0
        self._timeline = timeline
        self._begin_pull = begin_pull
        self._hand_out = hand_out
        self._is_stepping = False
        self._pool = pool
        self._message_s = spec.message_s
        self._told = ReplicaLoad()
        self._translator = EventTranslator(num_blocks=spec.num_blocks, block_size=spec.block_size)
        if pool is not None:
            self.scheduler.pool.take_events()  # from here on they are recorded
            pool.join(self._info(role, spec))

    def _info(self, role: Role, spec: FleetSpec) -> ReplicaInfo:
        return ReplicaInfo(
            replica_id=self.name,
            role=role,
            model="sim",
            engine="sim",
            engine_version="",
            node_ip=f"node-of-{self.name}",
            pid=0,
            num_blocks=spec.num_blocks,
            block_size_tokens=spec.block_size,
            max_model_len=spec.max_model_len,
            prefix_cache="published",
        )

    def add(self, sequence: ScheduledSequence) -> None:
        self.scheduler.add(sequence)
        self.wake()

    def cancel(self, sequence: ScheduledSequence) -> None:
        self.scheduler.cancel(sequence)
        self.wake()  # others may wait for its blocks

    def wake(self) -> None:
        """Publish the load, and start a step if none is running and there is something to compute."""
        self.tell()
        if not self._is_stepping:
            self._step()

    def _step(self) -> None:
        step = self.scheduler.step()
        self._is_stepping = step is not None
        if step is None:
            return
        for sequence in step.pulls:
            self._begin_pull(sequence)
        self.busy_s += step.duration_s
        self._timeline.after(step.duration_s, self._end_step, step)

    def _end_step(self, step: Step) -> None:
        self._hand_out(step.outputs)
        self.tell()
        self._step()

    def tell(self) -> None:
        """Publish the load and the changes of the prefix cache, if there are any."""
        pool = self._pool
        if pool is None:
            return
        if (self.num_sequences, self.queued_tokens) != (self._told.sequences, self._told.queued_tokens):
            self._told = ReplicaLoad(
                self.num_sequences, self.queued_tokens, self.scheduler.num_used_blocks, self.scheduler.num_running
            )
            self._timeline.after(self._message_s, pool.on_load, self.name, self._told)
        if events := self.scheduler.pool.take_events():
            self._timeline.after(self._message_s, pool.on_kv, self.name, self._translator.apply(events))


class Run(msgspec.Struct, eq=False):
    """One request under way."""

    request: GenerateRequest
    placement: FleetAssignment
    output_tokens: int
    arrived_at: float
    prefill: ScheduledSequence | None = None
    """The sequence on prefill; None once its blocks were freed."""
    prefill_cached_tokens: int = 0
    handed_off_at: float = 0.0
    last_token_at: float | None = None


class FleetResult(msgspec.Struct, kw_only=True):
    """The results over all requests.  TTFTs are in the order of the first tokens."""

    ttft_s: array[float]
    itl_s: array[float]
    """The gap before each token except a request's first."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were cached on the engine that computed the prompt."""
    transferred_tokens: int = 0
    num_local: int = 0
    num_refused: int = 0
    num_ended: int = 0
    reasons: Counter[str]
    """The number of decisions by the reason that the policy gives."""
    predicted_to_actual: array[float]
    """The predicted TTFT over the real one, if the policy predicts it."""
    end_s: float = 0.0
    prefill_utilisation: float = 0.0
    """The share of the time until the last request's end in which a replica computes: the mean over the pool."""
    decode_utilisation: float = 0.0


class Fleet:
    """The replicas and the requests under way."""

    def __init__(self, spec: FleetSpec, policy: Policy, timeline: Timeline) -> None:
        self._spec = spec
        self._policy = policy
        self._timeline = timeline
        self._runs: dict[ScheduledSequence, Run] = {}
        self.replicas: dict[str, Replica] = {}
        pools: tuple[tuple[Role, Callable[[list[ScheduledSequence]], None]], ...] = (
            ("prefill", self._hand_off),
            ("decode", self._give_out),
        )
        states: Mapping[Role, PoolState] = policy.pools
        for role, hand_out in pools:
            for name in spec.names(role):
                self.replicas[name] = Replica(role, name, spec, timeline, self._begin_pull, hand_out, states.get(role))
        self.result = FleetResult(
            ttft_s=array("d"), itl_s=array("d"), reasons=Counter(), predicted_to_actual=array("d")
        )

    def run(self, requests: list[Request]) -> FleetResult:
        """Serve `requests` until the last one has ended."""
        timeline, result = self._timeline, self.result
        for number, request in enumerate(requests):
            timeline.at(request.at_s, self._arrive, number, request)
        timeline.run()
        result.end_s = timeline.now
        result.prefill_utilisation = self._utilisation("prefill")
        result.decode_utilisation = self._utilisation("decode")
        return result

    def _utilisation(self, role: Role) -> float:
        names = self._spec.names(role)
        return sum(self.replicas[name].busy_s for name in names) / len(names) / self._timeline.now

    def _arrive(self, number: int, request: Request) -> None:
        generate = GenerateRequest(
            request_id=str(number),
            prompt_token_ids=prompt_tokens(request),
            sampling={"max_tokens": request.output_tokens},
        )
        try:
            placement = self._policy.place(generate)
        except Overloaded:
            self.result.num_refused += 1
            return
        self.result.reasons[placement.reason] += 1
        run = Run(generate, placement, request.output_tokens, self._timeline.now)
        decode = self.replicas[placement.decode]
        decode.num_sequences += 1
        if placement.prefill is None:
            self._compute_prompt(run, decode, self._decode_sequence(run, is_pulled=False))
            return
        decode.tell()
        run.prefill = ScheduledSequence(generate.prompt_token_ids, max_tokens=1, is_handoff=True)
        self.replicas[placement.prefill].num_sequences += 1
        self._compute_prompt(run, self.replicas[placement.prefill], run.prefill)

    def _decode_sequence(self, run: Run, *, is_pulled: bool) -> ScheduledSequence:
        return ScheduledSequence(run.request.prompt_token_ids, max_tokens=run.output_tokens, is_pulled=is_pulled)

    def _compute_prompt(self, run: Run, replica: Replica, sequence: ScheduledSequence) -> None:
        self._runs[sequence] = run
        replica.queued_tokens += queued_tokens(run)
        replica.add(sequence)

    def _hand_off(self, sequences: list[ScheduledSequence]) -> None:
        """Let decode pull the prompts that prefill has computed."""
        for sequence in sequences:
            run = self._runs[sequence]
            assert run.placement.prefill is not None
            prefill = self.replicas[run.placement.prefill]
            prefill.num_sequences -= 1
            prefill.queued_tokens -= queued_tokens(run)
            run.prefill_cached_tokens = sequence.cached_tokens
            run.handed_off_at = self._timeline.now
            decoding = self._decode_sequence(run, is_pulled=True)
            self._runs[decoding] = run
            self.replicas[run.placement.decode].add(decoding)

    def _begin_pull(self, sequence: ScheduledSequence) -> None:
        num_blocks = -(-sequence.transferred_tokens // self._spec.block_size)
        profile = self._spec.profile
        num_bytes = num_blocks * self._spec.block_size * profile.kv_bytes_per_token
        self._timeline.after(profile.transfer_s(num_bytes), self._end_pull, sequence)

    def _end_pull(self, sequence: ScheduledSequence) -> None:
        run = self._runs[sequence]
        replica = self.replicas[run.placement.decode]
        replica.scheduler.end_transfer(sequence, sequence.digest)
        replica.wake()
        self._release(run)

    def _release(self, run: Run) -> None:
        """Free prefill's blocks, which are no longer needed."""
        if run.prefill is not None:
            assert run.placement.prefill is not None
            del self._runs[run.prefill]
            self.replicas[run.placement.prefill].cancel(run.prefill)
            run.prefill = None

    def _give_out(self, sequences: list[ScheduledSequence]) -> None:
        """Record the tokens that decode has computed."""
        now, runs, gaps = self._timeline.now, self._runs, self.result.itl_s
        for sequence in sequences:
            run = runs[sequence]
            if run.last_token_at is None:
                self._first_token(run, sequence)
            else:
                gaps.append(now - run.last_token_at)
            run.last_token_at = now
            if sequence.finish_reason is not None:
                self._end(run, sequence)

    def _first_token(self, run: Run, sequence: ScheduledSequence) -> None:
        placement, result, ttft_s = run.placement, self.result, self._timeline.now - run.arrived_at
        is_local = placement.prefill is None
        if is_local:
            self.replicas[placement.decode].queued_tokens -= queued_tokens(run)
        self._release(run)  # for the case that decode had all of it cached and pulled nothing
        result.ttft_s.append(ttft_s)
        result.num_local += is_local
        result.prompt_tokens += sequence.prompt_tokens
        result.cached_tokens += sequence.cached_tokens if is_local else run.prefill_cached_tokens
        result.transferred_tokens += sequence.transferred_tokens
        if placement.predicted_ttft_s is not None:
            result.predicted_to_actual.append(placement.predicted_ttft_s / ttft_s)
        placement.first_token(self._report(run, sequence))

    def _report(self, run: Run, sequence: ScheduledSequence) -> PrefillReport:
        """Return the report that the sim engine and its worker would give."""
        prefill = run.placement.prefill
        return PrefillReport(
            kind="remote" if sequence.transferred_tokens else "local",
            reason="already_cached" if prefill and not sequence.transferred_tokens else "",
            prefill_replica=prefill if sequence.transferred_tokens else None,
            decode_replica=run.placement.decode,
            cached_tokens=max(run.prefill_cached_tokens, sequence.cached_tokens),
            transferred_tokens=sequence.transferred_tokens,
            transport="sim" if sequence.transferred_tokens else "",
            prefill_s=run.handed_off_at - run.arrived_at if prefill else None,
            prefill_cached_tokens=run.prefill_cached_tokens if prefill else None,
        )

    def _end(self, run: Run, sequence: ScheduledSequence) -> None:
        del self._runs[sequence]
        self.replicas[run.placement.decode].num_sequences -= 1
        self.result.num_ended += 1
        run.placement.end()


def queued_tokens(run: Run) -> int:
    """Return how many tokens a run adds to the queue of the replica that computes its prompt."""
    return max(0, len(run.request.prompt_token_ids) - run.placement.expected_cached_tokens)


def spread_out(requests: list[Request]) -> list[Request]:
    """Spread the requests of each recorded moment evenly over the time until the next moment.

    Mooncake's conversation trace is recorded in steps of 3 s: some ten requests have the same timestamp.
    """
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request.at_s)]
    moments = [group[0].at_s for group in groups]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    gaps.append(gaps[-1] if gaps else 0.0)
    return [
        msgspec.structs.replace(request, at_s=request.at_s + gap * index / len(group))
        for group, gap in zip(groups, gaps, strict=True)
        for index, request in enumerate(group)
    ]


def prompt_tokens(request: Request) -> list[int]:
    """Return token ids that are the same for pieces with the same number, and differ otherwise."""
    starts = ((number * MOONCAKE_BLOCK_TOKENS, length) for number, length in request.pieces)
    return list(chain.from_iterable(range(start, start + length) for start, length in starts))
