"""One simulated replica of a fleet in virtual time: a sim engine's scheduler, and what it tells the frontends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from app.engines.sim.profile import SimProfile
from app.engines.sim.scheduler import ScheduledSequence, Scheduler, SchedulerLimits, Step
from app.kv_cache.event_translator import EventTranslator
from app.messages import KvUpdate, ReplicaInfo, ReplicaLoad, Role
from app.pace import Pace
from app.recent_load import RecentLoad
from benchmarks.routing.policies import FleetAssignment, Policy
from benchmarks.routing.timeline import Timeline

MAX_MODEL_LEN = 131_072
POLL_S = 0.01
"""How often a busy replica publishes its load besides its changes, as in deployments/replica/publisher.py."""


class FleetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there are, and the settings of each."""

    profile: SimProfile
    num_prefill: int = 8
    num_decode: int = 8
    num_blocks: int
    """The KV blocks of each replica."""
    block_size: int
    max_model_len: int = MAX_MODEL_LEN
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    """Both as in the runs that the profile h200-llama-8b was fitted to: what vLLM 0.32 takes by default for engine
    arguments that say nothing of their use (app/engines/vllm.py), on any GPU."""
    message_s: float = 0.001
    """How long load and cache updates take to a frontend: one way through a channel."""
    num_frontends: int = 1
    """Each has a router of its own, and they are dealt the requests in turn."""
    pace_error: float = 1.0
    """How many times as slow as it is each replica says that it is (`ReplicaInfo.pace`)."""
    first_use_s: float = 0.0
    """How much longer each replica's first prompt takes, and the first transfer between each pair."""

    def names(self, role: Role) -> list[str]:
        """Return the ids of a pool's replicas."""
        return [f"{role}-{index}" for index in range(self.num_prefill if role == "prefill" else self.num_decode)]

    def pace(self, error: float = 1.0) -> Pace:
        """Return the pace of each replica, `error` times as slow as it is."""
        prefill, step = self.profile.prefill, self.profile.step
        return Pace(
            prefill_base_s=error * prefill.base_s,
            prefill_s_per_token=error * prefill.per_token_s,
            prefill_s_per_token_squared=error * prefill.per_token_squared_s,
            step_base_s=error * step.base_s,
            step_s_per_sequence=error * step.per_sequence_s,
            step_s_per_kv_token=error * step.per_kv_token_s,
            chunk_tokens=self.max_num_batched_tokens,
        )


class Run(msgspec.Struct, eq=False):
    """One request under way."""

    number: int
    prompt: list[int]
    output_tokens: int
    arrived_at: float
    assignment: FleetAssignment
    replica: str = ""
    """The replica that decodes; empty until it is known."""
    prefill: FleetSequence | None = None
    """The sequence on prefill; None once its blocks were freed."""
    prefill_cached_tokens: int = 0
    prefill_began_at: float = 0.0
    prefill_ended_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float = 0.0
    decoding_since: float | None = None
    """When its replica began to count it as decoding."""

    @property
    def expected_cached_tokens(self) -> int:
        return self.assignment.expected_cached_tokens

    @property
    def queued_tokens(self) -> int:
        """How many tokens the run adds to the queue of the replica that computes its prompt."""
        return max(0, len(self.prompt) - self.expected_cached_tokens)


class FleetSequence(ScheduledSequence):
    """A sequence on one engine, with the run that it belongs to."""

    __slots__ = ("run",)

    def __init__(
        self, run: Run, tokens: list[int], *, max_tokens: int, is_handoff: bool = False, is_pulled: bool = False
    ) -> None:
        priority = run.assignment.level if is_handoff else 0
        super().__init__(tokens, max_tokens=max_tokens, priority=priority, is_handoff=is_handoff, is_pulled=is_pulled)
        self.run = run


