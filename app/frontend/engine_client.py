"""vLLM's `EngineClient`, served by Baton's pools instead of an engine in this process.

vLLM's API server calls `generate` with a rendered prompt.  Here the prompt becomes token ids and plain sampling
fields, `Orchestrator.run` has them served, and the token deltas that come back go through vLLM's own output
processor: detokenization, stop strings, logprobs and the merging of ``n`` sequences are vLLM's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from copy import copy
from functools import partial
from http import HTTPStatus
from typing import Any, NoReturn, Protocol, cast, get_args

import msgspec
import numpy as np
import torch

from app.config import NOT_FOR_CLIENTS, LimitsConfig, ModelConfig
from app.errors import (
    Asleep,
    BatonError,
    CannotResume,
    DeadlineExceeded,
    EngineDead,
    InvalidRequest,
    LimitReached,
    NoReplica,
    Overloaded,
    Quarantined,
    ReplicaLost,
)
from app.frontend.orchestrator import Orchestrator
from app.frontend.request_bounds import RequestBounds
from app.frontend.request_context import RequestContext, current_request
from app.frontend.sequence_progress import SequenceProgress
from app.frontend.sequence_record import CANCELLED, SequenceRecord
from app.frontend.vllm_surface import (
    EngineClient,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
    GenerationError,
    GracefulHTTPError,
    InputProcessor,
    LogprobsLists,
    LogprobsTensors,
    LoRARequest,
    OutputProcessor,
    ParentRequest,
    PrefillStats,
    RequestOutput,
    RequestOutputCollector,
    RetryableRequestError,
    SamplingParams,
    VllmConfig,
    VLLMError,
    VLLMValidationError,
    create_error_response,
    renderer_from_config,
)
from app.messages import GenerateRequest, Logprobs, PrefillMode, TokenDelta
from app.routing.decision import RoutingHints
from app.tenant_usage import Accounts
from app.tenants import Tenant

logger = logging.getLogger("baton.engine_client")

_FINISH_REASONS = {str(reason): reason for reason in FinishReason}
MAX_REQUEST_ID = 256
_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID}}}")
# These fields concern the output processor in this process: it detokenizes and streams, whatever the caller asked for.
_FRONTEND_FIELDS = {
    "output_kind",
    "detokenize",
    "skip_clone",
    "n",
    "stop",
    "include_stop_str_in_output",
    "output_text_buffer_length",
}
# The others with their defaults, without those that are derived from the model: the engine derives them again.
_ENGINE_FIELDS = [
    (name, getattr(SamplingParams(), name))
    for name in SamplingParams.__struct_fields__
    if name not in _FRONTEND_FIELDS and not name.startswith("_")
]
DEFAULT_MAX_TOKENS: int = dict(_ENGINE_FIELDS)["max_tokens"]
"""What a request has that does not tell its `max_tokens` to the engine."""


class Outputs(Protocol):
    """Where the deltas of a sequence go."""

    def take(self, delta: TokenDelta) -> bool:
        """Take a delta.  Returns whether a stop string ends the sequence, for which engines do not look."""

    def fail(self, error: Exception) -> None:
        """Take the error that ends the sequence."""


class EngineRequest(msgspec.Struct, frozen=True):
    """A request for one sequence that has passed all checks: as vLLM has it, and as the pools get it."""

    core: EngineCoreRequest
    generate: GenerateRequest


class PooledEngineClient(EngineClient):
    """One model, served by a decode pool and, unless it is aggregated, a prefill pool."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: ModelConfig,
        orchestrator: Orchestrator,
        limits: LimitsConfig,
        accounts: Accounts,
    ) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.renderer = renderer_from_config(vllm_config)
        self.input_processor = InputProcessor(vllm_config, self.renderer)
        self._output_processor = OutputProcessor(self.renderer.tokenizer, log_stats=False)
        self._model_name = model.name
        self._allowed_xargs = {"session_id", *model.vllm_xargs}
        self._slo = model.slo
        self._limits = limits
        self._orchestrator = orchestrator
        self._accounts = accounts
        self._bounds = RequestBounds(limits, self.model_config.get_vocab_size())

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse a request with too many sequences before its prompt is even rendered."""
        try:
            self._bounds.check_sequences(n)
        except InvalidRequest as error:
            raise _to_vllm_error(error) from None

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        kv_hints: Any = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate `sampling_params.n` sequences for one prompt.

        Closing or cancelling the generator cancels all of them.  Raises vLLM's errors, which its server turns into
        the right HTTP status: validation (400), overload (429), no replica (503), timeout (504), anything else (500).
        """
        context = current_request()
        try:
            prefill_mode = self._to_prefill_mode(_take_prefill_mode(sampling_params), context.tenant)
            self._refuse_what_cannot_be_served(prompt, sampling_params, request_id, lora_request)
            with self._bounds.counted(
                context,
                n=sampling_params.n,
                prompt_tokens=len(prompt["prompt_token_ids"]),
                prompt_logprobs=sampling_params.prompt_logprobs,
            ):
                request = await self._to_engine_request(
                    prompt, sampling_params, request_id, priority, reasoning_parser_kwargs, context
                )
                request.reasoning_ended = reasoning_ended
                if prefill_mode == "corrupted":
                    # Nobody, not even of the same tenant, shall find the wrong KV in a prefix cache.
                    request.cache_salt = secrets.token_hex(16)
                self._bounds.check_values(_to_generate_request(request, prefill_mode))
                hints = _hints(context, session_id)
                async with aclosing(self._outputs(request, prompt_text, prefill_mode, hints, context)) as outputs:
                    async for output in outputs:
                        context.has_output = True
                        yield output
        except (InvalidRequest, Overloaded) as error:
            if isinstance(error, Overloaded):
                context.refuse_for(error.retry_after_s)
            refusal = _to_vllm_error(error)
            context.failure = create_error_response(refusal).error.model_dump()
            raise refusal from None
        except Exception as error:
            context.failure = create_error_response(error).error.model_dump()
            raise

    def prepare(self, prompt: Any, params: SamplingParams, request_id: str) -> EngineRequest:
        """Have a request checked and completed that asks for one sequence, without a schema or a prefill mode.

        Raises vLLM's errors and InvalidRequest.
        """
        _check_request_id(request_id)
        self._bounds.check_fields(params, None)
        request = self._process(prompt, params, request_id, 0, current_request().tenant)
        generate_request = _to_generate_request(request, "auto")
        self._bounds.check_values(generate_request)
        return EngineRequest(request, generate_request)

    @asynccontextmanager
    async def running(self, request: EngineRequest, outputs: Outputs, session: str | None) -> AsyncIterator[None]:
        """Generate the sequence of `request` while the block runs; its end cancels what still runs of it.

        The block raises the error that ends the sequence, which `outputs` gets: one of vLLM's, as of `generate`.
        """
        context = current_request()
        sequence = self._run_sequence(request.generate, _hints(context, session), context, outputs)
        task = asyncio.create_task(sequence, name=request.core.request_id)
        try:
            yield
        except Exception as error:
            context.failure = create_error_response(error).error.model_dump()
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _refuse_what_cannot_be_served(
        self, prompt: Any, params: SamplingParams, request_id: str, lora_request: LoRARequest | None
    ) -> None:
        _check_request_id(request_id)
        for name in params.extra_args or {}:
            if name in NOT_FOR_CLIENTS:
                raise VLLMValidationError(f"{name} cannot be set by a client", parameter=name)
            if name not in self._allowed_xargs:
                raise VLLMValidationError(
                    f"vllm_xargs.{name} is not allowed; a model's `vllm_xargs` says which are", parameter="vllm_xargs"
                )
        if lora_request is not None:
            raise VLLMValidationError("LoRA adapters are not offered by this server", parameter="model")
        kind = prompt.get("type", "token") if isinstance(prompt, dict) else "token"
        if kind != "token":
            raise VLLMValidationError(f"only text prompts are served, got {kind} input", parameter="prompt")

    def _to_prefill_mode(self, mode: Any, tenant: Tenant) -> PrefillMode:
        """Check the mode that a client sent.  Raises VLLMValidationError if there is no such mode, or not for it."""
        if mode not in get_args(PrefillMode):
            raise VLLMValidationError(
                f"baton_prefill must be one of {', '.join(get_args(PrefillMode))}",
                parameter="baton_prefill",
                value=mode,
            )
        if mode != "auto" and not (tenant.admin or self._limits.allow_control):
            raise VLLMValidationError(
                "baton_prefill needs the API key of an admin, or `limits.allow_control: true`",
                parameter="baton_prefill",
                value=mode,
            )
        return cast(PrefillMode, mode)

    async def _to_engine_request(
        self,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        priority: int,
        reasoning_parser_kwargs: dict[str, Any] | None,
        context: RequestContext,
    ) -> EngineCoreRequest:
        """Have vLLM check and complete a request.  Raises vLLM's errors, InvalidRequest and Overloaded."""
        await asyncio.sleep(0)  # the request's other prompts are counted before the first of them costs anything
        self._bounds.check_sums(context)
        self._bounds.check_fields(params, reasoning_parser_kwargs)

        process = partial(self._process, prompt, params, request_id, priority, context.tenant)
        # vLLM translates schemas and grammars here, which takes up to seconds.
        is_slow = params.structured_outputs is not None
        request = await self._bounds.beside_the_loop(context, process) if is_slow else process()
        request.reasoning_parser_kwargs = reasoning_parser_kwargs
        return request

    def _process(
        self, prompt: Any, params: SamplingParams, request_id: str, priority: int, tenant: Tenant
    ) -> EngineCoreRequest:
        request = self.input_processor.process_inputs(
            request_id, prompt, params, supported_tasks=("generate",), priority=tenant.bound_priority(priority)
        )
        assert request.sampling_params is not None
        # vLLM resolved this field for this process, which has no engine.  The engine resolves it for itself.
        request.sampling_params.watermarking = params.watermarking
        self.input_processor.assign_request_id(request)
        request.cache_salt = tenant.cache_salt(request.cache_salt)
        return request

    async def _outputs(
        self,
        request: EngineCoreRequest,
        prompt_text: str | None,
        prefill_mode: PrefillMode,
        hints: RoutingHints,
        context: RequestContext,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run the sequences of `request` and yield what comes of them.  Closing this cancels them."""
        queue, tasks = self._start(request, prompt_text, prefill_mode, hints, context)
        try:
            is_finished = False
            while not is_finished:
                output = queue.get_nowait() or await queue.get()
                assert isinstance(output, RequestOutput)
                is_finished = output.finished
                yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._output_processor.abort_requests([request.request_id], internal=True)
            queue.close()

    def _start(
        self,
        request: EngineCoreRequest,
        prompt_text: str | None,
        prefill_mode: PrefillMode,
        hints: RoutingHints,
        context: RequestContext,
    ) -> tuple[RequestOutputCollector, list[asyncio.Task[None]]]:
        """Start the sequences of `request`.

        Returns the queue on which their outputs arrive, and the tasks that fill it, one for each sequence.
        """
        assert request.sampling_params is not None
        queue = RequestOutputCollector(request.sampling_params.output_kind, request.request_id)
        parent, children = _fan_out(request)
        tasks = []
        for index, child in enumerate(children):
            self._output_processor.add_request(child, prompt_text, parent, index, queue)
            outputs = _ProcessedOutputs(self._output_processor, child.request_id, queue)
            sequence = self._run_sequence(_to_generate_request(child, prefill_mode), hints, context, outputs)
            tasks.append(asyncio.create_task(sequence, name=child.request_id))
        return queue, tasks

    async def _run_sequence(
        self,
        request: GenerateRequest,
        hints: RoutingHints,
        context: RequestContext,
        outputs: Outputs,
    ) -> None:
        """Run one sequence: its deltas go to `outputs`, and an error that ends it too."""
        task = asyncio.current_task()
        assert task is not None
        end = ""

        def emit(delta: TokenDelta) -> None:
            nonlocal end
            record.on_delta(delta)
            try:
                is_stopped = outputs.take(delta)
            except Exception as error:
                end = type(error).__name__
                logger.exception("request_id=%s failed", request.request_id)
                outputs.fail(GenerationError())
                task.cancel()
                return
            if is_stopped:
                end = "stop"
                task.cancel()
            end = end or delta.finish_reason or ""

        progress = SequenceProgress(emit)
        num_prompt, max_model_len = len(request.prompt_token_ids), self.model_config.max_model_len
        max_tokens = request.sampling.get("max_tokens", DEFAULT_MAX_TOKENS)
        record = SequenceRecord(
            progress,
            self._model_name,
            request.request_id,
            num_prompt,
            most_tokens=min(num_prompt + max_tokens, max_model_len),
            slo=self._slo,
            has_session=hints.session is not None,
            tenant=hints.tenant,
        )
        if hints.explain:
            context.sequences.append(record)
        account = self._accounts.of(context.tenant)
        try:
            num_together = context.num_sequences
            tokens_together = min(context.num_prompt_tokens + num_together * max_tokens, num_together * max_model_len)
            account.begin(record, num_together, tokens_together)
            await self._orchestrator.run(
                request, progress, hints=hints, on_decision=record.on_decision, deadline=context.deadline
            )
        except (BatonError, TimeoutError) as error:
            end = type(error).__name__
            if isinstance(error, LimitReached | Overloaded | Asleep):
                context.refuse_for(error.retry_after_s)
            outputs.fail(_to_vllm_error(error))
        except Exception as error:
            end = type(error).__name__
            logger.exception("request_id=%s failed", request.request_id)
            outputs.fail(GenerationError())
            raise
        finally:
            account.end(record, has_prompt=progress.prompt_report is not None)
            record.on_end(end or CANCELLED)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Nothing to do: a request is aborted by closing its generator."""

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_stopped(self) -> bool:
        return False

    @property
    def errored(self) -> bool:
        return False

    @property
    def dead_error(self) -> BaseException:
        error: BaseException = GenerationError()
        return error

    async def check_health(self) -> None:
        """Never raises: /health is answered by Baton from the state of the pools."""

    async def is_tracing_enabled(self) -> bool:
        return False

    async def do_log_stats(self) -> None:
        """Baton logs one line per sequence instead."""

    async def is_sleeping(self) -> bool:
        return False

    async def is_paused(self) -> bool:
        return False

    def shutdown(self, timeout: float | None = None) -> None:
        self._bounds.close()
        self.renderer.shutdown()

    async def notify_kv_transfer_request_rejected(
        self, request_id: str, kv_transfer_params: dict[str, Any], *, data_parallel_rank: int | None = None
    ) -> None:
        """Never needed: clients cannot bring KV transfer parameters."""

    async def encode(self, *args: Any, **kwargs: Any) -> NoReturn:
        _not_offered("pooling")

    async def start_profile(self, *args: Any, **kwargs: Any) -> None:
        _not_offered("profiling through the frontend")

    async def stop_profile(self) -> None:
        _not_offered("profiling through the frontend")

    async def reset_mm_cache(self) -> None:
        _not_offered("multi-modal input")

    async def reset_encoder_cache(self) -> None:
        _not_offered("multi-modal input")

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        _not_offered("resetting the prefix caches")

    async def sleep(self, level: int = 1, mode: Any = "abort") -> None:
        _not_offered("sleep mode")

    async def wake_up(self, tags: list[str] | None = None) -> bool:
        _not_offered("sleep mode")

    async def release_kv_cache_memory(self) -> None:
        _not_offered("sleep mode")

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        _not_offered("LoRA")

    async def pause_generation(self, *, mode: Any = "abort", clear_cache: bool = True) -> None:
        _not_offered("pausing")

    async def resume_generation(self) -> None:
        _not_offered("pausing")


def _not_offered(what: str) -> NoReturn:
    raise NotImplementedError(f"{what} is not offered by this server")


def _check_request_id(request_id: str) -> None:
    """Raise VLLMValidationError for an id that could forge lines of logs, or is so long that it would cost others."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise VLLMValidationError(
            f"request_id (or the header X-Request-Id) must be at most {MAX_REQUEST_ID} printable ASCII characters "
            "without spaces",
            parameter="request_id",
        )


def _hints(context: RequestContext, session: str | None) -> RoutingHints:
    tenant = context.tenant
    return RoutingHints(
        session=tenant.session(session),
        explain=context.wants_explanation,
        service_class=context.service_class,
        tenant=tenant.name,
        weight=tenant.weight,
    )


def _take_prefill_mode(params: SamplingParams) -> Any:
    """Remove ``vllm_xargs: {"baton_prefill": ...}`` from the sampling parameters, as no engine knows it.

    Returns the value as the client sent it, unchecked.
    """
    extra = dict(params.extra_args or {})
    mode = extra.pop("baton_prefill", "auto")
    params.extra_args = extra or None  # as it is in a request without any, so that engines treat both the same
    return mode


def _fan_out(request: EngineCoreRequest) -> tuple[ParentRequest | None, list[EngineCoreRequest]]:
    """Make one engine request for each of the ``n`` sequences, with seeds as vLLM sets them."""
    params = request.sampling_params
    assert params is not None
    if params.n == 1:
        return None, [request]
    parent = ParentRequest(request)
    children = []
    for index in range(params.n):
        child = copy(request)
        child.request_id, child.sampling_params = parent.get_child_info(index)
        children.append(child)
    return parent, children


def _to_generate_request(request: EngineCoreRequest, prefill_mode: PrefillMode) -> GenerateRequest:
    assert request.prompt_token_ids is not None
    assert request.sampling_params is not None
    return GenerateRequest(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_fields(request.sampling_params),
        cache_salt=request.cache_salt,
        priority=request.priority,
        prefill_mode=prefill_mode,
        reasoning_ended=request.reasoning_ended,
        reasoning_parser_kwargs=request.reasoning_parser_kwargs,
    )


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """Return, as plain values, the fields that an engine needs and that differ from their defaults."""
    fields = {}
    for name, default in _ENGINE_FIELDS:
        value = getattr(params, name)
        if value == default:
            continue
        plain = msgspec.to_builtins(value)
        if name == "structured_outputs":
            plain = {key: item for key, item in plain.items() if item is not None and not key.startswith("_")}
        fields[name] = plain
    return fields


class _ProcessedOutputs:
    """The outputs of one sequence as vLLM's output processor makes them, which then are in `queue`."""

    def __init__(self, processor: OutputProcessor, request_id: str, queue: RequestOutputCollector) -> None:
        self._processor = processor
        self._request_id = request_id
        self._queue = queue

    def take(self, delta: TokenDelta) -> bool:
        return bool(self._processor.process_outputs([_to_core_output(self._request_id, delta)]).reqs_to_abort)

    def fail(self, error: Exception) -> None:
        self._queue.put(error)


def _to_core_output(request_id: str, delta: TokenDelta) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request_id,
        new_token_ids=delta.token_ids,
        new_logprobs=_to_lists(delta.logprobs) if delta.logprobs else None,
        new_prompt_logprobs_tensors=_to_tensors(delta.prompt_logprobs) if delta.prompt_logprobs else None,
        finish_reason=_FINISH_REASONS[delta.finish_reason] if delta.finish_reason else None,
        stop_reason=delta.stop_reason,
        prefill_stats=PrefillStats(num_cached_tokens=delta.report.cached_tokens) if delta.report else None,
    )


