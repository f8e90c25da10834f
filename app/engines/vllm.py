"""vLLM behind the `Engine` protocol, on a GPU or a CPU.

1. `start` sets the environment that vLLM reads, then starts vLLM's engine core in a process of its own.
2. `_pump` takes each engine step's outputs and hands them to the requests that they belong to.
3. `prefill` runs the prompt for one token with ``do_remote_decode``; vLLM's NixlConnector then keeps the blocks
   under a lease and returns where they lie: the descriptor's `params`.
4. `generate` on the decode side gives those `params` back to vLLM, which reads the blocks over NIXL.
5. The first token is the one that prefill sampled, where that is the one that decode would sample (SAMPLED_BY_PREFILL).
   It goes out before the KV is pulled, and for vLLM's decode engine it is the prompt's last token.  Otherwise prefill's
   token is dropped, and decode computes the last prompt token again and samples the first token itself.
6. Of some requests the descriptor has checksums of the KV, and decode compares (plugins/nixl_checksum.py).

This uses vLLM's engine-core client rather than AsyncLLM, for two reasons.  The frontend detokenizes, so AsyncLLM would
do that work a second time.  And only the core's outputs tell local from transferred tokens.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec

from app.background import BackgroundTasks
from app.engine_defaults import cpu_defaults
from app.engines.base import EngineInfo, EngineSpec
from app.engines.kv_events import KvEventFeed, follow
from app.engines.plugins import cpu_waits, nixl_pull, vllm_resume
from app.engines.plugins.nixl_checksum import CHECKSUMS, SUMS_METHOD
from app.engines.plugins.owner_watch import owner_environment
from app.engines.plugins.vllm_resume import REPLAYED
from app.engines.processes import EngineProcesses
from app.engines.progress import ProgressWatch
from app.engines.prompt_queue import PromptQueue
from app.engines.transport import watch_transport
from app.engines.vllm_surface import (
    A_QUESTION,
    ASK_FOR_HANDOFF,
    ENDED_BY_AN_ERROR,
    SCHEDULED,
    ConnectorStats,
    Core,
    CoreRequest,
    InputProcessor,
    LogprobsLists,
    Output,
    PullTimes,
    SchedulerStats,
    VllmConfig,
    check_environment,
    check_names,
    dead_error,
    kv_checks,
    late_reads,
    pull_times,
    rejection,
    start_core,
)
from app.errors import ConfigError, EngineDead, EngineFailed, InvalidRequest
from app.messages import (
    Emit,
    EngineStats,
    GenerateRequest,
    HopPhase,
    KvEvent,
    Logprobs,
    PrefillReport,
    TokenDelta,
    TransferDescriptor,
    local_prefill,
)
from app.sampling_ranges import check_request, check_tokenized

logger = logging.getLogger("baton.engines.vllm")

SAMPLED_BY_PREFILL = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "ignore_eos",
        "stop_token_ids",
        "logprobs",
        "logit_bias",
        "allowed_token_ids",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    }
)
"""The sampling parameters with which prefill may sample the first token, as their effect on a token does not depend on
how many were generated before it.  With any other, and with a seed for random sampling, decode has to know which tokens
it has generated: penalties, structured output, min_tokens and the like."""


TRANSFER_BLOCK_TOKENS = 128
"""The tokens of a KV block where KV moves between GPUs, unless `engine_args` says so.

In a full cache a prompt's blocks are scattered, and each is read by itself.  With vLLM's 16 tokens the reads of one
prompt keep decode's loop busy for 10 to 50 ms: at 10 prompts of 4,096 tokens a second its tokens came every 8.6 ms, and
with 128 every 6.0 (docs/benchmarks/2026-11-28-goodput.md).  All of vLLM's kernels for plain attention take it."""


CHECKSUM_TIMEOUT_S = 5.0
"""How long a handoff waits for the checksums of its KV, which take milliseconds, or for the step before them to end."""


def samples_first_token(sampling: dict[str, Any]) -> bool:
    """Whether prefill samples the first token of an answer as decode would have."""
    names = set(sampling)
    if sampling.get("temperature") == 0.0:
        names.discard("seed")
    return names <= SAMPLED_BY_PREFILL


