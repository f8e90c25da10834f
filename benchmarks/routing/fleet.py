"""A fleet of sim engines in virtual time: no sockets, no event loop, the same numbers for the same seed.

1. A request arrives at one of the frontends, and its policy places it in no time, or keeps it until there is room.
2. After the time of a call, the prefill replica's scheduler computes the prompt and keeps its blocks.  It samples the
   first token, which goes out after the time of the descriptor's way to decode (docs/decisions/0021-first-token.md).
3. The decode replica pulls what it has not cached.  The profile gives the time for that, whatever else moves at the
   same time.  Then prefill's blocks are freed, and decode's scheduler gives out the other tokens.
4. A prompt that is prefilled locally goes to the replica that decodes at once.
5. A replica publishes its load and the changes of its prefix cache as in production (benchmarks/routing/replica.py).

So the production router runs here, on the sim engine's scheduler and caches.  Network and frontend are left out but for
the times in 2, and for those that a prompt spends in an engine besides its steps.  The answers in later prompts are
left out too: a trace gives the blocks of a turn's whole prompt, but not which of them the turn before has generated, so
decode cannot reuse these.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, groupby, pairwise
from typing import Literal

import msgspec

from app.bench.workload import MOONCAKE_BLOCK_TOKENS, Request
from app.messages import GenerateRequest, PrefillReport, Role, local_prefill
from benchmarks.routing.policies import FleetAssignment, Policy
from benchmarks.routing.replica import FleetSequence, FleetSpec, Replica, Run
from benchmarks.routing.timeline import Timeline

ROLES: tuple[Role, ...] = ("prefill", "decode")
FIRST_TOKEN = 0
"""What the sim engines of a fleet sample, whose vocabulary is this one token."""

Way = Literal["remote", "on decode", "on prefill"]
"""Prefilled on one replica and decoded on another, or served whole on a replica of one of the two pools."""


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What became of one request."""

    number: int
    """Of the request, in the order of their arrival."""
    arrived_at: float
    way: Way | None
    """None if it was refused."""
    ttft_s: float
    """From its arrival to its first token, or to its refusal."""
    tpot_s: float = 0.0
    """(last token - first token) / (tokens - 1); 0 for a single token."""
    ended_at: float = 0.0


class FleetResult(msgspec.Struct, kw_only=True):
    """The results over all requests.  TTFTs are in the order of the first tokens."""

    ttft_s: array[float]
    itl_s: array[float]
    """The gap before each token except a request's first."""
    outcomes: list[Outcome] = []
    """In the order in which the requests ended."""
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
    """When the last request ended."""
    prefill_utilisation: float = 0.0
    """The share of the time until the last request's end in which a replica computes: the mean over the pool."""
    decode_utilisation: float = 0.0