def _to_lists(logprobs: Logprobs) -> LogprobsLists:
    return LogprobsLists(
        np.asarray(logprobs.token_ids, dtype=np.int32),
        np.asarray(logprobs.logprobs, dtype=np.float32),
        np.asarray(logprobs.ranks, dtype=np.int32),
    )


def _to_tensors(logprobs: Logprobs) -> LogprobsTensors:
    return LogprobsTensors(
        torch.tensor(logprobs.token_ids, dtype=torch.int32),
        torch.tensor(logprobs.logprobs, dtype=torch.float32),
        torch.tensor(logprobs.ranks, dtype=torch.int32),
    )


class _TooBusy(GracefulHTTPError, GenerationError):
    """The error for overload, and for a limit that is reached.

    It is a GracefulHTTPError for its HTTP status.  It is a GenerationError because vLLM's streams log a traceback for
    any other error, and under overload there would be many.
    """


def _to_vllm_error(error: BatonError | TimeoutError) -> VLLMError:
    """Turn an error into the one that the client sees.

    It contains the text of an internal error only if that error is about the request itself.
    """
    if isinstance(error, InvalidRequest):
        return VLLMValidationError(error.message)
    if isinstance(error, Quarantined):
        return VLLMValidationError(str(error))
    if isinstance(error, NoReplica):
        return RetryableRequestError("No replica is ready to serve this request; please retry.")
    if isinstance(error, Asleep):
        return RetryableRequestError("The model slept and is still waking up; please retry.")
    if isinstance(error, LimitReached):
        return _TooBusy(str(error), HTTPStatus.TOO_MANY_REQUESTS)
    if isinstance(error, Overloaded):
        return _TooBusy("Too many prompts wait to be computed; please retry later.", HTTPStatus.TOO_MANY_REQUESTS)
    if isinstance(error, ReplicaLost | EngineDead | CannotResume):
        return RetryableRequestError("The replica that generated this answer was lost; please retry.")
    if isinstance(error, DeadlineExceeded):
        message = "The request did not end in the time that `x-baton-timeout-s` or `limits.max_request_s` gives it."
        return GracefulHTTPError(message, HTTPStatus.GATEWAY_TIMEOUT)
    if isinstance(error, TimeoutError):
        return GracefulHTTPError("The model took too long to answer.", HTTPStatus.GATEWAY_TIMEOUT)
    return GenerationError("The engine failed to serve this request.")
