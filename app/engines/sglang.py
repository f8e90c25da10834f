"""SGLang behind the `Engine` protocol, on a GPU or a CPU.

1. `start` sets the environment that SGLang reads, then starts its scheduler and detokenizer as processes.
2. In an aggregated engine, `generate` gives a request to SGLang and passes its tokens on.  RadixAttention reuses
   prefixes.
3. With prefill and decode apart, SGLang's two legs of a request meet in a *bootstrap room*.  `prefill` picks a new
   room, starts the prefill leg and returns at once; the descriptor has the room and the address of this engine's
   bootstrap server.  `generate` on the decode side enters the room and tells prefill where the KV goes.  Prefill
   computes the KV and writes it there over NIXL, together with the first token, which prefill samples.
4. If one leg ends early, SGLang tells the other one.  If decode never enters a room, `release` gives it up, or SGLang
   does after ``transfer.lease_s``.

SGLang's decode engine cannot prefill, so a transfer that fails raises `PrefillFailed`; another prefill replica may
succeed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import multiprocessing
import os
import random
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any

from app.background import BackgroundTasks
from app.engines import sglang_surface as surface
from app.engines.base import EngineInfo, EngineSpec
from app.engines.kv_events import KvEventFeed, follow
from app.engines.plugins import cpu_waits
from app.engines.plugins.owner_watch import owner_environment
from app.engines.processes import EngineProcesses
from app.engines.progress import ProgressWatch
from app.engines.prompt_queue import Leave, PromptQueue
from app.engines.sglang_sampling import Translation, translate
from app.engines.sglang_surface import Candidates, FinishReason, Load, MetaInfo, Output, TokenLogprob
from app.engines.transport import watch_transport
from app.errors import ConfigError, EngineDead, EngineFailed, InvalidRequest, PrefillFailed
from app.messages import (
    UNKNOWN_RANK,
    Emit,
    EngineStats,
    GenerateRequest,
    KvEvent,
    Logprobs,
    PrefillReport,
    PrefixCache,
    TokenDelta,
    TransferDescriptor,
    local_prefill,
)
from app.sampling_ranges import check_request

logger = logging.getLogger("baton.engines.sglang")

NO_DECODE_CACHE = ("disable_radix_cache", "enable_hisparse", "speculative_algorithm")
"""With any of these arguments, a decode engine has no prefix cache by default: it is not wanted, or SGLang refuses it.
(With speculative decoding SGLang refuses it only for some algorithms.  But the cache then holds pairs of tokens, and
events do not tell these.)"""

HEARTBEAT_S = 1.0
"""The time between two polls of each prefill engine by a decode engine.  After two that fail, it gives up all transfers
from that engine."""

CONNECT_TIMEOUT_S = 3.0
"""How long a prefill engine may take to accept a connection."""

LOAD_TIMEOUT_S = 2.0
"""How long it may take to read the load: the scheduler holds a lock on it for microseconds, unless it is stopped
meanwhile."""


def build_engine_args(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of SGLang's ``Engine`` (its ``ServerArgs``) for `spec`."""
    arguments: dict[str, Any] = {
        "model_path": spec.model_path,
        "tp_size": spec.tensor_parallel_size,
        "device": spec.device,
        "host": spec.kv_host or "127.0.0.1",
        "log_level": "warning",
        "incremental_streaming_output": True,
        "schedule_low_priority_values_first": True,  # vLLM's order
    }
    if spec.device == "cpu":
        arguments["sleep_on_idle"] = True  # otherwise an idle engine takes a core from busy ones
    if spec.is_disaggregated:
        arguments |= {
            "disaggregation_mode": spec.role,
            "disaggregation_transfer_backend": "nixl",
            "disaggregation_bootstrap_port": spec.kv_port,
            "disaggregation_enable_kv_checksum": spec.transfer_checksum_rate > 0,
        }
        if spec.transfer_checksum_rate > 0 and spec.device == "cpu":
            raise ConfigError("transfer.checksum_rate", "SGLang's checksums need a GPU: set 0")
        if spec.role == "decode":
            # Then only the new part of a conversation is transferred at its next turn.
            arguments["disaggregation_decode_enable_radix_cache"] = not any(map(spec.engine_args.get, NO_DECODE_CACHE))
            if spec.device == "cpu":
                # SGLang's default copies the KV of a request that it suspends from a GPU.
                arguments["disaggregation_decode_retraction_backup"] = "cpu_tensor"
    return {**arguments, **spec.engine_args}


