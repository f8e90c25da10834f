"""What plain answers (plain_answers.py) use of vLLM's serving classes, which is what these do with a request up to the
engine, and what they make of the engine's outputs: events of a stream, or a whole answer.

Seen with vLLM 0.32, as app/frontend/vllm_surface.py, which must have been imported before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import FastAPI
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.frontend.answer_frames import ID, NUM_CACHED, NUM_LAST, NUM_MIDDLE, NUM_PROMPT, TEXT
from app.upstream import check_attributes, check_parameters, needed

__all__ = ["LOAD_FORMAT_HEADER", "PRIORITY_HEADER", "PlainApi", "passes_bodies_on", "plain_apis"]

with needed("vllm", "serve plain answers without a response model for each token"):
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.generate.base.serving import PRIORITY_HEADER, GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.elastic_ep.middleware import ScalingMiddleware
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
    from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.params import merge_kwargs
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin
    from vllm.utils.mistral import is_mistral_tokenizer
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    check_parameters(IncrementalDetokenizer.from_new_request, "tokenizer", "request")
    check_parameters(IncrementalDetokenizer.update, "self", "new_token_ids", "stop_terminated")
    check_parameters(IncrementalDetokenizer.get_next_output_text, "self", "finished", "delta")
    check_parameters(IncrementalDetokenizer.num_output_tokens, "self")
    check_parameters(GenerateBaseServing._base_request_id, "raw_request", "default")
    check_parameters(GenerateBaseServing._get_session_id, "request", "raw_request")
    check_parameters(
        get_max_tokens,
        *("max_model_len", "max_tokens", "input_length", "default_sampling_params", "override_max_tokens"),
        "truncate_prompt_tokens",
    )
    check_parameters(BaseRenderer.render_cmpl, "self", "prompts", "tok_params", "prompt_extras")
    check_parameters(BaseRenderer.render_cmpl_async, "self", "prompts", "tok_params", "prompt_extras")
    check_parameters(BaseRenderer.render_chat, "self", "conversations", "chat_params", "tok_params", "prompt_extras")
    check_parameters(
        BaseRenderer.render_chat_async, "self", "conversations", "chat_params", "tok_params", "prompt_extras"
    )
    check_parameters(
        OpenAIServingCompletion.completion_stream_generator,
        *("self", "request", "engine_inputs", "result_generator", "request_id", "created_time", "model_name"),
        *("num_prompts", "tokenizer", "request_metadata"),
    )
    check_parameters(
        OpenAIServingChat.chat_completion_stream_generator,
        *("self", "request", "result_generator", "request_id", "model_name", "conversation", "tokenizer"),
        *("request_metadata", "chat_template_kwargs"),
    )
    check_parameters(
        OpenAIServingCompletion.request_output_to_completion_response,
        *("self", "final_res_batch", "request", "request_id", "created_time", "model_name", "tokenizer"),
        "request_metadata",
    )
    check_parameters(
        OpenAIServingChat.chat_completion_full_generator,
        *("self", "request", "result_generator", "request_id", "model_name", "conversation", "tokenizer"),
        *("request_metadata", "parser", "mm_token_counts"),
    )
    check_attributes(OnlineRenderer, "render_chat")

LOAD_FORMAT_HEADER = "endpoint-load-metrics-format"
"""A header that adds one to an answer that is not streamed.  vLLM has the name in its routers, which must not be
imported as early as this (vllm_surface.let_cancellation_through)."""

PASS_BODIES_ON = {
    AuthenticationMiddleware,
    CORSMiddleware,
    PrometheusInstrumentatorMiddleware,
    ScalingMiddleware,
    XRequestIdMiddleware,
}
"""The middlewares that vLLM's server may have and that do nothing to the parts of an answer's body."""

SAMPLING = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
}
"""Fields that concern the engine and the detokenizer alone."""
ANY_VALUE = SAMPLING | {
    "model",
    "max_tokens",
    "stream",
    "stream_options",
    "user",
    "session_id",
    "request_id",
    "cache_salt",
    "add_special_tokens",
}
"""Fields of a plain request; all others, if they are there, have the value that they have by themselves."""
PLAIN_ROLES = ("system", "user", "assistant")


class PlainApi(ABC):
    """One of vLLM's serving classes, as plain answers use it."""

    id_prefix: str
    engine_id_suffix: str
    num_events_before_text: int
    fields: set[str]

    def __init__(self, serving: Any, request_class: Any) -> None:
        self._serving = serving
        self._request_class = request_class
        self._model_config = serving.model_config
        self._renderer = serving.renderer
        # Others are used by one thread of vLLM's alone: encoding changes their state, as how much is truncated.
        self._may_render_here = isinstance(self._renderer.tokenizer, ThreadSafeHFTokenizerMixin)

    def is_offered(self) -> bool:
        """Whether the server is set up so that an answer can be plain at all."""
        return self._serving.request_logger is None and not is_mistral_tokenizer(self._renderer.tokenizer)

    def parse(self, body: bytes) -> Any:
        """Return the request, checked as vLLM checks it.  Raises whatever is raised then."""
        return self._request_class.model_validate(json.loads(body))

    def is_plain(self, request: Any) -> bool:
        """Whether the request asks for the text of one sequence and nothing else."""
        if not self._serving.models.is_base_model(request.model):
            return False
        if request.stream_options is not None and request.stream_options.continuous_usage_stats:
            return False
        fields = self._request_class.model_fields
        values = vars(request)  # an attribute that is deprecated warns
        return all(
            name in fields and values[name] == fields[name].get_default(call_default_factory=True)
            for name in request.model_fields_set - self.fields
        )

    @abstractmethod
    async def render(self, request: Any, *, is_short: bool) -> Any:
        """Make the engine's input of the prompt: a short one at once, others in a thread.  Raises vLLM's errors."""

    @abstractmethod
    def max_tokens_of(self, request: Any) -> int | None:
        """Return how many tokens the client wants."""

    def sampling_params(self, request: Any, prompt: Any) -> SamplingParams:
        """Raises vLLM's errors, and ValueError if the prompt is too long."""
        serving = self._serving
        max_tokens = get_max_tokens(
            self._model_config.max_model_len,
            self.max_tokens_of(request),
            len(prompt["prompt_token_ids"]),
            serving.default_sampling_params,
            serving.override_max_tokens,
            truncate_prompt_tokens=None,
        )
        params: SamplingParams = request.to_sampling_params(max_tokens, serving.default_sampling_params)
        params.skip_clone = True  # nobody else has them
        return params

    def request_id(self, request: Any, raw_request: Request) -> str:
        """Return the answer's id, which vLLM's handlers of errors then know too."""
        request_id = f"{self.id_prefix}{self._serving._base_request_id(raw_request, request.request_id)}"
        raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
        return request_id

    def session(self, request: Any, raw_request: Request) -> str | None:
        session: str | None = self._serving._get_session_id(request, raw_request)
        return session

    def detokenizer(self, request: Any) -> Any:
        """Return vLLM's detokenizer for an ``EngineCoreRequest``."""
        return IncrementalDetokenizer.from_new_request(self._renderer.tokenizer, request)

    def error_event(self, error: Exception, *, is_expected: bool) -> str:
        """Return the data of the event with which vLLM's stream ends by `error`."""
        if is_expected:
            return str(self._serving._convert_generation_error_to_streaming_response(error))
        return str(self._serving.create_streaming_error_response(error))

    def includes_usage(self, request: Any) -> bool:
        return request.stream_options is not None and bool(request.stream_options.include_usage)

    def example(
        self, finish_reason: str, stop_reason: int | str | None, *, is_stream: bool, includes_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Return vLLM's events of a stream, or its whole answer, as answer_frames.py wants it for an example."""
        request = self._example_request(
            {
                "model": self._serving.models.model_name(None),
                "stream": is_stream,
                "max_tokens": 1,
                "stream_options": {"include_usage": True} if includes_usage else None,
            }
        )
        if is_stream:
            return self._events(request, _example_outputs(finish_reason, stop_reason, NUM_MIDDLE, NUM_LAST))
        return self._whole(request, _example_outputs(finish_reason, stop_reason, NUM_MIDDLE + NUM_LAST))

    async def _whole(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[str, None]:
        response = await self._response(request, outputs)
        yield bytes(JSONResponse(response.model_dump()).body).decode()  # as vLLM's routes

    @abstractmethod
    def _example_request(self, fields: dict[str, Any]) -> Any: ...

    @abstractmethod
    def _events(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[str, None]: ...

    @abstractmethod
    async def _response(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> Any: ...


class PlainCompletions(PlainApi):
    """``/v1/completions``."""

    id_prefix = "cmpl-"
    engine_id_suffix = "-0"
    num_events_before_text = 0
    fields = ANY_VALUE | {"prompt"}

    def __init__(self, serving: Any) -> None:
        super().__init__(serving, CompletionRequest)

    def is_plain(self, request: Any) -> bool:
        prompt = request.prompt
        is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        return is_one and request.max_tokens is not None and super().is_plain(request)

    def max_tokens_of(self, request: Any) -> int | None:
        max_tokens: int | None = request.max_tokens
        return max_tokens

    async def render(self, request: Any, *, is_short: bool) -> Any:
        arguments = (
            [parse_model_prompt(self._model_config, request.prompt)],
            request.build_tok_params(self._model_config),
        )
        extras = _extras(request)
        if is_short and self._may_render_here:
            (prompt,) = self._renderer.render_cmpl(*arguments, prompt_extras=extras)
        else:
            (prompt,) = await self._renderer.render_cmpl_async(*arguments, prompt_extras=extras)
        return prompt

    def _example_request(self, fields: dict[str, Any]) -> Any:
        return CompletionRequest(prompt="x", **fields)

    def _events(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[str, None]:
        async def numbered() -> AsyncIterator[tuple[int, RequestOutput]]:
            async for output in outputs:
                yield 0, output

        events: AsyncGenerator[str, None] = self._serving.completion_stream_generator(
            request,
            [],
            numbered(),
            ID,
            0,
            request.model,
            num_prompts=1,
            tokenizer=self._renderer.tokenizer,
            request_metadata=RequestResponseMetadata(request_id=ID),
        )
        return events

    async def _response(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> Any:
        return self._serving.request_output_to_completion_response(
            [output async for output in outputs],
            request,
            ID,
            0,
            request.model,
            self._renderer.tokenizer,
            RequestResponseMetadata(request_id=ID),
        )


class PlainChat(PlainApi):
    """``/v1/chat/completions``."""

    id_prefix = "chatcmpl-"
    engine_id_suffix = ""
    num_events_before_text = 1
    fields = ANY_VALUE | {"messages", "max_completion_tokens"}

    def __init__(self, serving: Any) -> None:
        super().__init__(serving, ChatCompletionRequest)

    def is_offered(self) -> bool:
        has_parser = self._serving.parser_cls is not None or self._serving.online_renderer.parser is not None
        return super().is_offered() and not has_parser and not self._serving.online_renderer.use_harmony

    def is_plain(self, request: Any) -> bool:
        are_plain = all(
            message.keys() == {"role", "content"}
            and message["role"] in PLAIN_ROLES
            and isinstance(message["content"], str)
            for message in request.messages
        )
        return are_plain and super().is_plain(request)

    def max_tokens_of(self, request: Any) -> int | None:
        completion: int | None = request.max_completion_tokens
        return vars(request)["max_tokens"] if completion is None else completion  # the attribute warns

    async def render(self, request: Any, *, is_short: bool) -> Any:
        online, config = self._serving.online_renderer, self._model_config
        multimodal = config.multimodal_config
        chat_params = request.build_chat_params(
            online.chat_template, online.chat_template_content_format
        ).with_defaults(
            merge_kwargs(online.default_chat_template_kwargs, {"tools": None, "tokenize": config.enable_prompt_embeds}),
            default_media_io_kwargs=multimodal.media_io_kwargs if multimodal else None,
            default_mm_processor_kwargs=None,
        )
        arguments = [request.messages], chat_params, request.build_tok_params(config)
        extras = _extras(request)
        if is_short and self._may_render_here:
            _, (prompt,) = self._renderer.render_chat(*arguments, prompt_extras=extras)
        else:
            _, (prompt,) = await self._renderer.render_chat_async(*arguments, prompt_extras=extras)
        return prompt

    def _example_request(self, fields: dict[str, Any]) -> Any:
        return ChatCompletionRequest(messages=[{"role": "user", "content": ""}], **fields)

    def _events(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[str, None]:
        events: AsyncGenerator[str, None] = self._serving.chat_completion_stream_generator(
            request,
            outputs,
            ID,
            request.model,
            [],
            self._renderer.tokenizer,
            RequestResponseMetadata(request_id=ID),
            chat_template_kwargs={},
        )
        return events

    async def _response(self, request: Any, outputs: AsyncIterator[RequestOutput]) -> Any:
        return await self._serving.chat_completion_full_generator(
            request,
            outputs,
            ID,
            request.model,
            [],
            self._renderer.tokenizer,
            RequestResponseMetadata(request_id=ID),
        )


def _extras(request: Any) -> dict[str, Any]:
    return {} if request.cache_salt is None else {"cache_salt": request.cache_salt}


async def _example_outputs(
    finish_reason: str, stop_reason: int | str | None, *nums_tokens: int
) -> AsyncIterator[RequestOutput]:
    """Yield outputs of so many tokens.  Of the token ids only the numbers count, for which ranges take no memory."""
    for index, num_tokens in enumerate(nums_tokens, 1):
        is_last = index == len(nums_tokens)
        ends = {"finish_reason": finish_reason, "stop_reason": stop_reason} if is_last else {}
        output = CompletionOutput(0, TEXT, range(num_tokens), None, None, **ends)
        yield RequestOutput(
            ID,
            "",
            range(NUM_PROMPT),
            None,
            [output],
            is_last,
            num_cached_tokens=NUM_CACHED,
            num_cache_creation_tokens=0,  # as it is without vLLM's scheduler in this process
        )


def passes_bodies_on(app: FastAPI) -> bool:
    """Whether all of the application's middlewares do; users may add others (``server_args.middleware``)."""
    return all(middleware.cls in PASS_BODIES_ON for middleware in app.user_middleware)


def plain_apis(state: Any) -> dict[str, PlainApi]:
    """Return the APIs with plain answers by their path; `state` is that of vLLM's application."""
    if getattr(state, "enable_server_load_tracking", False) or state.args.sse_keep_alive_interval:
        return {}
    apis = {
        "/v1/completions": PlainCompletions(state.openai_serving_completion),
        "/v1/chat/completions": PlainChat(state.openai_serving_chat),
    }
    return {path: api for path, api in apis.items() if api.is_offered()}
