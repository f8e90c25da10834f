"""An engine without weights behind the `Engine` protocol: a scheduler and a timing profile, in real time.

1. `_drive` lets the scheduler compute a step, lets the step's time (divided by `speed_up`) pass, then emits all of
   its tokens in one turn of the event loop.
2. `prefill` keeps the prompt's blocks under a lease; the descriptor says at which port they can be had.
3. If a fault makes it hang, its watch notices after a while, as that of an engine in a process of its own.
4. `generate` with a descriptor pulls them there (app/engines/sim/transfer.py).  Its tokens depend on what arrived, so
   the KV of another prompt gives other tokens.

It accepts sampling parameters that can have no effect here, for instance temperature, and refuses those whose result
would be false.  ``transfer.required_transport`` does not apply, because nothing moves by UCX.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app import __version__
from app.background import BackgroundTasks
from app.engines.base import EngineInfo, EngineSpec
from app.engines.progress import ProgressWatch
from app.engines.prompt_queue import Leave, PromptQueue
from app.engines.sim.faults import Fault, FaultKind, FaultPlan
from app.engines.sim.profile import load_profile
from app.engines.sim.scheduler import ScheduledSequence, Scheduler, SchedulerLimits, Step
from app.engines.sim.tokens import ModelFacts, make_logprobs, read_model_facts
from app.engines.sim.transfer import HandoffServer, TransferFailed, release, take
from app.engines.transport import NamedTransport, TransportWatch
from app.errors import BatonError, ConfigError, EngineDead, EngineFailed, InvalidRequest
from app.messages import (
    Emit,
    EngineStats,
    GenerateRequest,
    KvEvent,
    PrefillReport,
    PrefixCache,
    TokenDelta,
    TransferDescriptor,
    local_prefill,
)

logger = logging.getLogger("baton.engines.sim")

TRANSPORT = "sim"

MAX_LAG_S = 0.1
"""How far steps may fall behind, and then catch up, if this process gets the CPU too late."""

HONOURED = {"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "seed", "logprobs"}
WITHOUT_EFFECT = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "extra_args",
    "flat_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
}
"""Sampling parameters that every answer satisfies, because the tokens follow no distribution."""


class SimArgs(BaseModel):
    """``engine_args`` of ``engine: sim``.  Arguments that vLLM has too have vLLM's names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str = "h200-llama-8b"
    """A built-in timing profile (app/engines/sim/profiles) or the path of a YAML file."""
    speed_up: float | Literal["max"] = Field(default=1.0)
    """How many times faster than the profile; ``max``: as fast as this process can."""
    seed: int = 0
    """The seed of tokens and of faults."""
    startup_s: float = Field(default=0.0, ge=0)
    """How long the engine takes to be ready."""
    num_blocks: int = Field(default=8192, gt=0)
    """KV blocks (vLLM finds this out itself, from the GPU's memory)."""
    block_size: int = Field(default=16, gt=0)
    """The number of tokens in a KV block."""
    max_model_len: int | None = Field(default=None, gt=1)
    """By default what the model was made for, or what fits into the blocks if that is less."""
    max_num_seqs: int = Field(default=256, gt=0)
    """The most sequences in one step."""
    max_num_batched_tokens: int = Field(default=2048, gt=0)
    """The most tokens that one step computes; longer prompts are computed in chunks."""
    enable_prefix_caching: bool = True
    kv_events: bool = True
    """Whether it publishes what its prefix cache holds, as vLLM and SGLang do."""
    faults: list[Fault] = []

    @field_validator("speed_up", mode="before")
    @classmethod
    def _some_speed(cls, speed_up: Any) -> Any:
        if speed_up == "max" or (isinstance(speed_up, int | float) and speed_up > 0):
            return speed_up
        raise ValueError(f"a number above 0, or max, got {speed_up!r}")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.max_model_len is not None and self.max_model_len > self.num_blocks * self.block_size:
            raise ValueError(f"max_model_len {self.max_model_len} is more than num_blocks * block_size")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(f"max_num_seqs {self.max_num_seqs} is above max_num_batched_tokens")
        return self