def build_engine_args(spec: EngineSpec) -> Any:
    """Return vLLM's ``AsyncEngineArgs`` for `spec`.  Raises ConfigError for an argument that vLLM does not know."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    # Where sequences decode, one that vLLM preempts for want of KV would wait behind all that come of higher priority.
    order = {"scheduling_policy": "priority"} if spec.role == "prefill" else {}
    arguments = {**order, **cpu_defaults(spec.device), **spec.engine_args}
    transfer = None
    if spec.is_disaggregated:
        transfer = KVTransferConfig(
            kv_connector="NixlConnector",
            # Each may change its role.  Only as a consumer vLLM keeps steps that still run from writing into blocks
            # into which KV is being read (`defer_block_free`), so a mere producer could not decode.
            kv_role="kv_producer" if arguments.get("prefill_context_parallel_size", 1) > 1 else "kv_both",
            kv_buffer_device=spec.device,
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "backends": spec.transfer_backends,
                "kv_lease_duration": spec.transfer_lease_s,
            },
        )
    try:
        made = AsyncEngineArgs(
            model=spec.model_path,
            tensor_parallel_size=spec.tensor_parallel_size,
            kv_transfer_config=transfer,
            **arguments,
        )
    except TypeError as error:
        raise ConfigError("engine_args", f"vLLM refuses them: {error}") from error
    moves_between_gpus = spec.is_disaggregated and spec.device == "cuda"
    if moves_between_gpus and made.block_size is None and _has_plain_attention(made.create_model_config()):
        made.block_size = TRANSFER_BLOCK_TOKENS
    return made


def _has_plain_attention(model_config: Any) -> bool:
    """Whether any size of block will do: latent attention has kernels of one size, and hybrids align theirs."""
    return not (model_config.use_mla or model_config.is_hybrid)


def to_sampling_params(
    sampling: dict[str, Any], kv_transfer_params: dict[str, Any] | None, num_replayed: int = 0
) -> Any:
    """Return vLLM's SamplingParams for one sequence whose tokens are detokenized elsewhere.

    The last `num_replayed` tokens of its prompt are output.

    Raises InvalidRequest if vLLM refuses them.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    fields = dict(sampling)
    extra_args = dict(fields.pop("extra_args", None) or {})
    if kv_transfer_params is not None:
        extra_args["kv_transfer_params"] = kv_transfer_params
    if num_replayed:
        extra_args[REPLAYED] = num_replayed
    try:
        if structured := fields.get("structured_outputs"):
            fields["structured_outputs"] = StructuredOutputsParams(**structured)
        return SamplingParams(
            **fields,
            extra_args=extra_args or None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (VLLMClientError, TypeError, ValueError) as error:
        raise InvalidRequest(str(error)) from error


class _Running(msgspec.Struct):
    """A request that the engine core works on."""

    on_output: Callable[[Output, _Running], None]
    ended: asyncio.Future[None]
    began_at: float
    """When it was handed to this adapter; like `pull`, of the monotonic clock."""
    pull: PullTimes | None = None
    """When its KV was pulled."""
    is_late: bool = False
    """Whether that was after prefill's lease, so that the KV was not used."""
    is_in_core: bool = True
    """Whether the engine core may still work on it."""
    changed_blocks: set[int] = msgspec.field(default_factory=set)
    """The blocks whose KV was not what prefill computed, so that it was not used; the prompt's last one is -1."""

    def fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class VllmEngine:
    """One vLLM engine core and the requests that run on it."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self.transport_watch = watch_transport(spec.required_transport, spec.transfer_backends, "get", spec.device)
        self._core: Core | None = None
        self._input_processor: InputProcessor
        self._vocab_size = 0
        self._running: dict[str, _Running] = {}
        self.prompt_queue = PromptQueue()
        self._kv_feed: KvEventFeed | None = None
        self._tasks = BackgroundTasks(f"replica_id={spec.replica_id}", self._die)
        self._processes = EngineProcesses()
        self._progress = ProgressWatch(self._ask, self._processes, is_on_gpu=spec.device == "cuda")
        self._death: EngineDead | None = None
        self._scheduler_stats: SchedulerStats | None = None
        self._moved = ConnectorStats()
        self._checks: Counter[str] = Counter()
        """How often KV was compared with what prefill computed, by the result."""
        self._can_sample = not spec.engine_args.get("logits_processors")  # these may look at what was generated

    async def start(self) -> EngineInfo:
        os.environ.update(self._environment())
        # Loading takes from seconds to many minutes.  It runs in a thread, as the loop must go on answering Serve.
        self._core, self._input_processor = await asyncio.to_thread(self._start_core)
        self._processes.look()
        self._tasks.need("vllm-pump", self._pump)
        self._tasks.keep("vllm-progress", self._progress.run)
        import vllm

        config = self._live_core().vllm_config
        self._vocab_size = config.model_config.get_vocab_size()
        return EngineInfo(
            engine="vllm",
            version=vllm.__version__,
            num_blocks=config.cache_config.num_gpu_blocks,
            block_size_tokens=config.cache_config.block_size,
            max_model_len=config.model_config.max_model_len,
            chunk_tokens=config.scheduler_config.max_num_batched_tokens,
            max_sequences=config.scheduler_config.max_num_seqs,
            prefix_cache="published" if self._kv_feed is not None else "none",
        )

    def _environment(self) -> dict[str, str]:
        spec = self._spec
        environment = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": spec.kv_host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(spec.kv_port),
            "VLLM_NO_USAGE_STATS": "1",
            **self.transport_watch.environment(),
            **owner_environment(),
            **vllm_resume.ENVIRONMENT,
        }
        if spec.is_disaggregated and spec.role != "aggregated":
            environment |= nixl_pull.environment(spec.device)
        if spec.device == "cpu":
            # Binding threads to cores makes every replica on a machine fight for the same ones.
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # vLLM compiles a logprobs helper even when eager: 17 s for the first request that asks for them.
            environment["TORCHDYNAMO_DISABLE"] = "1"
            environment.update(cpu_waits.ENVIRONMENT)
        return environment

    def _start_core(self) -> tuple[Core, InputProcessor]:
        from vllm.config import KVEventsConfig

        check_names(is_disaggregated=self._spec.is_disaggregated)
        check_environment(self._environment())
        config: VllmConfig = build_engine_args(self._spec).create_engine_config()
        if config.cache_config.enable_prefix_caching:  # by default it depends on the model
            self._kv_feed = KvEventFeed()
            config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, **self._kv_feed.publisher)
        return start_core(config)

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        began = time.monotonic()
        check_request(request, self._vocab_size)
        if request.num_replayed:  # vLLM's decode takes KV of a prompt, not of output
            prompt = request.prompt_token_ids[: -request.num_replayed]
            request = msgspec.structs.replace(request, prompt_token_ids=prompt)
        # The control run has to show in tokens that decode computes from the wrong KV.
        is_sampled = (
            request.prefill_mode != "corrupted"
            and not request.num_replayed  # max_tokens and others count what was generated
            and self._can_sample
            and samples_first_token(request.sampling)
        )
        sampling = {**request.sampling, "max_tokens": 1} if is_sampled else {"max_tokens": 1, "temperature": 0.0}
        outputs: list[Output] = []
        leave_queue = self.prompt_queue.enter(request)
        try:
            params = to_sampling_params(sampling, dict(ASK_FOR_HANDOFF))
            await self._run(request, params, lambda output, _: outputs.append(output))
            leave_queue(is_computed=True)
        finally:
            leave_queue()
        last = outputs[-1]
        if last.kv_transfer_params is None:
            raise EngineFailed("prefill ended without a transfer descriptor")
        transfer = last.kv_transfer_params
        if random.random() < self._spec.transfer_checksum_rate:
            transfer = {**transfer, CHECKSUMS: await self._checksums(request, transfer["remote_block_ids"])}
        return TransferDescriptor(
            engine="vllm",
            replica_id=self._spec.replica_id,
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=last.prefill_stats.num_cached_tokens if last.prefill_stats else 0,
            ready_at=time.time(),
            lease_s=self._spec.transfer_lease_s,
            params=transfer,
            prefill_s=time.monotonic() - began,
            first_token=self._first_token(request, last) if is_sampled else None,
        )

    async def _checksums(self, request: GenerateRequest, block_ids: list[list[int]]) -> list[Any]:
        """Return what the workers say of the KV in these blocks; empty if they do not.

        To cancel this is too late: prefill holds the KV, and only whoever has the descriptor can have it freed.
        """
        core = self._live_core()
        try:
            async with asyncio.timeout(CHECKSUM_TIMEOUT_S):
                return await core.collective_rpc_async(SUMS_METHOD, args=(block_ids,))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except Exception:
            logger.exception("request_id=%s there are no checksums of its KV", request.request_id)
        return []

    def _first_token(self, request: GenerateRequest, output: Output) -> TokenDelta | None:
        """Return the token that prefill sampled; None if it is not the one after the whole prompt.

        For some models (Mamba, multi-token prediction) vLLM's prefill leaves the end of the prompt to decode.
        """
        num_tokens = len(request.prompt_token_ids)
        assert output.kv_transfer_params is not None
        if output.kv_transfer_params.get("remote_num_tokens") != num_tokens:
            return None
        delta = _to_delta(output, None)
        max_model_len = self._max_model_len()
        is_last = request.sampling.get("max_tokens") == 1 or num_tokens + 1 >= max_model_len
        if delta.finish_reason == "length" and not is_last:
            return msgspec.structs.replace(delta, finish_reason=None)
        return delta

    def _max_model_len(self) -> int:
        return self._live_core().vllm_config.model_config.max_model_len

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        async with self._releasing_if_it_fails(request, descriptor):
            check_request(request, self._vocab_size)
            pull = _pull_params(descriptor) if descriptor else None
            params = to_sampling_params(request.sampling, pull, request.num_replayed)
        if request.num_replayed and params.max_tokens is None:  # vLLM would fill in what is left after these tokens
            params.max_tokens = self._max_model_len() - len(request.prompt_token_ids) + request.num_replayed
        if descriptor is not None and (first := descriptor.first_token) is not None:
            self._live_core()
            if first.finish_reason is not None:
                await self.release(request.request_id, descriptor)
            emit(self._to_first_delta(descriptor, first))
            if first.finish_reason is not None:
                return
            request = msgspec.structs.replace(request, prompt_token_ids=request.prompt_token_ids + first.token_ids)
            if params.max_tokens is not None:
                params.max_tokens -= 1
        if request.priority and "scheduling_policy" not in self._spec.engine_args:
            # Only prompts for other replicas have an order of ours.
            request = msgspec.structs.replace(request, priority=0)
        leave_queue = self.prompt_queue.enter(request, descriptor)
        is_first = True

        def on_output(output: Output, running: _Running) -> None:
            nonlocal is_first
            report = None
            if is_first:
                is_first = False
                leave_queue(is_computed=True)
                report = self._report(output, running, descriptor)
            emit(_to_delta(output, report))

        try:
            await self._run(request, params, on_output, descriptor)
        finally:
            leave_queue()

    @asynccontextmanager
    async def _releasing_if_it_fails(
        self, request: GenerateRequest, descriptor: TransferDescriptor | None
    ) -> AsyncIterator[None]:
        """Free the KV on prefill if the block fails or is cancelled, as the engine core will not pull it then."""
        try:
            yield
        except BaseException:
            with suppress(EngineDead):
                await self.release(request.request_id, descriptor)
            raise

    def _to_first_delta(self, descriptor: TransferDescriptor, token: TokenDelta) -> TokenDelta:
        """Return the delta with the token that prefill sampled.  If it is the last one too, no KV is pulled."""
        report = PrefillReport(
            kind="remote",
            reason="",
            prefill_replica=descriptor.replica_id,
            decode_replica=self._spec.replica_id,
            cached_tokens=descriptor.cached_tokens,
            transferred_tokens=0 if token.finish_reason is not None else None,
            transport="",
        )
        return msgspec.structs.replace(token, report=report)

    def _report(self, output: Output, running: _Running, descriptor: TransferDescriptor | None) -> PrefillReport:
        stats = output.prefill_stats
        local = stats.num_local_cached_tokens if stats else 0
        transferred = stats.num_external_cached_tokens if stats else 0
        if descriptor is None or not transferred:
            reason = ""
            if descriptor is not None:
                reason = "already_cached" if local else "transfer_failed"
                if running.is_late:
                    reason = "descriptor_expired"
                if running.changed_blocks:
                    reason = "kv_changed"
                    self._tell_change(running.changed_blocks, descriptor)
            return local_prefill(self._spec.replica_id, local, reason)
        return PrefillReport(
            kind="remote",
            reason="",
            prefill_replica=descriptor.replica_id,
            decode_replica=self._spec.replica_id,
            cached_tokens=max(descriptor.cached_tokens, local),
            transferred_tokens=transferred,
            transport=self.transport_watch.transport,
            phases=_phases(running, output, time.monotonic()),
        )

    def _tell_change(self, blocks: set[int], descriptor: TransferDescriptor) -> None:
        logger.error(
            "request_id=%s the KV that %s has read from %s is not what was computed there, and is computed anew: "
            "%d blocks differ, counted from the prompt's end %s",
            *(descriptor.request_id, self._spec.replica_id, descriptor.replica_id, len(blocks), sorted(blocks)),
        )

    async def _run(
        self,
        request: GenerateRequest,
        params: Any,
        on_output: Callable[[Output, _Running], None],
        descriptor: TransferDescriptor | None = None,
    ) -> None:
        """Run one request in the engine core, which pulls the KV of `descriptor`.  Cancelling aborts it."""
        core = self._live_core()
        began_at = time.monotonic()
        async with self._releasing_if_it_fails(request, descriptor):
            if params.structured_outputs is None:
                core_request = self._process(request, params)
            else:  # a grammar is translated, which can take a second; the loop serves other requests meanwhile
                core_request = await asyncio.to_thread(self._process, request, params)
        core_request.reasoning_ended = request.reasoning_ended
        core_request.reasoning_parser_kwargs = request.reasoning_parser_kwargs
        self._input_processor.assign_request_id(core_request)
        core_id = core_request.request_id
        running = _Running(on_output, asyncio.get_running_loop().create_future(), began_at)
        self._running[core_id] = running
        try:
            await self._add(core_request)
            await running.ended  # no deadline: `_die` ends it if the engine does nothing any more
        finally:
            del self._running[core_id]
            if running.is_in_core and self._death is None:
                await core.abort_requests_async([core_id])

    async def _add(self, core_request: CoreRequest) -> None:
        """Give the engine core a request.  Raises EngineDead, also before `_pump` has heard of it."""
        try:
            await self._live_core().add_request_async(core_request)
        except dead_error():
            raise EngineDead from None

    def _process(self, request: GenerateRequest, params: Any) -> CoreRequest:
        """Have vLLM check and complete a request.  Raises InvalidRequest if vLLM refuses it or its workers would."""
        from vllm.exceptions import VLLMClientError

        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt_token_ids}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        try:
            processed = self._input_processor.process_inputs(
                request.request_id, prompt, params, supported_tasks=("generate",), priority=request.priority
            )
        except (VLLMClientError, ValueError) as error:
            raise InvalidRequest(str(error)) from error
        check_tokenized(processed.sampling_params.all_stop_token_ids, processed.sampling_params.bad_words_token_ids)
        return processed

    async def _pump(self) -> None:
        """Hand out the outputs of each engine step until the engine core dies.  Raises EngineDead then."""
        EngineDeadError = dead_error()
        core = self._live_core()
        try:
            while True:
                step = await core.get_output_async()
                self._progress.on_step()
                if step.scheduler_stats is not None:
                    self._record(step.scheduler_stats)
                for output in step.outputs:
                    # An aborted request may still be in the step that was running.
                    if running := self._running.get(output.request_id):
                        _hand_out(output, running)
        except EngineDeadError:
            raise EngineDead from None

    async def _ask(self) -> None:
        """Return when the engine core has answered, which it does between two steps."""
        try:
            await self._live_core().call_utility_async(A_QUESTION)
        except dead_error():
            raise EngineDead from None

    def _record(self, stats: SchedulerStats) -> None:
        self._scheduler_stats = stats
        if stats.kv_connector_stats:
            self._moved.add(stats.kv_connector_stats)
            for request_id, times in pull_times(stats.kv_connector_stats).items():
                if running := self._running.get(request_id):
                    running.pull = times.merge(running.pull)
            for request_id in late_reads(stats.kv_connector_stats):
                if running := self._running.get(request_id):
                    running.is_late = True
            for check in kv_checks(stats.kv_connector_stats):
                self._checks[check.result] += 1
                if running := self._running.get(check.request_id):
                    running.changed_blocks.update(check.positions)

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        """Free the KV from the decode side; only a decode engine can.

        When `prefill` returns, all KV has been computed, and its engine keeps it until a decode engine tells it.
        """
        if descriptor is None:
            return
        await self._add(rejection(descriptor))

    async def stats(self) -> EngineStats:
        num_blocks = self._live_core().vllm_config.cache_config.num_gpu_blocks
        scheduler = self._scheduler_stats
        moved = self._moved
        return EngineStats(
            num_running=scheduler.num_running_reqs if scheduler else 0,
            num_waiting=scheduler.num_waiting_reqs if scheduler else 0,
            num_blocks=num_blocks,
            num_used_blocks=round(scheduler.kv_cache_usage * num_blocks) if scheduler else 0,
            num_transfers=moved.num_transfers,
            num_failed_transfers=int(moved.num_failed_transfers + moved.num_failed_handshakes),
            transferred_bytes=int(moved.bytes_transferred),
            transfer_s=moved.transfer_duration,
            num_expired_handoffs=int(moved.num_kv_expired_reqs),
            num_checksum_matches=self._checks["match"],
            num_checksum_mismatches=self._checks["mismatch"],
            num_checksums_skipped=self._checks["skipped"],
            transport=self.transport_watch.transport,
        )

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        return follow(self._kv_feed)

    async def check_health(self) -> None:
        """Raise EngineDead if the core has ended, hangs, or nobody hands its outputs out."""
        if self._live_core().resources.engine_dead:
            raise EngineDead

    def _live_core(self) -> Core:
        """Return the engine core.  Raises EngineDead before it was started and after it was stopped."""
        if self._core is None or self._death is not None:
            raise self._death or EngineDead("the engine has not been started")
        return self._core

    def _end(self, death: EngineDead) -> None:
        self._death = self._death or death
        for running in self._running.values():
            running.fail(self._death)

    def _die(self, death: EngineDead) -> None:
        """Fail what runs, and end the processes: nobody reads any more what they put out, and they may be stopped."""
        self._end(death)
        self._processes.kill()

    async def stop(self) -> None:
        self._end(EngineDead("the engine was stopped"))
        await self._tasks.stop()
        self._processes.look()  # its workers are nobody's descendants once the core has ended
        if self._core is not None:
            core, self._core = self._core, None
            await asyncio.to_thread(core.shutdown, 2.0)
        self._processes.kill()
        if self._kv_feed is not None:
            self._kv_feed.close()


def _hand_out(output: Output, running: _Running) -> None:
    """Give a request its output.  If that cannot be taken, this request fails and is aborted, and no other."""
    running.is_in_core = not output.finished
    if running.ended.done():  # cancelled, but its task has not run yet
        return
    if str(output.finish_reason) == ENDED_BY_AN_ERROR:
        running.fail(EngineFailed("vLLM ended the request with an internal error"))
        return
    try:
        running.on_output(output, running)
    except Exception as error:
        logger.exception("an output was not taken")
        running.fail(EngineFailed(f"an output was not taken: {type(error).__name__}"))
        return
    if output.finished:
        running.ended.set_result(None)


def _pull_params(descriptor: TransferDescriptor) -> dict[str, Any]:
    """Return the ``kv_transfer_params`` with which decode pulls the KV that prefill holds."""
    return {**descriptor.params, "remote_num_tokens": descriptor.prompt_tokens}


def _phases(running: _Running, output: Output, now: float) -> dict[HopPhase, float]:
    """Return how long the parts of the hop took that the engine knows of."""
    pull = running.pull
    scheduled = next((event.timestamp for event in output.events or () if event.type.name == SCHEDULED), None)
    if pull is None or scheduled is None:
        return {}
    return {
        "admission": pull.began - running.began_at,
        "connection": pull.posted - pull.began,
        "transfer": pull.done - pull.posted,
        "next_step": scheduled - pull.done,
        "step": now - scheduled,
    }


def _to_delta(output: Output, report: PrefillReport | None) -> TokenDelta:
    reason = str(output.finish_reason) if output.finish_reason is not None else None
    prompt_logprobs = output.new_prompt_logprobs_tensors
    return TokenDelta(
        token_ids=output.new_token_ids,
        finish_reason=reason,  # type: ignore[arg-type]
        stop_reason=output.stop_reason,
        logprobs=_to_logprobs(output.new_logprobs) if output.new_logprobs is not None else None,
        prompt_logprobs=_to_logprobs(prompt_logprobs.tolists()) if prompt_logprobs is not None else None,
        report=report,
    )


def _to_logprobs(lists: LogprobsLists) -> Logprobs:
    return Logprobs(
        token_ids=lists.logprob_token_ids.tolist(),
        logprobs=lists.logprobs.tolist(),
        ranks=lists.sampled_token_ranks.tolist(),
    )
