"""What upstream packages still do, or lack, so that Baton has to patch or bypass them.

One that fails means that upstream has changed: its docstring says what can then be deleted.  That the names which are
used are there is checked where they are imported (app/upstream.py).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve._private.router import AsyncioRouter
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.schema import ServeApplicationSchema
from starlette.testclient import TestClient

from app.config import parse
from deployments.build import REPORT_S
from deployments.cluster import FIXED_PORTS, LOOPBACK, RAY_FLAGS, ray_environment

RAY = Path(ray.__file__).parent


# Ray and Ray Serve


def test_serve_gives_an_application_a_new_version_with_new_args() -> None:
    """Else: `fix_version` in deployments/serve_hooks.py, and the hash in deployments/build.py."""
    from ray.serve._private.deploy_utils import get_app_code_version

    one, other = (
        ServeApplicationSchema(name="baton", import_path="deployments.build:build", args={"number": number})
        for number in (1, 2)
    )
    assert get_app_code_version(one) != get_app_code_version(other)


def test_serve_takes_no_version_for_a_deployment() -> None:
    """Else: `fix_version` in deployments/serve_hooks.py, in favour of ``options(version=...)``."""
    with pytest.raises(ValueError, match="version"):
        serve.deployment(type("Replica", (), {})).options(version="1")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (serve, "get_client"),
        (serve, "deploy_apps"),
        (serve.context, "get_global_client"),
        (ray.experimental.internal_kv, "internal_kv_get"),
        (ray.experimental.internal_kv, "internal_kv_put"),
        (DeploymentResponse, "to_object_ref"),
        (serve.Deployment, "deployment_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ray_has_no_public_name_for_it(owner: Any, name: str) -> None:
    """Else: the underscore of the same name in deployments/serve_hooks.py."""
    assert not hasattr(owner, name)


def test_calls_by_reference_have_no_public_option() -> None:
    """Else: the underscore in `call_by_reference` in deployments/serve_hooks.py."""
    assert "by_reference" not in inspect.signature(DeploymentHandle.options).parameters


@pytest.mark.parametrize("name", ["options", "choose_replica", "remote"])
def test_a_handle_cannot_be_told_which_replica_to_call(name: str) -> None:
    """Else: `ChosenReplicaRouter` in deployments/serve_hooks.py and the whole of deployments/frontend/request_router.py
    but for its keeping of `ReadyReplicas`."""
    assert "replica_id" not in inspect.signature(getattr(DeploymentHandle, name)).parameters


def test_serve_asks_replicas_whether_they_take_a_call_whatever_its_router_says() -> None:
    """Else: `_WithoutRejection` in deployments/serve_hooks.py, as a router may say no by a property of its own."""
    assert "supports_rejection_protocol" in vars(RequestRouter)
    assert "supports_rejection_protocol" not in AsyncioRouter._route_and_send_request_once.__code__.co_names


def test_an_ingress_that_makes_its_application_itself_needs_a_special_name() -> None:
    """Else: `AsgiIngress` in deployments/serve_hooks.py."""
    with pytest.raises(ValueError, match="__serve_build_asgi_app__"):
        serve.ingress()(type("Frontend", (), {}))


@pytest.mark.parametrize("lacks", ["deployed_app_config", "target_num_replicas"])
def test_the_public_status_says_less_than_the_details(lacks: str) -> None:
    """Else: `serve_details` in deployments/serve_hooks.py, in favour of ``serve.status``."""
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

    fields = {**ApplicationStatusOverview.__dataclass_fields__, **DeploymentStatusOverview.__dataclass_fields__}
    assert lacks not in fields


def test_serves_haproxy_splices_request_bodies() -> None:
    """Else: ``-dS`` in deployments/haproxy.py."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    assert "option splice-request" in HAPROXY_CONFIG_TEMPLATE


@pytest.mark.parametrize(
    "line",
    [
        "stats socket {{ config.socket_path }} mode 666 level admin",
        "frontend prometheus\n    bind :{{ config.metrics_port }}",
        "listen stats\n  bind *:{{ config.stats_port }}",
    ],
)
def test_serves_haproxy_is_open_to_others(line: str) -> None:
    """Else: that part of `safer` in deployments/haproxy.py; with all parts gone, also ``baton-haproxy`` in
    pyproject.toml and RAY_SERVE_HAPROXY_BINARY_PATH."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    assert line in HAPROXY_CONFIG_TEMPLATE


def test_serves_haproxy_makes_500_of_its_own_errors() -> None:
    """Else: OWN_ERRORS in deployments/haproxy.py."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    assert "errorfile 502 {{ config.error_file_path }}" in HAPROXY_CONFIG_TEMPLATE


