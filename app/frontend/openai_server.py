"""vLLM's own OpenAI and Anthropic server over the pools, with Baton's additions.

Each model has its own server application, as vLLM's server serves only one.  Baton adds: the choice between them,
/health and /stats over the pools, /v1/models over all models, limits on the body's size and on the time that a request
takes, an HTTP error status where a stream would otherwise begin with 200 and an error event, and headers that explain
the routing or say when to try again.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from app.config import BatonConfig, LimitsConfig, ModelConfig
from app.engine_defaults import cpu_defaults
from app.errors import ConfigError
from app.frontend.authentication import Authentication
from app.frontend.http_middleware import BodyLimit, Deadline, ErrorBeforeStream, RoutingHeaders
from app.frontend.model_dispatch import ModelDispatch
from app.frontend.orchestrator import Orchestrator
from app.frontend.request_context import current_request
from app.models.source import local_path
from app.routing.retry_budget import RetryBudget
from app.tenant_usage import Accounts
from app.tenants import ANYONE, LOCAL, KeyRing

WITHOUT_MEANING = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/load",
    "/start_profile",
    "/stop_profile",
    "/ping",
    "/invocations",
    "/inference/v1/abort_requests",
)
"""Routes of vLLM's server that are about an engine in the same process, or about SageMaker, which needs one for each
model; or that do nothing here: what a client no longer wants ends with its connection."""

NAMES_AT_THE_SERVER = {
    "sglang": {"context_length": "max_model_len", "trust_remote_code": "trust_remote_code"},
    "sim": {"max_model_len": "max_model_len"},
}
"""For engines other than vLLM: the engine arguments that vLLM's server needs too, and vLLM's names for them."""

HealthReport = Callable[[], dict[str, Any]]
StatsReport = Callable[[], Awaitable[dict[str, Any]]]


def server_namespace(model: ModelConfig, index: int) -> argparse.Namespace:
    """Return the arguments of vLLM's server for model number `index`.  Raises ConfigError if it refuses one."""
    from app.frontend import vllm_surface

    parser = vllm_surface.make_arg_parser(vllm_surface.FlexibleArgumentParser())
    arguments: argparse.Namespace = parser.parse_args(
        ["--model", local_path(model.source), "--served-model-name", model.name]
    )
    arguments.disable_log_stats = True
    arguments.enable_prompt_tokens_details = True  # usage reports cached tokens
    decode_args = {**cpu_defaults("cpu"), **_args_of_server(model)}
    for section, fields in (("engine_args", decode_args), ("server_args", model.server_args)):
        for name, value in fields.items():
            if not hasattr(arguments, name):
                raise ConfigError(f"models.{index}.{section}.{name}", "vLLM's server knows no such argument")
            setattr(arguments, name, value)
    try:
        vllm_surface.validate_parsed_serve_args(arguments)
        vllm_surface.validate_api_server_args(arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"models.{index}.server_args", f"vLLM's server refuses them: {error}") from error
    return arguments


def _args_of_server(model: ModelConfig) -> dict[str, Any]:
    """Return those of the engines' arguments that vLLM's server needs too, under vLLM's names."""
    engine_args = model.merged_engine_args(model.decode)
    if model.engine == "vllm":
        return engine_args
    names = NAMES_AT_THE_SERVER[model.engine]
    return {names[name]: value for name, value in engine_args.items() if name in names and value is not None}


def frontend_config(arguments: argparse.Namespace) -> Any:
    """Make a VllmConfig for a process without an engine: it looks for no device and reads no weights."""
    from app.frontend.vllm_surface import AsyncEngineArgs, VllmConfig

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    model_config = engine_args.create_model_config()
    # Only the engines need to know the quantisation: to check it here, vLLM would ask for a GPU's capabilities.
    model_config.quantization = None
    config = VllmConfig(
        model_config=model_config, structured_outputs_config=engine_args.create_structured_outputs_config()
    )
    arguments.structured_outputs_config = config.structured_outputs_config
    return config