class Replica:
    """One engine.  It steps as long as there is something to compute."""

    def __init__(
        self,
        role: Role,
        name: str,
        spec: FleetSpec,
        timeline: Timeline,
        begin_pull: Callable[[FleetSequence], None],
        take_outputs: Callable[[Replica, Sequence[FleetSequence]], None],
        frontends: Sequence[Policy],
    ) -> None:
        """`take_outputs` gets what each step has computed.  The replica publishes to `frontends` that have its pool."""
        self.name = name
        self.role = role
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
        self.num_blocks = spec.num_blocks
        self.num_sequences = 0
        self.queued_tokens = 0
        self.busy_s = 0.0
        self.num_prompts = self.computed_tokens = 0
        """Of all prompts that were computed here."""
        self._queued_s = 0.0
        self._num_prefilling = 0
        self._num_decoding = 0
        self._num_kv_tokens = 0
        self._num_expected_tokens = 0
        self._num_given = 0
        self._num_generated = 0
        self._timeline = timeline
        self._begin_pull = begin_pull
        self._take_outputs = take_outputs
        self._is_stepping = False
        self._first_use_s = spec.first_use_s
        self._frontends = [frontend for frontend in frontends if role in frontend.pools]
        self._message_s = spec.message_s
        self._told = (0, 0, 0)
        self._will_poll = False
        self._pace = spec.pace(spec.pace_error)
        self._recent = RecentLoad(self._pace, lambda: timeline.now)
        self._translator = EventTranslator(num_blocks=spec.num_blocks, block_size=spec.block_size)
        if self._frontends:
            self.scheduler.pool.take_events()  # from here on they are recorded
        for frontend in self._frontends:
            frontend.pools[role].join(self._info(spec))

    def _info(self, spec: FleetSpec) -> ReplicaInfo:
        return ReplicaInfo(
            replica_id=self.name,
            role=self.role,
            model="sim",
            engine="sim",
            engine_version="",
            node_ip=f"node-of-{self.name}",
            pid=0,
            num_blocks=spec.num_blocks,
            block_size_tokens=spec.block_size,
            max_model_len=spec.max_model_len,
            prefix_cache="published",
            max_sequences=spec.max_num_seqs,
            pace=self._pace,
        )

    def add(self, sequence: FleetSequence) -> None:
        self.scheduler.add(sequence)
        self.wake()

    def cancel(self, sequence: FleetSequence) -> None:
        self.scheduler.cancel(sequence)
        self.wake()  # others may wait for its blocks

    def enter_prompt(self, run: Run) -> None:
        """Count a prompt that is to be computed here."""
        self._num_prefilling += 1
        self.queued_tokens += run.queued_tokens
        self._queued_s += self._pace.compute_s(len(run.prompt), run.expected_cached_tokens)

    def leave_prompt(self, run: Run) -> None:
        """Stop counting a prompt, which is computed."""
        self.num_prompts += 1
        self.computed_tokens += run.queued_tokens
        self._num_prefilling -= 1
        self.queued_tokens -= run.queued_tokens
        self._queued_s -= self._pace.compute_s(len(run.prompt), run.expected_cached_tokens)
        if not self._num_prefilling:
            self._queued_s = 0.0  # without the rounding errors

    def expect(self, run: Run) -> None:
        """Count a sequence that is to decode here."""
        self.num_sequences += 1
        self._num_expected_tokens += len(run.prompt)

    def begin_decoding(self, run: Run, num_tokens: int) -> None:
        """Count a sequence, `num_tokens` long, that gets a token with each step from now on."""
        run.decoding_since = self._timeline.now
        self._num_decoding += 1
        self._num_expected_tokens -= len(run.prompt)
        self._num_kv_tokens += num_tokens

    def count_tokens(self, num: int) -> None:
        """Count the tokens that a step gave to sequences that had one already."""
        self._num_given += num
        self._num_generated += num
        self._num_kv_tokens += num

    def end_sequence(self, run: Run, num_tokens: int) -> None:
        """Stop counting a sequence that has ended, `num_tokens` long."""
        self.num_sequences -= 1
        if run.decoding_since is None:
            self._num_expected_tokens -= len(run.prompt)
        else:
            self._num_decoding -= 1
            self._num_kv_tokens -= num_tokens
            self._num_generated -= run.output_tokens
            self._recent.on_sequence_end(self._timeline.now - run.decoding_since, run.output_tokens)

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
            assert isinstance(sequence, FleetSequence)
            self._begin_pull(sequence)
        duration_s = step.duration_s
        if self._num_prefilling:
            duration_s += self._first_use_s
            self._first_use_s = 0.0
        self.busy_s += duration_s
        self._timeline.after(duration_s, self._end_step, step)

    def _end_step(self, step: Step) -> None:
        self._take_outputs(self, step.outputs)  # type: ignore[arg-type]  # all of them were added as FleetSequence
        self.tell()
        self._step()

    def tell(self) -> None:
        """Publish the changes of the load and of the prefix cache, if there are any."""
        if not self._frontends:
            return
        counts = (self.num_sequences, self.queued_tokens, self._num_decoding)
        if counts != self._told:
            self._told = counts
            self._publish_load()
            self._poll_later()
        if events := self.scheduler.pool.take_events():
            self._timeline.after(self._message_s, self._deliver_kv, self._translator.apply(events))

    def _poll_later(self) -> None:
        if not self._will_poll:
            self._will_poll = True
            self._timeline.after(POLL_S, self._poll)

    def _poll(self) -> None:
        """Publish the load as it is, and go on while there is any."""
        self._will_poll = False
        self._publish_load()
        if self.num_sequences or self.scheduler.num_used_blocks:
            self._poll_later()

    def _publish_load(self) -> None:
        recent = self._recent
        recent.update(
            is_prefilling=self._num_prefilling > 0,
            decoding=self._num_decoding,
            kv_tokens=self._num_kv_tokens,
            num_tokens=self._num_given,
        )
        load = ReplicaLoad(
            self.num_sequences,
            self.queued_tokens,
            self.scheduler.num_used_blocks,
            self._num_decoding,
            self._queued_s,
            recent.prefill_share,
            recent.slowness,
            recent.window_s,
            recent.growth_tokens(self._num_decoding, self._num_generated),
            round(recent.output_tokens),
            self._num_kv_tokens + self._num_expected_tokens,
        )
        self._timeline.after(self._message_s, self._deliver_load, load)

    def _deliver_load(self, load: ReplicaLoad) -> None:
        for frontend in self._frontends:
            frontend.pools[self.role].on_load(self.name, load)

    def _deliver_kv(self, update: KvUpdate) -> None:
        for frontend in self._frontends:
            frontend.pools[self.role].on_kv(self.name, update)
