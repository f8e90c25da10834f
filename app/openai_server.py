"""vLLM's own OpenAI and Anthropic server over the disaggregated engine, with what Baton adds to it.

Baton adds: /health and /stats over the pools, a bound on the body's size, and an HTTP error status where a stream
would otherwise begin with 200 and an error event.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from app.config import BatonConfig, ModelConfig
from app.engines.vllm import cpu_defaults
from app.errors import ConfigError
from app.http_middleware import BodyLimit, ErrorBeforeStream
from app.model_source import local_path
from app.orchestrator import Orchestrator
from app.vllm_compat import allow_several_greedy_sequences

WITHOUT_MEANING = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/load",
    "/start_profile",
    "/stop_profile",
    "/ping",
)
"""Routes of vLLM's server that speak of an engine in the same process."""

HealthReport = Callable[[], dict[str, Any]]
StatsReport = Callable[[], Awaitable[dict[str, Any]]]


def server_namespace(model: ModelConfig) -> argparse.Namespace:
    """The arguments of vLLM's server.  Raises ConfigError for one that it does not know or accept."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    arguments: argparse.Namespace = parser.parse_args(
        ["--model", local_path(model.source), "--served-model-name", model.name]
    )
    arguments.disable_log_stats = True
    arguments.enable_prompt_tokens_details = True  # usage reports cached tokens
    decode_args = {**cpu_defaults("cpu"), **_args_of_server(model)}
    for section, fields in (("engine_args", decode_args), ("server_args", model.server_args)):
        for name, value in fields.items():
            if not hasattr(arguments, name):
                raise ConfigError(f"models.0.{section}.{name}", "vLLM's server knows no such argument")
            setattr(arguments, name, value)
    try:
        validate_parsed_serve_args(arguments)
        validate_api_server_args(arguments)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError("models.0.server_args", f"vLLM's server refuses them: {error}") from error
    return arguments


def _args_of_server(model: ModelConfig) -> dict[str, Any]:
    """What vLLM's server has to know of the engines' arguments; most of another engine's mean nothing to it."""
    engine_args = model.merged_engine_args(model.decode)
    if model.decode.engine == "vllm":
        return engine_args
    return {name: value for name, value in engine_args.items() if name == "max_model_len" and value is not None}


def frontend_config(arguments: argparse.Namespace) -> Any:
    """A VllmConfig for a process without an engine: no device is looked for, no weights are read."""
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    model_config = engine_args.create_model_config()
    # Quantisation is the engines' affair: checking it here would ask for a GPU's capabilities.
    model_config.quantization = None
    config = VllmConfig(
        model_config=model_config, structured_outputs_config=engine_args.create_structured_outputs_config()
    )
    arguments.structured_outputs_config = config.structured_outputs_config
    return config


async def build_server(
    config: BatonConfig, orchestrator: Orchestrator, health: HealthReport, stats: StatsReport
) -> ASGIApp:
    """The ASGI application of one model."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    from app.disaggregated_engine import DisaggregatedEngine

    allow_several_greedy_sequences()
    model = config.models[0]
    arguments = server_namespace(model)
    vllm_config = frontend_config(arguments)
    engine = DisaggregatedEngine(vllm_config, model.name, orchestrator)
    app: FastAPI = build_app(arguments, ("generate",), vllm_config.model_config)
    await init_app_state(engine, app.state, arguments, ("generate",))
    _remove_routes(app, (*WITHOUT_MEANING, "/health"))
    app.router.routes[:0] = _baton_routes(health, stats)
    # Around the application and not inside it: vLLM has already closed its list of middlewares.
    return BodyLimit(ErrorBeforeStream(app), config.limits.max_body_bytes)


def _baton_routes(health: HealthReport, stats: StatsReport) -> list[BaseRoute]:
    async def get_health(_: Request) -> JSONResponse:
        report = health()
        return JSONResponse(report, status_code=503 if report["status"] == "unhealthy" else 200)

    async def get_stats(_: Request) -> JSONResponse:
        return JSONResponse(await stats())

    return [Route("/health", get_health), Route("/stats", get_stats)]


def _remove_routes(app: FastAPI, paths: tuple[str, ...]) -> None:
    """Take `paths` out of the application, from routers included in it as well."""

    def prune(routes: list[BaseRoute]) -> None:
        for route in list(routes):
            if getattr(route, "path", None) in paths:
                routes.remove(route)
            elif (included := getattr(route, "original_router", None)) is not None:
                prune(included.routes)

    prune(app.router.routes)