def parse_args(engine_args: dict[str, Any]) -> SimArgs:
    """Return the validated arguments.  Raises ConfigError, which names the first wrong one."""
    try:
        arguments = SimArgs.model_validate(engine_args)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in ("engine_args", *problem["loc"]))
        words = "the sim engine knows no such argument" if problem["type"] == "extra_forbidden" else problem["msg"]
        raise ConfigError(field, words.removeprefix("Value error, ")) from None
    load_profile(arguments.profile)
    return arguments


class _Run(msgspec.Struct):
    """A request that the engine works on."""

    sequence: ScheduledSequence
    ended: asyncio.Future[None]
    leave_queue: Leave
    emit: Emit | None = None
    descriptor: TransferDescriptor | None = None
    num_logprobs: int | None = None
    fault: Fault | None = None
    pull: asyncio.Task[None] | None = None
    is_reported: bool = False
    has_changed_kv: bool = False
    """Whether the KV that arrived was not what prefill computed, so that it is not used."""

    def fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class SimEngine:
    """One simulated engine."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._args = parse_args(spec.engine_args)
        self._profile = load_profile(self._args.profile)
        self._faults = FaultPlan(self._args.faults, self._args.seed)
        self._runs: dict[ScheduledSequence, _Run] = {}
        self._wake = asyncio.Event()
        self.prompt_queue = PromptQueue()
        self.transport_watch: TransportWatch = NamedTransport(TRANSPORT)
        self._prefix_cache: PrefixCache = "none"
        if self._args.enable_prefix_caching:
            self._prefix_cache = "published" if self._args.kv_events else "silent"
        self._kv_changed = asyncio.Event()
        self._handoffs = HandoffServer(self._free)
        self._tasks: set[asyncio.Task[None]] = set()
        self._background = BackgroundTasks(f"replica_id={spec.replica_id}", self._die)
        self._progress = ProgressWatch(self._ask, _NoProcesses())
        self._death: EngineDead | None = None
        self._is_hung = False
        self._num_transfers = 0
        self._num_failed_transfers = 0
        self._checks: Counter[bool] = Counter()
        """How often KV was compared with what prefill computed, by whether it was that."""
        self._transferred_bytes = 0
        self._transfer_s = 0.0

    async def start(self) -> EngineInfo:
        arguments = self._args
        facts = await asyncio.to_thread(read_model_facts, self._spec.model_path)
        self._limits = self._choose_limits(facts)
        self._vocabulary = facts.vocabulary
        self._scheduler = Scheduler(self._limits, self._profile, facts.vocabulary, arguments.seed)
        if self._prefix_cache == "published":
            self._scheduler.pool.take_events()  # records them from now on
        if self._spec.is_disaggregated:
            await self._handoffs.start(self._spec.kv_host, self._spec.kv_port)
        await asyncio.sleep(arguments.startup_s)
        self._background.need("sim-steps", self._drive)
        self._background.keep("sim-progress", self._progress.run)
        return EngineInfo(
            engine="sim",
            version=__version__,
            num_blocks=arguments.num_blocks,
            block_size_tokens=arguments.block_size,
            max_model_len=self._limits.max_model_len,
            chunk_tokens=self._limits.max_num_batched_tokens,
            max_sequences=self._limits.max_num_seqs,
            prefix_cache=self._prefix_cache,
        )

    def _choose_limits(self, facts: ModelFacts) -> SchedulerLimits:
        arguments = self._args
        longest = min(facts.max_model_len, arguments.num_blocks * arguments.block_size)
        return SchedulerLimits(
            num_blocks=arguments.num_blocks,
            block_size=arguments.block_size,
            max_model_len=arguments.max_model_len or longest,
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            enable_prefix_caching=arguments.enable_prefix_caching,
        )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _drive(self) -> None:
        """Step until it hangs, and then for ever do nothing."""
        clock = _Clock(self._args.speed_up)
        while not self._is_hung:
            step = self._scheduler.step()
            if self._prefix_cache == "published" and self._scheduler.pool.has_events:
                self._kv_changed.set()
            if step is None:
                self._wake.clear()
                await self._wake.wait()
                clock.restart()
                continue
            for sequence in step.pulls:
                self._begin_pull(self._runs[sequence])
            slow = self._faults.strike("slow_step")
            await clock.let_pass(step.duration_s * (slow.factor if slow else 1.0))
            self._hand_out(step)
            self._progress.on_step()
        await asyncio.Event().wait()

    async def _ask(self) -> None:
        """Answer at once, even during a step, unless a fault has made the engine hang."""
        if self._is_hung:
            await asyncio.Event().wait()

    def _hand_out(self, step: Step) -> None:
        runs = self._runs
        for sequence in step.outputs:
            run = runs.get(sequence)
            if run is None or run.ended.done():  # cancelled while the step ran
                continue
            if run.fault is not None and self._commit(run, run.fault):
                continue
            if run.emit is not None:
                reason = sequence.finish_reason
                delta = TokenDelta(sequence.tokens[-1:], reason)
                if not run.is_reported or reason is not None or run.num_logprobs is not None:
                    delta = self._complete(run, delta)
                run.emit(delta)
                if reason is None:
                    continue
            run.ended.set_result(None)

    def _complete(self, run: _Run, delta: TokenDelta) -> TokenDelta:
        """Return `delta` with what only some deltas have: the report, logprobs, the token that stopped the sequence."""
        sequence = run.sequence
        token = delta.token_ids[0]
        report = None
        if not run.is_reported:
            run.is_reported = True
            run.leave_queue(is_computed=True)
            report = self._report(run)
        logprobs = None
        if run.num_logprobs is not None:
            assert sequence.stream is not None
            position = len(sequence.tokens)
            logprobs = make_logprobs(self._vocabulary, token, run.num_logprobs, sequence.stream, position)
        stop_reason = token if delta.finish_reason == "stop" else None
        return TokenDelta([token], delta.finish_reason, stop_reason, logprobs, None, report)

    def _report(self, run: _Run) -> PrefillReport:
        sequence, descriptor = run.sequence, run.descriptor
        if descriptor is None or not sequence.transferred_tokens:
            reason = ""
            if descriptor is not None:
                reason = "already_cached" if run.pull is None else "transfer_failed"
                if run.has_changed_kv:
                    reason = "kv_changed"
            return local_prefill(self._spec.replica_id, sequence.cached_tokens, reason)
        return PrefillReport(
            kind="remote",
            reason="",
            prefill_replica=descriptor.replica_id,
            decode_replica=self._spec.replica_id,
            cached_tokens=max(descriptor.cached_tokens, sequence.cached_tokens),
            transferred_tokens=sequence.transferred_tokens,
            transport=TRANSPORT,
        )

    def _commit(self, run: _Run, fault: Fault) -> bool:
        """Make `fault` happen if its time has come, and return whether it did."""
        num_tokens = 1 if run.sequence.is_handoff else len(run.sequence.tokens) - run.sequence.prompt_tokens
        if num_tokens <= fault.after_tokens:
            return False
        if fault.kind == "engine_death":
            self._die(EngineDead("an injected fault ended the engine"))
        elif fault.kind == "hang":
            self._is_hung = True
        else:
            run.fail(EngineFailed(f"injected: {fault.kind}"))
        return True

    def _die(self, death: EngineDead) -> None:
        self._death = self._death or death
        self._is_hung = True
        self._kv_changed.set()
        for run in self._runs.values():
            run.fail(self._death)
        self._handoffs.stop()

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        began = time.monotonic()
        sequence = self._to_sequence(request, {"max_tokens": 1}, is_handoff=True, priority=request.priority)
        await self._run(request, sequence, "prefill_error")
        return TransferDescriptor(
            engine="sim",
            replica_id=self._spec.replica_id,
            request_id=request.request_id,
            prompt_tokens=sequence.prompt_tokens,
            cached_tokens=sequence.cached_tokens,
            ready_at=time.time(),
            lease_s=self._spec.transfer_lease_s,
            params={
                "host": self._spec.kv_host,
                "port": self._handoffs.port,
                "handle": self._handoffs.keep(sequence, self._spec.transfer_lease_s),
                "num_blocks": len(sequence.blocks),
                "num_bytes": self._num_bytes(sequence.prompt_tokens),
                "checksum": sequence.kv_digest if random.random() < self._spec.transfer_checksum_rate else None,
            },
            prefill_s=time.monotonic() - began,
        )

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        try:
            sequence = self._to_sequence(request, request.sampling, is_pulled=descriptor is not None)
        except BatonError:
            if descriptor is not None:
                self._spawn(self.release(request.request_id, descriptor), "sim-release")
            raise
        num_logprobs = request.sampling.get("logprobs")
        await self._run(request, sequence, "decode_error", emit=emit, descriptor=descriptor, num_logprobs=num_logprobs)

    async def _run(
        self, request: GenerateRequest, sequence: ScheduledSequence, fault: FaultKind, **fields: Any
    ) -> None:
        """Run one sequence to its end or to its handoff.  Cancelling frees its blocks."""
        self._raise_if_dead()
        ended = asyncio.get_running_loop().create_future()
        struck = self._faults.strike(fault, "engine_death", "hang") if request.is_load else None
        leave_queue = self.prompt_queue.enter(request, fields.get("descriptor"))
        run = _Run(sequence, ended, leave_queue, fault=struck, **fields)
        self._runs[sequence] = run
        self._scheduler.add(sequence)
        self._wake.set()
        try:
            await ended
            leave_queue(is_computed=True)
        except BaseException:
            self._free(sequence)
            raise
        finally:
            del self._runs[sequence]
            leave_queue()
            if run.pull is not None:
                run.pull.cancel()
            if run.descriptor is not None and (run.pull is None or not run.pull.done()):
                self._spawn(self.release(request.request_id, run.descriptor), "sim-release")

    def _free(self, sequence: ScheduledSequence) -> None:
        self._scheduler.cancel(sequence)
        self._wake.set()  # others may wait for its blocks

    def _to_sequence(self, request: GenerateRequest, sampling: dict[str, Any], **fields: Any) -> ScheduledSequence:
        """Return the scheduler's sequence for a request.  Raises InvalidRequest for what this engine cannot do."""
        self._raise_if_dead()
        for name in sampling:
            if name not in HONOURED and name not in WITHOUT_EFFECT:
                raise InvalidRequest(f"{name} is not supported by the sim engine")
        if (sampling.get("logprobs") or 0) < 0:
            raise InvalidRequest("logprobs: the sim engine has no log probabilities of the whole vocabulary")
        longest = self._limits.max_model_len
        num_tokens = len(request.prompt_token_ids)
        if not 0 < num_tokens < longest:
            raise InvalidRequest(
                f"the prompt has {num_tokens} tokens; with one token of output it must fit into the {longest} of "
                "max_model_len"
            )
        max_tokens = sampling.get("max_tokens", 16)
        return ScheduledSequence(
            request.prompt_token_ids,
            max_tokens=longest if max_tokens is None else max_tokens,
            min_tokens=sampling.get("min_tokens", 0),
            num_replayed=0 if fields.get("is_handoff") else request.num_replayed,
            stop_token_ids=sampling.get("stop_token_ids") or (),
            # Greedy output has no seed, as in vLLM.
            sampling_seed=sampling.get("seed") if sampling.get("temperature", 1.0) else None,
            cache_salt=request.cache_salt,
            **fields,
        )

    def _begin_pull(self, run: _Run) -> None:
        run.pull = self._spawn(self._pull(run), "sim-pull")

    async def _pull(self, run: _Run) -> None:
        """Fetch one sequence's KV and tell the scheduler what arrived."""
        sequence, descriptor = run.sequence, run.descriptor
        assert descriptor is not None
        num_bytes = self._num_bytes(sequence.transferred_tokens)
        duration_s = self._profile.transfer_s(num_bytes)
        kv_digest = None
        try:
            if self._faults.strike("transfer_failure"):
                await self.release(descriptor.request_id, descriptor)
                raise TransferFailed("injected")
            arrived = await take(**_address(descriptor), duration_s=_scaled(duration_s, self._args.speed_up))
            if self._faults.strike("kv_change"):
                arrived ^= 1
            self._num_transfers += 1
            self._transferred_bytes += num_bytes
            self._transfer_s += duration_s
            if self._is_right(arrived, descriptor):
                kv_digest = arrived
            else:
                run.has_changed_kv = True
        except TransferFailed as error:
            logger.warning("the KV of a prompt did not arrive, it is computed here: %s", error)
            self._num_failed_transfers += 1
        finally:
            self._scheduler.end_transfer(sequence, kv_digest)
            self._wake.set()

    def _is_right(self, kv_digest: int, descriptor: TransferDescriptor) -> bool:
        """Whether KV is what prefill computed, as far as the descriptor tells."""
        if (checksum := descriptor.params.get("checksum")) is None:
            return True
        is_right = bool(kv_digest == checksum)
        self._checks[is_right] += 1
        if not is_right:
            logger.error(
                "request_id=%s the KV that %s has read from %s is not what was computed there, and is computed anew",
                *(descriptor.request_id, self._spec.replica_id, descriptor.replica_id),
            )
        return is_right

    def _num_bytes(self, num_tokens: int) -> int:
        """Return the bytes of the blocks that hold `num_tokens`; only whole blocks move."""
        num_blocks = -(-num_tokens // self._args.block_size)
        return num_blocks * self._args.block_size * self._profile.kv_bytes_per_token

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        """Free the KV from the decode side; only a decode engine can.

        When `prefill` returns, all KV has been computed, and its engine keeps it until a decode engine tells it.
        """
        if descriptor is not None:
            await release(**_address(descriptor))

    async def stats(self) -> EngineStats:
        self._raise_if_dead()
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=self._limits.num_blocks,
            num_used_blocks=scheduler.num_used_blocks,
            num_transfers=self._num_transfers,
            num_failed_transfers=self._num_failed_transfers,
            transferred_bytes=self._transferred_bytes,
            transfer_s=self._transfer_s,
            num_expired_handoffs=self._handoffs.num_expired,
            num_checksum_matches=self._checks[True],
            num_checksum_mismatches=self._checks[False],
            transport=TRANSPORT if self._num_transfers else "",
        )

    async def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        while self._prefix_cache == "published" and self._death is None:
            await self._kv_changed.wait()
            self._kv_changed.clear()
            if self._scheduler.pool.has_events:
                yield self._scheduler.pool.take_events()

    async def check_health(self) -> None:
        self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise self._death

    async def stop(self) -> None:
        if self._death is None:
            self._die(EngineDead("the engine was stopped"))
        await self._background.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _NoProcesses:
    """What `ProgressWatch` finds of an engine that is part of this process."""

    def look(self) -> None: ...

    def stopped(self) -> list[int]:
        return []

    def cpu_s(self) -> float:
        return 0.0


class _Clock:
    """Lets modelled time pass `speed_up` times as fast as real time."""

    def __init__(self, speed_up: float | Literal["max"]) -> None:
        self._speed_up = speed_up
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time()

    def restart(self) -> None:
        """Start again after a pause that is not part of the modelled time."""
        self._now = self._loop.time()

    async def let_pass(self, seconds: float) -> None:
        """Return when modelled `seconds` have passed since the last call returned, at the earliest in the next turn.

        Timers are late by up to a millisecond, so the next call makes up for this one's delay.
        """
        if self._speed_up == "max":
            await asyncio.sleep(0)
            return
        self._now = max(self._now + seconds / self._speed_up, self._loop.time() - MAX_LAG_S)
        await asyncio.sleep(max(0.0, self._now - self._loop.time()))


def _scaled(seconds: float, speed_up: float | Literal["max"]) -> float:
    return 0.0 if speed_up == "max" else seconds / speed_up


def _address(descriptor: TransferDescriptor) -> dict[str, Any]:
    return {name: descriptor.params[name] for name in ("host", "port", "handle")}
