"""Where Baton departs from vLLM's own behaviour, each with the reason and when it can go."""

from __future__ import annotations

from typing import Any


def allow_several_greedy_sequences() -> None:
    """Serve ``n`` > 1 with temperature 0, as OpenAI's API does; vLLM 0.32 refuses it with 400.

    vLLM's reason is that the sequences come out equal, not that it could not serve them: each one is a request of
    its own by the time it reaches an engine.  Can go once vLLM accepts it.
    """
    from vllm.sampling_params import SamplingParams

    SamplingParams._verify_greedy_sampling = lambda self: None


def let_cancellation_through() -> None:
    """End the handler of a request whose client went away.

    Serve cancels such a request.  vLLM 0.32 runs the handler as a task beside one that waits for the disconnection,
    and the cancellation ends the wait for both but neither of them: an answer that nobody waits for was generated to
    its end.  Must be called before vLLM's routers are imported, which is when `build_app` first runs.  Can go once
    vLLM's ``with_cancellation`` cancels its handler when it is cancelled itself.
    """
    from vllm.entrypoints.serve.utils import api_utils

    api_utils.with_cancellation = lambda handler: handler


def take_the_user_for_the_session() -> None:
    """Have OpenAI's ``user`` (``metadata.user_id`` in Anthropic's API) name the session where nothing else does.

    vLLM 0.32 hands a session to the engine that comes as ``X-Session-ID`` or in a field ``session_id`` of its own,
    which no OpenAI client sends.  Can go once vLLM falls back on these fields.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    session_id, base_request = GenerateBaseServing._get_session_id, AnthropicServingMessages._build_base_request

    def session_or_user(request: Any, raw_request: Any) -> str | None:
        return session_id(request, raw_request) or request.user or None

    def with_user(request: Any, messages: Any) -> Any:
        built = base_request(request, messages)
        user = (getattr(request, "metadata", None) or {}).get("user_id")
        built.user = user if isinstance(user, str) else None
        return built

    GenerateBaseServing._get_session_id = staticmethod(session_or_user)
    AnthropicServingMessages._build_base_request = staticmethod(with_user)


def count_tool_calls_by_model() -> None:
    """Count a tool call under the model that was asked.

    vLLM 0.32 has one model in a process and counts under the one that was set up last.  Can go once vLLM takes the
    name from the request.
    """
    from vllm.parser import abstract_parser, metrics

    def record(*, request: Any, **facts: Any) -> None:
        metrics._model_name = request.model
        metrics.record_tool_parser_invocation(request=request, **facts)

    abstract_parser.record_tool_parser_invocation = record


def share_http_metrics() -> None:
    """Count the HTTP requests of all applications that are built from now on, in the same metrics.

    The middleware that vLLM uses makes the metrics once for each application, and counts nothing where their names are
    taken.  Can go when it counts there too.
    """
    from prometheus_fastapi_instrumentator import metrics

    make = metrics.default
    made: list[Any] = []

    def make_once(**options: Any) -> Any:
        if not made:
            made.append(make(**options))
        return made[0]

    metrics.default = make_once  # type: ignore[assignment]