def test_serve_sets_no_time_for_a_requests_headers_nor_for_its_wait() -> None:
    """Else: HEADERS_S or QUEUE_S in deployments/haproxy.py."""
    from ray.serve._private.haproxy import HAProxyConfig

    assert HAProxyConfig().timeout_http_request_s is None
    assert HAProxyConfig().timeout_queue_s is None


def test_replicas_report_their_load_too_seldom_by_themselves() -> None:
    """Else: REPORT_S in deployments/build.py."""
    assert AutoscalingConfig().metrics_interval_s > REPORT_S


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """Serve's constants in a process without Baton's environment."""
    code = (
        "import json, ray.serve._private.constants as constants;"
        "print(json.dumps({name: value for name, value in vars(constants).items()"
        " if isinstance(value, bool | int | float)}))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("flag", [name for name in RAY_FLAGS if name.startswith("RAY_SERVE_")])
def test_serve_knows_a_flag_and_does_otherwise_without_it(flag: str, defaults: dict[str, Any]) -> None:
    """Else: the flag in RAY_FLAGS in deployments/cluster.py, or its name, which Serve ignores without a word."""
    source = (RAY / "serve/_private/constants.py").read_text()
    assert f'"{flag}"' in source
    default = defaults.get(flag, defaults.get(flag.removeprefix("RAY_SERVE_")))
    assert default is not None
    assert float(default) != float(RAY_FLAGS[flag])


@pytest.mark.parametrize("variable", FIXED_PORTS)
def test_serve_has_a_port_that_all_clusters_would_share(variable: str, defaults: dict[str, Any]) -> None:
    """Else: the variable in FIXED_PORTS in deployments/cluster.py, or its name."""
    source = (RAY / "serve/_private/constants.py").read_text()
    assert f'"{variable}"' in source
    assert int(ray_environment()[variable]) != defaults[variable]


def test_ray_looks_at_the_machines_own_address_for_a_cluster_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: `look_on_loopback` in deployments/serve_hooks.py."""
    from ray._private import ray_constants, services

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda _: "192.0.2.1")
    assert services.resolve_ip_for_localhost("127.0.0.1") == "192.0.2.1"


def test_ray_takes_loopback_for_the_address_of_a_node_that_is_alone() -> None:
    """Else: RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER in deployments/cluster.py, which Ray has for other systems."""
    code = "import ray; print(ray.util.get_node_ip_address())"
    environment = {**os.environ, **LOOPBACK}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert answer.stdout.split() == ["127.0.0.1"]


@pytest.mark.parametrize("flag", [name for name in RAY_FLAGS if not name.startswith("RAY_SERVE_")])
def test_ray_knows_a_flag(flag: str) -> None:
    """Else: the flag in RAY_FLAGS in deployments/cluster.py."""
    of_python = (RAY / "_private/log_monitor.py").read_text()
    assert (
        f'"{flag}"' in of_python
        or flag.removeprefix("RAY_").encode() in (RAY / "core/src/ray/raylet/raylet").read_bytes()
    )


# vLLM's server


@pytest.fixture(scope="module")
def surface() -> Any:
    from app.frontend import vllm_surface

    return vllm_surface


def test_vllm_refuses_several_greedy_sequences(surface: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: `allow_several_greedy_sequences` in app/frontend/vllm_surface.py."""
    monkeypatch.setattr(surface.SamplingParams, surface.GREEDY_CHECK.name, surface.GREEDY_CHECK.original)
    with pytest.raises(surface.VLLMValidationError):
        surface.SamplingParams(n=2, temperature=0)


async def test_a_handler_goes_on_when_its_request_is_cancelled(surface: Any) -> None:
    """Else: `let_cancellation_through` in app/frontend/vllm_surface.py."""
    handlers: list[asyncio.Task[None]] = []
    begun = asyncio.Event()

    async def handler(body: object, raw_request: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.append(task)
        begun.set()
        await asyncio.Event().wait()

    async def receive() -> None:
        await asyncio.Event().wait()

    others = asyncio.all_tasks()
    request = asyncio.create_task(surface.WITH_CANCELLATION.original(handler)(None, SimpleNamespace(receive=receive)))
    await begun.wait()
    request.cancel()
    await asyncio.wait([request])
    (running,) = handlers
    is_cancelled = running.cancelling() > 0 or running.done()
    left = asyncio.all_tasks() - others
    for task in left:
        task.cancel()
    await asyncio.wait(left)
    assert not is_cancelled


def test_the_user_names_no_session_by_itself(surface: Any) -> None:
    """Else: `take_session_and_service_class` in app/frontend/vllm_surface.py."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    openai = CompletionRequest(model="tiny", prompt="hello", user="me")
    assert surface.SESSION_ID.original(openai, None) is None
    messages = [{"role": "user", "content": "hello"}]
    anthropic = AnthropicMessagesRequest(model="tiny", max_tokens=1, messages=messages, metadata={"user_id": "me"})
    assert surface.ANTHROPIC_REQUEST.original(anthropic, messages).user is None


def test_vllm_translates_structural_tags_while_it_parses_a_body(surface: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: `leave_structural_tags_to_the_engine_client` in app/frontend/vllm_surface.py."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    check = surface.STRUCTURAL_TAG_CHECK
    monkeypatch.setattr(check.owner, check.name, check.original)
    with pytest.raises(surface.VLLMValidationError, match="structural_tag"):
        CompletionRequest(model="tiny", prompt="hello", structured_outputs={"structural_tag": '{"triggers": 1}'})


def test_vllms_checks_fail_at_a_field_of_another_type(surface: Any) -> None:
    """Else: `refuse_what_vllms_checks_cannot_take` in app/frontend/vllm_surface.py."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    with pytest.raises(AttributeError):
        CompletionRequest(model="tiny", prompt="hello", structured_outputs=1)


def test_vllm_counts_tool_calls_under_the_model_that_was_set_up_last(
    surface: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else: `count_tool_calls_by_model` in app/frontend/vllm_surface.py."""
    counter = Mock()
    monkeypatch.setattr(surface.parser_metrics, "_tool_call_parser_invocations", counter)
    monkeypatch.setattr(surface.parser_metrics, "_model_name", "last")
    request = SimpleNamespace(model="first")
    surface.TOOL_CALL_COUNT.original(is_tool_called=True, is_streaming=False, request=request)
    assert counter.labels.call_args.kwargs["model_name"] == "last"


def test_http_metrics_count_nothing_for_a_second_application(surface: Any) -> None:
    """Else: `share_http_metrics` in app/frontend/vllm_surface.py."""
    registry = CollectorRegistry()
    assert surface.HTTP_METRICS.original(registry=registry) is not None
    assert surface.HTTP_METRICS.original(registry=registry) is None


def test_vllms_server_imports_what_silences_the_root_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else: `build_app` in app/frontend/vllm_surface.py, in favour of vLLM's own."""
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)  # before the import, which sets the level too
    importlib.import_module("model_hosting_container_standards.logging_config").configure_root_logger()
    assert root.level == logging.ERROR


def test_vllms_server_has_routes_that_speak_of_an_engine_in_its_process(surface: Any) -> None:
    """Else: the path in WITHOUT_MEANING in app/frontend/openai_server.py, and if all fail here, `_remove_routes` no
    longer finds them.  Those for profiling are there only where vLLM is told to profile."""
    from app.frontend.openai_server import WITHOUT_MEANING, _remove_routes, frontend_config, server_namespace

    (model,) = parse({"models": [{"name": "tiny", "source": "baton:tiny", "decode": {"engine": "sim"}}]}).models
    arguments = server_namespace(model, 0)
    surface.let_cancellation_through()  # building the application imports the routers
    app = surface.build_app(arguments, ("generate",), frontend_config(arguments).model_config)
    client = TestClient(app, raise_server_exceptions=False)
    paths = {"/health", *WITHOUT_MEANING} - {"/start_profile", "/stop_profile"}

    def found() -> set[str]:
        return {path for path in paths if client.get(path).status_code != HTTPStatus.NOT_FOUND}

    assert found() == paths
    _remove_routes(app, ("/health", *WITHOUT_MEANING))
    assert not found()
