"""Everything that the frontend uses of vLLM, and the places where Baton departs from vLLM's own behaviour.

Seen with vLLM 0.32.  Most of these names are internal to vLLM, so this is the one place to look when it moves them.  If
one is missing or takes other parameters, the import of this module fails with an error that names it (app/upstream.py).
Each patch says why it is there and when it can go; tests/unit/test_canaries.py fails when that time has come.

Importing this module imports vLLM, which takes seconds.  So modules that are also imported where no server runs import
it inside a function.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, MutableMapping
from typing import Any

from app.frontend.request_context import current_request
from app.upstream import Patch, UpstreamChanged, check_attributes, check_parameters, check_uses, needed

with needed("vllm", "serve its API over engines in other processes"):
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.exceptions import (
        GenerationError,
        GracefulHTTPError,
        RetryableRequestError,
        VLLMError,
        VLLMValidationError,
    )
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.renderers import renderer_from_config
    from vllm.sampling_params import SamplingParams
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    check_parameters(make_arg_parser, "parser")
    check_parameters(validate_parsed_serve_args, "args")
    check_parameters(validate_api_server_args, "args")
    check_parameters(launcher.build_app, "args", "supported_tasks", "model_config")
    check_parameters(init_app_state, "engine_client", "state", "args", "supported_tasks")
    check_parameters(EngineClient.check_admission, "self", "n", "request_id")

with needed("vllm", "make engine requests of prompts, and answers of engine outputs"):
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

    check_parameters(InputProcessor, "vllm_config", "renderer")
    check_parameters(
        InputProcessor.process_inputs, "self", "request_id", "prompt", "params", "supported_tasks", "priority"
    )
    check_parameters(InputProcessor.assign_request_id, "request")
    check_parameters(OutputProcessor, "tokenizer", "log_stats")
    check_parameters(OutputProcessor.add_request, "self", "request", "prompt", "parent_req", "request_index", "queue")
    check_parameters(OutputProcessor.process_outputs, "self", "engine_core_outputs")
    check_parameters(OutputProcessor.abort_requests, "self", "request_ids", "internal")
    check_parameters(RequestOutputCollector, "output_kind", "request_id")
    check_attributes(RequestOutputCollector, "get", "get_nowait", "put", "close")
    check_parameters(ParentRequest, "request")
    check_parameters(ParentRequest.get_child_info, "self", "index")
    check_parameters(
        EngineCoreOutput,
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "new_prompt_logprobs_tensors",
        "finish_reason",
        "stop_reason",
        "prefill_stats",
    )
    check_attributes(EngineCoreRequest, "reasoning_ended", "reasoning_parser_kwargs", "cache_salt", "priority")
    check_parameters(PrefillStats, "num_cached_tokens")
    check_attributes(LogprobsLists, "logprob_token_ids", "logprobs", "sampled_token_ranks")
    check_attributes(LogprobsTensors, "logprob_token_ids", "logprobs", "selected_token_ranks")

with needed("vllm", "serve n > 1 with temperature 0"):
    GREEDY_CHECK = Patch(SamplingParams, "_verify_greedy_sampling", "self")
    check_uses(SamplingParams.__post_init__, "_verify_greedy_sampling")

with needed("vllm", "end the handler of a request whose client went away"):
    from vllm.entrypoints.serve.utils import api_utils

    WITH_CANCELLATION = Patch(api_utils, "with_cancellation", "handler_func")

with needed("vllm", "take the user for the session"):
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    SESSION_ID = Patch(GenerateBaseServing, "_get_session_id", "request", "raw_request")
    check_parameters(GenerateBaseServing._get_priority, "request", "raw_request")
    ANTHROPIC_REQUEST = Patch(AnthropicServingMessages, "_build_base_request", "anthropic_request", "openai_messages")

with needed("vllm", "keep stored responses by tenant"):
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    STORES_OF_RESPONSES = ("response_store", "msg_store", "event_store", "background_tasks")
    for _store in STORES_OF_RESPONSES:
        check_uses(OpenAIServingResponses.__init__, _store)

with needed("vllm", "translate structural tags beside the event loop"):
    from vllm.entrypoints.generate.base import protocol as base_protocol

    STRUCTURAL_TAG_CHECK = Patch(base_protocol, "validate_structural_tag_payload", "payload", "parameter")
    check_uses(base_protocol.validate_structural_tag_response_format, "validate_structural_tag_payload")
    check_uses(base_protocol.validate_structured_outputs_structural_tag, "validate_structural_tag_payload")

with needed("vllm", "count a tool call under its own model"):
    from vllm.parser import abstract_parser
    from vllm.parser import metrics as parser_metrics

    TOOL_CALL_COUNT = Patch(
        abstract_parser, "record_tool_parser_invocation", "is_tool_called", "is_streaming", "request"
    )
    check_attributes(parser_metrics, "_model_name")
    check_uses(TOOL_CALL_COUNT.original, "_model_name")

with needed("fastapi", "answer 400 to a body that vLLM's checks cannot take"):
    from fastapi._compat.v2 import ModelField

    BODY_CHECK = Patch(ModelField, "validate", "self", "value")

with needed("prometheus_fastapi_instrumentator", "count the HTTP requests of several applications"):
    from prometheus_fastapi_instrumentator import metrics as http_metrics

    HTTP_METRICS = Patch(http_metrics, "default")

__all__ = [
    "AsyncEngineArgs",
    "EngineClient",
    "EngineCoreOutput",
    "EngineCoreRequest",
    "FinishReason",
    "FlexibleArgumentParser",
    "GenerationError",
    "GracefulHTTPError",
    "InputProcessor",
    "LoRARequest",
    "LogprobsLists",
    "LogprobsTensors",
    "OutputProcessor",
    "ParentRequest",
    "PrefillStats",
    "RequestOutput",
    "RequestOutputCollector",
    "RetryableRequestError",
    "SamplingParams",
    "VLLMError",
    "VLLMValidationError",
    "VllmConfig",
    "allow_several_greedy_sequences",
    "build_app",
    "count_tool_calls_by_model",
    "create_error_response",
    "init_app_state",
    "keep_responses_by_tenant",
    "leave_structural_tags_to_the_engine_client",
    "let_cancellation_through",
    "make_arg_parser",
    "refuse_what_vllms_checks_cannot_take",
    "renderer_from_config",
    "share_http_metrics",
    "take_session_and_service_class",
    "validate_api_server_args",
    "validate_parsed_serve_args",
]


def build_app(arguments: Any, supported_tasks: tuple[str, ...], model_config: Any) -> Any:
    """Make vLLM's application, and leave the levels of the root logger and its handlers as they are.

    vLLM 0.32 imports model_hosting_container_standards as it does that, which sets them to ERROR: of loggers without a
    level of their own nobody would see a warning any more.  Can go once that package leaves the root logger alone.
    """
    root = logging.getLogger()
    leveled: list[logging.Logger | logging.Handler] = [root, *root.handlers]
    levels = [each.level for each in leveled]
    try:
        return launcher.build_app(arguments, supported_tasks, model_config)
    finally:
        for each, level in zip(leveled, levels, strict=True):
            each.setLevel(level)


def allow_several_greedy_sequences() -> None:
    """Serve ``n`` > 1 with temperature 0, as OpenAI's API does; vLLM 0.32 refuses it with 400.

    vLLM refuses it because all the sequences will be equal.  It could serve them: when they reach an engine, each one
    is a request of its own.  Can go once vLLM accepts such requests.
    """
    GREEDY_CHECK.apply(lambda self: None)


def let_cancellation_through() -> None:
    """End the handler of a request whose client went away.

    Serve cancels such a request.  vLLM 0.32 runs the handler as one task and waits for the disconnection in another.
    The cancellation ends the code that waits for the two tasks, but neither of the tasks: an answer that nobody waits
    for was generated to its end.  Must be called before vLLM's routers are imported, which happens when `build_app`
    first runs; raises UpstreamChanged if one of them is imported already.  Can go once vLLM's ``with_cancellation``
    cancels its handler when it is cancelled itself.
    """
    late = [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("vllm.") and module is not api_utils
        if getattr(module, "with_cancellation", None) is WITH_CANCELLATION.original
    ]
    if late:
        raise UpstreamChanged(f"too late to end the handlers of requests whose client went away: {late} is imported")
    WITH_CANCELLATION.apply(lambda handler: handler)


def take_session_and_service_class() -> None:
    """Take OpenAI's ``user`` (``metadata.user_id`` in Anthropic's API) for the session if nothing else names one.

    vLLM 0.32 passes on a session only from the header ``X-Session-ID`` or from its own field ``session_id``, and no
    OpenAI client sends these.  Can go once vLLM falls back on ``user``.  Where it reads the session of any request,
    ``service_tier``, which it does not pass on at all, and ``priority`` are read too.
    """

    def session_or_user(request: Any, raw_request: Any) -> str | None:
        priority = GenerateBaseServing._get_priority(request, raw_request)
        current_request().take_class(getattr(request, "service_tier", None), priority)
        return SESSION_ID.original(request, raw_request) or request.user or None

    def with_user(request: Any, messages: Any) -> Any:
        built = ANTHROPIC_REQUEST.original(request, messages)
        user = (getattr(request, "metadata", None) or {}).get("user_id")
        built.user = user if isinstance(user, str) else None
        return built

    SESSION_ID.apply(staticmethod(session_or_user))
    ANTHROPIC_REQUEST.apply(staticmethod(with_user))


def leave_structural_tags_to_the_engine_client() -> None:
    """Do not translate a structural tag into a grammar while a request's body is parsed.

    vLLM 0.32 does it there, on the event loop, for which all other requests wait, and once more in
    `InputProcessor.process_inputs`, which the engine client runs in a thread (request_bounds.py).  Can go once vLLM's
    protocol classes no longer do it.
    """

    def leave(payload: Any, *, parameter: str) -> None:
        if not payload:
            raise VLLMValidationError(f"Invalid {parameter} structural_tag specification.", parameter=parameter)

    STRUCTURAL_TAG_CHECK.apply(leave)


def refuse_what_vllms_checks_cannot_take() -> None:
    """Answer 400 instead of 500 to a field of a type for which vLLM's checks of a body were not written.

    vLLM 0.32 looks into some fields before their types are known: ``"structured_outputs": 1`` ends in an
    AttributeError.  Can go once such a request gets 400 from vLLM itself.
    """

    def validate(self: Any, value: Any, *arguments: Any, loc: tuple[int | str, ...] = (), **named: Any) -> Any:
        try:
            return BODY_CHECK.original(self, value, *arguments, loc=loc, **named)
        except (AttributeError, TypeError, KeyError, RecursionError) as error:
            message = f"a field has a value of a type that it cannot have ({error})"
            return None, [{"type": "value_error", "loc": loc, "msg": message, "input": None}]

    BODY_CHECK.apply(validate)


def count_tool_calls_by_model() -> None:
    """Count a tool call under the model that the request names.

    vLLM 0.32 expects one model in a process, and counts under the one that was set up last.  Can go once vLLM takes
    the name from the request.
    """

    def record(*, request: Any, **facts: Any) -> None:
        parser_metrics._model_name = request.model
        TOOL_CALL_COUNT.original(request=request, **facts)

    TOOL_CALL_COUNT.apply(record)


def share_http_metrics() -> None:
    """Count the HTTP requests of all applications that are built from now on in the same metrics.

    The middleware that vLLM uses makes new metrics for each application, and counts nothing if their names are already
    taken.  Can go once it counts in that case too.
    """
    made: list[Any] = []

    def make_once(**options: Any) -> Any:
        if not made:
            made.append(HTTP_METRICS.original(**options))
        return made[0]

    if not HTTP_METRICS.is_applied:  # the metrics can be made only once
        HTTP_METRICS.apply(make_once)


def keep_responses_by_tenant(app: Any) -> None:
    """Let clients find only their own tenant's stored responses.

    vLLM 0.32 knows of no tenants: whoever guesses or sees an id gets the answer, or goes on from it.  Can go once it
    asks an application whose a response is.
    """
    serving = app.state.openai_serving_responses
    for name in STORES_OF_RESPONSES:
        setattr(serving, name, _ByTenant())


class _ByTenant(MutableMapping[str, Any]):
    """What the tenant of the current request has stored."""

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._stored[current_request().tenant.name, key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._stored[current_request().tenant.name, key] = value

    def __delitem__(self, key: str) -> None:
        del self._stored[current_request().tenant.name, key]

    def __iter__(self) -> Iterator[str]:
        return (key for tenant, key in self._stored if tenant == current_request().tenant.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)