class Fleet:
    """The frontends, the replicas and the requests under way."""

    make_replica: type[Replica] = Replica

    def __init__(self, spec: FleetSpec, make_policy: Callable[[], Policy], timeline: Timeline) -> None:
        """Each frontend gets a policy of its own."""
        self._spec = spec
        self._timeline = timeline
        self._frontends = [make_policy() for _ in range(spec.num_frontends)]
        self._used_pairs: set[tuple[str, str]] = set()
        self.replicas = {
            name: self.make_replica(role, name, spec, timeline, self._begin_pull, self._take_outputs, self._frontends)
            for role in ROLES
            for name in spec.names(role)
        }
        self.result = FleetResult(
            ttft_s=array("d"), itl_s=array("d"), reasons=Counter(), predicted_to_actual=array("d")
        )

    def run(self, requests: list[Request]) -> FleetResult:
        """Serve `requests` until the last one has ended."""
        timeline, result = self._timeline, self.result
        for number, request in enumerate(requests):
            timeline.at(request.at_s, self._arrive, number, request)
        timeline.run()
        result.prefill_utilisation = self._utilisation("prefill")
        result.decode_utilisation = self._utilisation("decode")
        return result

    def _utilisation(self, role: Role) -> float:
        names = self._spec.names(role)
        return sum(self.replicas[name].busy_s for name in names) / max(1, len(names)) / max(1e-9, self.result.end_s)

    def _arrive(self, number: int, request: Request) -> None:
        generate = GenerateRequest(
            request_id=str(number),
            prompt_token_ids=prompt_tokens(request),
            sampling={"max_tokens": request.output_tokens},
        )
        arrived_at = self._timeline.now

        def start(assignment: FleetAssignment) -> None:
            self._start(Run(number, generate.prompt_token_ids, request.output_tokens, arrived_at, assignment))

        def refuse() -> None:
            self.result.num_refused += 1
            self.result.outcomes.append(Outcome(number, arrived_at, None, self._timeline.now - arrived_at))

        self._frontends[number % len(self._frontends)].arrive(generate, start, refuse)

    def _start(self, run: Run) -> None:
        assignment = run.assignment
        self.result.reasons[assignment.reason] += 1
        if assignment.prefill is None:
            self._choose_replica(run, assignment.decode)
            replica = self.replicas[run.replica]
            self._compute_prompt(run, replica, FleetSequence(run, run.prompt, max_tokens=run.output_tokens))
            return
        if assignment.choose_decode is None:
            self._choose_replica(run, assignment.decode)
            self.replicas[run.replica].tell()
        self._timeline.after(self._spec.profile.latency.prefill_call_s, self._prefill, run, assignment.prefill)

    def _choose_replica(self, run: Run, name: str) -> None:
        """Count a sequence on the replica that decodes it."""
        run.replica = name
        self.replicas[name].expect(run)

    def _prefill(self, run: Run, name: str) -> None:
        replica = self.replicas[name]
        run.prefill = FleetSequence(run, run.prompt, max_tokens=1, is_handoff=True)
        run.prefill_began_at = self._timeline.now
        replica.num_sequences += 1
        self._compute_prompt(run, replica, run.prefill)

    def _compute_prompt(self, run: Run, replica: Replica, sequence: FleetSequence) -> None:
        replica.enter_prompt(run)
        replica.tell()
        self._timeline.after(self._spec.profile.latency.engine_s, replica.add, sequence)

    def _take_outputs(self, replica: Replica, sequences: Sequence[FleetSequence]) -> None:
        """Take what a step of `replica` has computed: prompts for others, and tokens."""
        now, gaps = self._timeline.now, self.result.itl_s
        num_given = 0
        for sequence in sequences:
            run = sequence.run
            if sequence.is_handoff:
                self._hand_off(replica, run, sequence)
                continue
            if run.first_token_at is None:
                replica.leave_prompt(run)
                self._first_token(run, sequence.cached_tokens)
            else:
                gaps.append(now - run.last_token_at)
            run.last_token_at = now
            if run.decoding_since is None:
                replica.begin_decoding(run, len(sequence.tokens))
                self._release(run)  # for the case that decode had all of it cached and pulled nothing
            else:
                num_given += 1
            if sequence.finish_reason is not None:
                self._end(run, len(sequence.tokens))
        replica.count_tokens(num_given)

    def _hand_off(self, replica: Replica, run: Run, sequence: FleetSequence) -> None:
        """Send a prompt's descriptor, with the first token, to the replica that decodes."""
        replica.num_sequences -= 1
        replica.leave_prompt(run)
        run.prefill_cached_tokens = sequence.cached_tokens
        run.prefill_ended_at = self._timeline.now
        if run.assignment.choose_decode is not None:
            self._choose_replica(run, run.assignment.choose_decode())
            self.replicas[run.replica].tell()
        self._timeline.after(self._spec.profile.latency.delivery_s, self._deliver, run)

    def _deliver(self, run: Run) -> None:
        """Give out prefill's first token, and let decode compute the others."""
        self._first_token(run, run.prefill_cached_tokens)
        if run.output_tokens == 1:
            self._release(run)
            self._end(run, len(run.prompt))
            return
        tokens = [*run.prompt, FIRST_TOKEN]
        self.replicas[run.replica].add(FleetSequence(run, tokens, max_tokens=run.output_tokens - 1, is_pulled=True))

    def _begin_pull(self, sequence: FleetSequence) -> None:
        run, spec = sequence.run, self._spec
        num_tokens = sequence.transferred_tokens - 1  # prefill has no KV of the first token
        self.result.transferred_tokens += num_tokens
        num_bytes = -(-num_tokens // spec.block_size) * spec.block_size * spec.profile.kv_bytes_per_token
        seconds = spec.profile.transfer_s(num_bytes)
        pair = run.assignment.prefill or "", run.replica
        if pair not in self._used_pairs:
            self._used_pairs.add(pair)
            seconds += spec.first_use_s
        self._timeline.after(seconds, self._end_pull, sequence, num_tokens, seconds)

    def _end_pull(self, sequence: FleetSequence, num_tokens: int, seconds: float) -> None:
        sequence.run.assignment.pulled(num_tokens, seconds)
        replica = self.replicas[sequence.run.replica]
        replica.scheduler.end_transfer(sequence, sequence.digest)
        replica.wake()
        self._release(sequence.run)

    def _release(self, run: Run) -> None:
        """Free prefill's blocks, which are no longer needed."""
        if run.prefill is not None:
            assert run.assignment.prefill is not None
            self.replicas[run.assignment.prefill].cancel(run.prefill)
            run.prefill = None

    def _first_token(self, run: Run, cached_tokens: int) -> None:
        """Record the first token; `cached_tokens` were cached where the prompt was computed."""
        assignment, result = run.assignment, self.result
        run.first_token_at = run.last_token_at = self._timeline.now
        ttft_s = run.first_token_at - run.arrived_at
        result.ttft_s.append(ttft_s)
        result.num_local += assignment.prefill is None
        result.prompt_tokens += len(run.prompt)
        result.cached_tokens += cached_tokens
        if assignment.predicted_ttft_s is not None:
            result.predicted_to_actual.append(assignment.predicted_ttft_s / ttft_s)
        assignment.first_token(_report(run, cached_tokens))

    def _end(self, run: Run, num_tokens: int) -> None:
        """Stop counting a run that has ended with `num_tokens` tokens on the replica that decodes."""
        assignment, replica = run.assignment, self.replicas[run.replica]
        assert run.first_token_at is not None
        replica.end_sequence(run, num_tokens)
        replica.tell()
        self.result.num_ended += 1
        self.result.end_s = self._timeline.now
        way: Way = "remote" if assignment.prefill else "on prefill" if replica.role == "prefill" else "on decode"
        tpot_s = (run.last_token_at - run.first_token_at) / max(1, run.output_tokens - 1)
        ttft_s = run.first_token_at - run.arrived_at
        self.result.outcomes.append(Outcome(run.number, run.arrived_at, way, ttft_s, tpot_s, self._timeline.now))
        assignment.end()


def _report(run: Run, cached_tokens: int) -> PrefillReport:
    """Return the report that comes with the first token."""
    if run.assignment.prefill is None:
        return local_prefill(run.replica, cached_tokens)
    return PrefillReport(
        kind="remote",
        reason="",
        prefill_replica=run.assignment.prefill,
        decode_replica=run.replica,
        cached_tokens=cached_tokens,
        transferred_tokens=None,
        transport="sim",
        prefill_s=run.prefill_ended_at - run.prefill_began_at,
        prefill_cached_tokens=cached_tokens,
    )


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