def prefix_cache(arguments: dict[str, Any]) -> PrefixCache:
    """Return what is known of the prefix cache of an engine with these arguments.

    It is ``silent`` if its events name no salts, and with speculative decoding, because they then name pairs of tokens.
    """
    is_decode = arguments.get("disaggregation_mode") == "decode"
    if arguments.get("disable_radix_cache") or (
        is_decode and not arguments["disaggregation_decode_enable_radix_cache"]
    ):
        return "none"
    return "silent" if arguments.get("speculative_algorithm") or not surface.has_cache_salt() else "published"


class SglangEngine:
    """One SGLang engine and the requests that run on it.

    If one of its processes dies, SGLang ends this process too (SIGQUIT), and Serve replaces the replica.  If it hangs,
    its requests fail first.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self.transport_watch = watch_transport(
            spec.required_transport, spec.transfer_backends, "put" if spec.role == "prefill" else None, spec.device
        )
        self._engine: surface.Engine | None = None
        self._page_size = 1
        self._reached_at: dict[tuple[str, int], float] = {}
        self._vocab_size = 0
        self._eos_token_id: int | None = None
        self._kv_bytes_per_token = 0
        self._prefills: dict[str, asyncio.Task[None]] = {}
        self.prompt_queue = PromptQueue()
        self._kv_feed: KvEventFeed | None = None
        self._tasks = BackgroundTasks(f"replica_id={spec.replica_id}", self._die)
        self._processes = EngineProcesses()
        self._progress = ProgressWatch(
            self._ask, self._processes, lambda: bool(self._under_way), is_on_gpu=spec.device == "cuda"
        )
        self._under_way: set[asyncio.Timeout] = set()
        """One for each request that SGLang works on; it expires if the engine dies."""
        self._death: EngineDead | None = None
        self._reading: asyncio.Future[Sequence[Load]] | None = None
        self._num_transfers = 0
        self._num_failed_transfers = 0
        self._num_expired_handoffs = 0
        self._num_checksum_mismatches = 0
        self._transferred_bytes = 0

    async def start(self) -> EngineInfo:
        os.environ.update(self._environment())
        # Loading takes from seconds to many minutes.  It runs in a thread, as the loop must go on answering Serve.
        engine = self._engine = await asyncio.to_thread(self._start_engine)
        manager = engine.tokenizer_manager
        manager.auto_create_handle_loop()  # on this loop, which hands out the tokens
        self._page_size = engine.server_args.page_size or 1
        self._vocab_size = manager.model_config.vocab_size
        self._eos_token_id = getattr(manager.tokenizer, "eos_token_id", None)  # no tokenizer with skip_tokenizer_init
        self._kv_bytes_per_token = surface.kv_bytes_per_token(engine)
        self._processes.look()
        self._tasks.keep("sglang-progress", self._progress.run)
        return EngineInfo(
            engine="sglang",
            version=surface.version(),
            num_blocks=surface.num_kv_tokens(engine) // self._page_size,
            block_size_tokens=self._page_size,
            max_model_len=manager.context_len,
            chunk_tokens=_chunk_tokens(engine.server_args, manager.context_len),
            prefix_cache=prefix_cache(build_engine_args(self._spec)),
        )

    def _environment(self) -> dict[str, str]:
        spec = self._spec
        environment = {
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # before temperature and the like, as vLLM's
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": str(HEARTBEAT_S),
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(spec.transfer_lease_s),
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(math.ceil(spec.transfer_timeout_s)),
            **self.transport_watch.environment(),
            **owner_environment(),
        }
        if spec.transfer_backends:
            environment["SGLANG_DISAGGREGATION_NIXL_BACKEND"] = spec.transfer_backends[0]
        if spec.device == "cpu":
            environment |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                # SGLang compiles a helper for penalties: half a minute for the first request that has one.
                "TORCHDYNAMO_DISABLE": "1",
                # Sending a cached prefix ahead of the rest waits for a CUDA event.
                "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX": "0",
                **cpu_waits.ENVIRONMENT,
            }
        return environment

    def _start_engine(self) -> surface.Engine:
        arguments = build_engine_args(self._spec)
        surface.check_environment(self._environment())
        if self._spec.device == "cpu":
            cpu_waits.check_sglang()
        if prefix_cache(arguments) == "published":
            self._kv_feed = KvEventFeed()
            arguments["kv_events_config"] = json.dumps(self._kv_feed.publisher)
        try:
            return surface.launch(arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError("engine_args", f"SGLang refuses them: {error}") from error

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        room = {"host": self._spec.kv_host, "port": self._spec.kv_port, "room": random.getrandbits(62)}
        arguments = self._arguments(request, self._translate(request), room)
        leave_queue = self.prompt_queue.enter(request)  # SGLang only tells that this leg has ended
        task = asyncio.create_task(self._prefill(request.request_id, arguments, leave_queue))
        self._prefills[request.request_id] = task
        task.add_done_callback(lambda _: self._prefills.pop(request.request_id))
        task.add_done_callback(lambda _: leave_queue())
        return TransferDescriptor(
            engine="sglang",
            replica_id=self._spec.replica_id,
            request_id=request.request_id,
            prompt_tokens=len(request.prompt_token_ids),
            cached_tokens=0,  # not known yet: decode learns it together with the KV
            ready_at=time.time(),
            lease_s=self._spec.transfer_lease_s,
            params=room,
        )

    async def _prefill(self, request_id: str, arguments: dict[str, Any], leave_queue: Leave) -> None:
        """Run the prefill leg.  It goes on after `prefill` returned, until decode has the KV or will not fetch it."""
        is_computed = True
        try:
            async with aclosing(self._outputs(arguments)) as outputs:
                async for output in outputs:
                    if (abort := _abort_of(output)) is not None:
                        is_computed = False
                        self._num_expired_handoffs += surface.has_lease_run_out(abort)
                        logger.warning("request_id=%s prefill ended: %s", request_id, abort["message"])
            leave_queue(is_computed=is_computed)
        except InvalidRequest as error:  # decode refuses it too, and its answer is the one that counts
            logger.info("request_id=%s refused: %s", request_id, error)
        except Exception:
            logger.exception("request_id=%s prefill ended", request_id)

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        """End the prefill leg; only the prefill engine can.

        It computes nothing before decode enters the room, and decode has not entered it.
        """
        if (task := self._prefills.get(request_id)) is not None:
            task.cancel()

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        if self._spec.is_disaggregated and descriptor is None:
            raise PrefillFailed("there is no prefill to take the KV from")
        translation = self._translate(request)
        arguments = self._arguments(request, translation, descriptor.params if descriptor else None)
        if descriptor is not None:
            await self._check_reachable(descriptor)
        leave_queue = self.prompt_queue.enter(request, descriptor)
        is_first = True
        try:
            async with aclosing(self._outputs(arguments)) as outputs:
                async for output in outputs:
                    if (abort := _abort_of(output)) is not None:
                        raise self._failure(abort, descriptor if is_first else None)
                    report = self._report(request, descriptor, output["meta_info"]) if is_first else None
                    is_first = False
                    leave_queue(is_computed=True)
                    emit(_to_delta(output, translation, self._stop_reason(output, request), report))
        finally:
            leave_queue()

    def _stop_reason(self, output: Output, request: GenerateRequest) -> int | None:
        """Return the stop token by vLLM's rule: only one that the request names, and not the end-of-sequence token."""
        reason = output["meta_info"]["finish_reason"]
        matched = reason.get("matched") if reason else None
        is_named = matched in request.sampling.get("stop_token_ids", ())
        return matched if is_named and matched != self._eos_token_id else None

    def _translate(self, request: GenerateRequest) -> Translation:
        arguments = self._spec.engine_args
        self._check_token_ids("prompt", request.prompt_token_ids)
        check_request(request, self._vocab_size)
        if request.priority and not arguments.get("enable_priority_scheduling"):
            raise InvalidRequest("priority: the pool's engine_args lack enable_priority_scheduling")
        return translate(
            request.sampling,
            reasoning_ended=request.reasoning_ended,
            is_disaggregated=self._spec.is_disaggregated,
            is_deterministic=bool(arguments.get("enable_deterministic_inference")),
            has_reasoning_parser=bool(arguments.get("reasoning_parser")),
        )

    def _check_token_ids(self, name: str, token_ids: Collection[int]) -> None:
        """Refuse token ids that would crash SGLang's scheduler, and with it every request."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            raise InvalidRequest(f"{name}: token ids must be below {self._vocab_size}")

    def _arguments(
        self, request: GenerateRequest, translation: Translation, room: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the arguments of SGLang's ``async_generate``."""
        arguments: dict[str, Any] = {
            "input_ids": request.prompt_token_ids,
            "sampling_params": translation.sampling_params,
            "stream": True,
            # An abort ends every id that begins with its own.  All ids have the same length, so it ends only one.
            "rid": uuid.uuid4().hex,
            "cache_salt": request.cache_salt,
            "require_reasoning": translation.require_reasoning,
            **translation.logprob_arguments(),
        }
        if request.priority:
            arguments["priority"] = request.priority
        if room is not None:
            arguments |= {f"bootstrap_{name}": value for name, value in room.items()}
        return arguments

    async def _outputs(self, arguments: dict[str, Any]) -> AsyncGenerator[Output, None]:
        """Yield SGLang's outputs of one request.  Closing this early aborts the request.

        Raises InvalidRequest or EngineDead.
        """
        try:
            async with self._until_it_dies():
                outputs = await surface.generate(self._live_engine(), arguments)
                async with aclosing(outputs):
                    async for output in outputs:
                        self._progress.on_step()
                        yield output
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    @asynccontextmanager
    async def _until_it_dies(self) -> AsyncGenerator[None, None]:
        """Raise EngineDead in the block if the engine dies meanwhile: SGLang would let the request wait for ever."""
        death = asyncio.timeout(None)
        self._under_way.add(death)
        try:
            async with death:
                yield
        except TimeoutError:
            if not death.expired() or self._death is None:
                raise
            raise self._death from None
        finally:
            self._under_way.discard(death)

    async def _ask(self) -> None:
        """Return when the scheduler has answered, which it does between two batches."""
        await self._live_engine().tokenizer_manager.get_internal_state()

    async def _check_reachable(self, descriptor: TransferDescriptor) -> None:
        """Raise PrefillFailed if the prefill engine does not listen.  SGLang itself would try for many seconds."""
        address = (descriptor.params["host"], descriptor.params["port"])
        now = time.monotonic()
        if self._reached_at.get(address, -HEARTBEAT_S) + HEARTBEAT_S > now:
            return
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(*address)
        except (OSError, TimeoutError) as error:
            self._reached_at.pop(address, None)
            self._num_failed_transfers += 1
            raise PrefillFailed(f"prefill replica {descriptor.replica_id} does not listen: {error!r}") from error
        writer.close()
        self._reached_at[address] = now

    def _failure(self, abort: FinishReason, descriptor: TransferDescriptor | None) -> Exception:
        """Return the exception for a request that SGLang aborted.  `descriptor` is given if no token has come yet."""
        if abort.get("status_code") == HTTPStatus.BAD_REQUEST:
            return InvalidRequest(abort["message"])
        if descriptor is None:
            return EngineFailed(abort["message"])
        self._num_failed_transfers += 1
        if surface.has_kv_changed(abort):
            self._num_checksum_mismatches += 1
            logger.error(
                "request_id=%s the KV that %s has read from %s is not what was computed there, and is not used",
                *(descriptor.request_id, self._spec.replica_id, descriptor.replica_id),
            )
        return PrefillFailed(f"prefill replica {descriptor.replica_id}: {abort['message']}")

    def _report(
        self, request: GenerateRequest, descriptor: TransferDescriptor | None, meta_info: MetaInfo
    ) -> PrefillReport:
        """Return the report.  Its `transferred_tokens`, and `EngineStats.transferred_bytes`, are an upper bound.

        They count the whole prompt.  SGLang transfers less if decode has a beginning of the prompt cached, but does not
        tell how much: its ``cached_tokens`` are the greater of prefill's and decode's.
        """
        cached_tokens = meta_info["cached_tokens"]
        if descriptor is None:
            return local_prefill(self._spec.replica_id, cached_tokens)
        num_tokens = len(request.prompt_token_ids)
        self._num_transfers += 1
        self._transferred_bytes += num_tokens * self._kv_bytes_per_token
        return PrefillReport(
            kind="remote",
            reason="",
            prefill_replica=descriptor.replica_id,
            decode_replica=self._spec.replica_id,
            cached_tokens=cached_tokens,
            transferred_tokens=num_tokens,
            transport=self.transport_watch.transport,
        )

    async def stats(self) -> EngineStats:
        await self.check_health()
        loads = await self._read_loads()
        used_tokens = sum(load.num_used_tokens for load in loads)
        return EngineStats(
            num_running=sum(load.num_running_reqs for load in loads)
            + sum(load.disaggregation.prefill_inflight_queue_reqs for load in loads if load.disaggregation),
            num_waiting=sum(load.num_waiting_reqs for load in loads),
            num_held_up=sum(_held_up(load) for load in loads),
            num_blocks=sum(load.max_total_num_tokens for load in loads) // self._page_size,
            num_used_blocks=-(-used_tokens // self._page_size),
            num_transfers=self._num_transfers,
            num_failed_transfers=self._num_failed_transfers,
            transferred_bytes=self._transferred_bytes,
            num_expired_handoffs=self._num_expired_handoffs,
            num_checksum_mismatches=self._num_checksum_mismatches,
            transport=self.transport_watch.transport,
        )

    async def _read_loads(self) -> Sequence[Load]:
        """Return the load of each rank.  Raises EngineFailed if a scheduler does not let go of it."""
        if self._reading is None or self._reading.done():
            reader = self._live_engine().tokenizer_manager.load_snapshot_reader
            self._reading = asyncio.ensure_future(asyncio.to_thread(reader.read_all))
        await asyncio.wait([self._reading], timeout=LOAD_TIMEOUT_S)
        if not self._reading.done():
            raise EngineFailed(f"SGLang did not tell its load within {LOAD_TIMEOUT_S} s")
        return self._reading.result()

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        return follow(self._kv_feed)

    async def check_health(self) -> None:
        engine = self._live_engine()
        alive = {process.pid for process in multiprocessing.active_children()}
        if not alive.issuperset(engine.get_all_child_pids()):
            raise EngineDead

    def _live_engine(self) -> surface.Engine:
        """Return the engine.  Raises EngineDead before it was started, when it hangs, and after it was stopped."""
        if self._engine is None or self._death is not None:
            raise self._death or EngineDead("the engine does not run")
        return self._engine

    def _die(self, death: EngineDead) -> None:
        """Fail what runs, and end the processes, which may be stopped.

        SGLang's own watch ends this process then.  Until its next look the requests can tell why they failed.
        """
        self._death = death
        for request in self._under_way:
            request.reschedule(asyncio.get_running_loop().time())
        self._processes.kill()

    async def stop(self) -> None:
        await self._tasks.stop()
        for task in list(self._prefills.values()):
            task.cancel()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await asyncio.to_thread(engine.shutdown)  # kills all of its processes
        if self._kv_feed is not None:
            self._kv_feed.close()


def _chunk_tokens(arguments: surface.ServerArgs, context_len: int) -> int:
    """Return how many prompt tokens one step computes at most.  SGLang says -1 if prompts are not cut."""
    chunk_tokens = arguments.chunked_prefill_size or 0
    return chunk_tokens if chunk_tokens > 0 else context_len


def _held_up(load: Load) -> int:
    """Return how many requests decode lacks KV memory for, on decode itself or on a prefill engine waiting for it."""
    on_prefill = load.disaggregation.prefill_bootstrap_queue_reqs if load.disaggregation else 0
    return on_prefill + (load.queues.prealloc_ready if load.queues else 0)


def _abort_of(output: Output) -> FinishReason | None:
    """Return SGLang's reason if it aborted the request; otherwise None."""
    reason = output["meta_info"]["finish_reason"]
    return reason if reason is not None and reason["type"] == "abort" else None


def _to_delta(
    output: Output, translation: Translation, stop_reason: int | None, report: PrefillReport | None
) -> TokenDelta:
    meta_info = output["meta_info"]
    reason = meta_info["finish_reason"]
    logprobs = prompt_logprobs = None
    if translation.num_logprobs is not None:
        logprobs = _to_logprobs(
            meta_info["output_token_logprobs"], meta_info.get("output_top_logprobs"), translation.num_logprobs
        )
    if translation.num_prompt_logprobs is not None and report is not None:
        prompt_logprobs = _to_logprobs(
            meta_info["input_token_logprobs"], meta_info.get("input_top_logprobs"), translation.num_prompt_logprobs
        )
    return TokenDelta(
        token_ids=output["output_ids"],
        finish_reason=reason["type"] if reason else None,
        stop_reason=stop_reason,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        report=report,
    )


def _to_logprobs(
    of_tokens: list[TokenLogprob], of_candidates: list[Candidates | None] | None, num_candidates: int
) -> Logprobs:
    """Return the log probabilities of new output tokens, or of the prompt's tokens except the first, which has none."""
    logprobs = Logprobs(token_ids=[], logprobs=[], ranks=[])
    for (logprob, token, _), candidates in zip(of_tokens, of_candidates or [None] * len(of_tokens), strict=True):
        if logprob is None:
            continue
        top = [(value, candidate) for value, candidate, _ in candidates or ()]
        rank = next((index + 1 for index, (_, candidate) in enumerate(top) if candidate == token), UNKNOWN_RANK)
        logprobs.token_ids.append([token, *(candidate for _, candidate in top[:num_candidates])])
        logprobs.logprobs.append([logprob, *(value for value, _ in top[:num_candidates])])
        logprobs.ranks.append(rank)
    return logprobs