async def build_server(
    config: BatonConfig,
    orchestrators: Sequence[Orchestrator],
    health: HealthReport,
    stats: StatsReport,
    keys: KeyRing | None,
    accounts: Accounts,
) -> ASGIApp:
    """Make the ASGI application of all models.

    `orchestrators` has one for each of `config.models`; `keys` are those of `config.security`, if it has any, and
    `accounts` count what their tenants use.
    """
    from app.frontend import vllm_surface

    retry_budget = RetryBudget()
    for orchestrator in orchestrators:
        orchestrator.retry_budget = retry_budget
    vllm_surface.allow_several_greedy_sequences()
    vllm_surface.let_cancellation_through()
    vllm_surface.take_session_and_service_class()
    vllm_surface.leave_structural_tags_to_the_engine_client()
    vllm_surface.refuse_what_vllms_checks_cannot_take()
    if len(config.models) > 1:
        vllm_surface.count_tool_calls_by_model()
        vllm_surface.share_http_metrics()
    apps = {
        model.name: await _build_app(index, model, orchestrator, config.limits, accounts)
        for index, (model, orchestrator) in enumerate(zip(config.models, orchestrators, strict=True))
    }
    for app in apps.values():
        app.router.routes[:0] = _baton_routes(list(apps.values()), health, stats, has_keys=keys is not None)
    is_choice = len(apps) > 1 or keys is not None  # or one between a model and none
    first = apps[config.models[0].name]
    served: ASGIApp = ModelDispatch(dict(apps)) if is_choice else first
    # These wrap the applications from outside, because vLLM has already closed its own list of middlewares.
    limits = config.limits
    bounded = BodyLimit(
        RoutingHeaders(Deadline(ErrorBeforeStream(served), limits.max_request_s)),
        limits.max_body_bytes,
        max_inflight_bytes=limits.max_inflight_body_bytes,
        timeout_s=limits.body_timeout_s,
    )
    authenticated = Authentication(bounded, keys, accounts, others=ANYONE if config.security.open else LOCAL)
    # A page of another origin can read no answer without the headers of this middleware, not even a refusal.  vLLM's is
    # inside of what refuses; its headers are the same, and are replaced by those of this one.
    of_vllm: list[Any] = first.user_middleware
    cors = next(each for each in of_vllm if each.cls is CORSMiddleware)
    return CORSMiddleware(authenticated, **cors.kwargs) if cors.kwargs["allow_origins"] else authenticated


async def _build_app(
    index: int, model: ModelConfig, orchestrator: Orchestrator, limits: LimitsConfig, accounts: Accounts
) -> FastAPI:
    """Make vLLM's server of one model, without the routes that are about an engine in its process."""
    from app.frontend.engine_client import PooledEngineClient
    from app.frontend.plain_answers import PlainAnswers
    from app.frontend.vllm_answers_surface import passes_bodies_on, plain_apis
    from app.frontend.vllm_surface import build_app, init_app_state, keep_responses_by_tenant

    arguments = server_namespace(model, index)
    vllm_config = frontend_config(arguments)
    engine = PooledEngineClient(vllm_config, model, orchestrator, limits, accounts)
    app: FastAPI = build_app(arguments, ("generate",), vllm_config.model_config)
    await init_app_state(engine, app.state, arguments, ("generate",))
    keep_responses_by_tenant(app)
    _remove_routes(app, (*WITHOUT_MEANING, "/health"))
    apis = plain_apis(app.state)
    app.router.middleware_stack = PlainAnswers(
        app.router.middleware_stack, apis, engine, skips_middlewares=passes_bodies_on(app)
    )
    # vLLM's metrics try one route after the other until they know a request's name.
    app.router.routes.sort(key=lambda route: getattr(route, "path", None) not in apis)
    return app


def _baton_routes(
    apps: Sequence[FastAPI], health: HealthReport, stats: StatsReport, *, has_keys: bool
) -> list[BaseRoute]:
    async def get_health(_: Request) -> JSONResponse:
        report = health()
        is_short = has_keys and not current_request().tenant.admin
        shown = {"status": report["status"]} if is_short else report
        return JSONResponse(shown, status_code=503 if report["status"] == "unhealthy" else 200)

    async def get_stats(_: Request) -> JSONResponse:
        return JSONResponse(await stats())

    async def get_models(_: Request) -> JSONResponse:
        """Join the lists of all applications, and add what Baton knows of the models."""
        cards: list[dict[str, Any]] = []
        tenant = current_request().tenant
        for app, model in zip(apps, health()["models"], strict=True):
            if not tenant.may_use(model["name"]):
                continue
            listed = await app.state.openai_serving_models.show_available_models()
            added = {name: model[name] for name in ("engine", "mode", "local_prefill", "state")}
            cards += [{**card, **added} for card in listed.model_dump()["data"]]
        return JSONResponse({"object": "list", "data": cards})

    return [Route("/health", get_health), Route("/stats", get_stats), Route("/v1/models", get_models)]


def _remove_routes(app: FastAPI, paths: tuple[str, ...]) -> None:
    """Remove `paths` from the application and from the routers that it includes."""

    def prune(routes: list[BaseRoute]) -> None:
        for route in list(routes):
            if getattr(route, "path", None) in paths:
                routes.remove(route)
            elif (included := getattr(route, "original_router", None)) is not None:
                prune(included.routes)

    prune(app.router.routes)
