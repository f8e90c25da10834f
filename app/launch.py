"""``baton run``: Ray, Serve and the application in one foreground process, with progress.

What it starts is what ``serve run`` starts from the same file; it adds the check before, the progress during, the
hints after and Serve flags that make streaming cheap (measured in docs/decisions/0003-serve-flags.md).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from app import haproxy
from app.config import BatonConfig, parse
from app.errors import ConfigError
from app.model_source import is_folder
from app.ports import free_port
from app.preflight import check, check_interpreters, check_with_sglang, check_with_vllm

RAY_FLAGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # HTTP goes through HAProxy to the frontends, instead of through a Python proxy and a call for each chunk.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a Python process would read a line for each request; /metrics has them
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 s are for load balancers outside the cluster
    # When frontends come or go a new HAProxy takes over; the old one has so long to end its streams, by default 120 s.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    # Replicas report their load (deployments/autoscaling.py); by default Serve also counts the calls of handles.
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # ten loops a second are 2 % of a core, whatever happens
    "RAY_worker_niceness": "0",  # Ray's own choice is 15: on a busy machine serving would come last
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few for two busy cores
}
"""Environment of every Ray and Serve process, unless the user has set it otherwise."""


def load_document(path: Path) -> dict[str, Any]:
    """The Serve config file with the environment's MODEL put into it.  Raises ConfigError."""
    try:
        document: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), error.strerror or "cannot be read") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is not text") from error
    applications = document.get("applications") if isinstance(document, dict) else None
    if not applications:
        raise ConfigError(str(path), "has no `applications`: it must be a Serve config file")
    if not isinstance(applications, list) or not all(isinstance(application, dict) for application in applications):
        raise ConfigError(str(path), "`applications` is not a list of mappings")
    if model := os.environ.get("MODEL"):
        for application in document["applications"]:
            _replace_model(application, model)
    return dict(document)


def _replace_model(application: dict[str, Any], source: str) -> None:
    models = parse(application.get("args") or {}).models
    if len(models) > 1:
        raise ConfigError(
            "models", f"MODEL={source} replaces the model of a configuration that has one, and here are {len(models)}"
        )
    application["args"]["models"][0].update(source=source, name=served_name(source))


def served_name(source: str) -> str:
    """What clients call a model that only its source is known of: its id, or its folder's name."""
    return re.sub(r"[^\w.@:-]+", "-", Path(source).resolve().name) if is_folder(source) else source


def local_gpus() -> int:
    """NVIDIA GPUs of this machine, without importing anything that would initialise them."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def check_document(document: dict[str, Any]) -> str:
    """Check what can be checked in an instant and return the device.  Raises ConfigError."""
    configs = _configs(document)
    devices = [check(config, [local_gpus()]) for config in configs]
    if _engines_run_here():
        for config in configs:
            check_interpreters(config)
    return devices[0]


def _engines_run_here() -> bool:
    """Whether Ray is started on this machine; RAY_ADDRESS names a cluster that runs elsewhere."""
    return "RAY_ADDRESS" not in os.environ


def environments(document: dict[str, Any]) -> list[str]:
    """The environments, besides Ray's own, that pools run in; ``scripts/setup.sh NAME`` makes one."""
    engines = {model.engine for config in _configs(document) for model in config.models}
    return sorted(engines & {"sglang"})


def check_thoroughly(document: dict[str, Any]) -> str:
    """Also ask Serve and the engines, which takes seconds, and return the device.  Raises ConfigError."""
    from app.build import check_autoscaling

    device = check_document(document)
    for config in _configs(document):
        check_autoscaling(config)
        check_with_vllm(config, check(config, [local_gpus()]))
        if _engines_run_here():
            check_with_sglang(config)
    return device


def _configs(document: dict[str, Any]) -> list[BatonConfig]:
    return [parse(application.get("args") or {}) for application in document["applications"]]


def run(path: Path, host: str | None, port: int | None, dashboard: bool, verbose: bool) -> None:
    """Serve until SIGINT or SIGTERM.  Raises ConfigError, or RuntimeError if the application does not come up."""
    console = Console(stderr=True, highlight=False)
    started_at = time.monotonic()
    document = load_document(path)
    device = check_document(document)
    console.print(f"{path}: ok; engines run on {device}" + ("" if device == "cuda" else " (no GPU found)"))
    http = {
        **document.get("http_options", {}),
        **({"host": host} if host else {}),
        **({"port": port} if port else {}),
    }
    stop = threading.Event()
    _set_on_signals(stop)
    # Asking vLLM takes as long as Ray takes to start, and must not touch this process's environment.
    thorough = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "check", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    start_cluster(http, document.get("proxy_location", "EveryNode"), dashboard, verbose)
    _set_on_signals(stop)  # again: Ray's own handler of SIGTERM ends this process at once, and leaves HAProxy behind
    try:
        _, problem = thorough.communicate()
        if thorough.returncode:
            raise RuntimeError(problem.strip().splitlines()[-1].removeprefix("baton: "))
        deploy(document, console, stop)
        if not stop.is_set():
            _say_ready(document, http, console, time.monotonic() - started_at)
            stop.wait()
        console.print("stopping")
    finally:
        stop_cluster()


def _set_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def ray_environment() -> dict[str, str]:
    """RAY_FLAGS, Baton's HAProxy, and ports of its own for what would else listen on a fixed one."""
    ports = {name: str(free_port()) for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")}
    return {**RAY_FLAGS, "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.command(), **ports}


def start_cluster(http: dict[str, Any], proxy_location: str, dashboard: bool, verbose: bool) -> None:
    """Start Ray here, or connect to the cluster that RAY_ADDRESS names, and Serve on it."""
    for name, value in ray_environment().items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    if _engines_run_here():
        ray.init(address="local", include_dashboard=dashboard, log_to_driver=verbose)
    else:
        ray.init(log_to_driver=verbose)
    serve.start(proxy_location=proxy_location, http_options=http)


def stop_cluster() -> None:
    """End Serve, and Ray if it was started here."""
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


def deploy(document: dict[str, Any], console: Console, stop: threading.Event) -> None:
    """Deploy the applications and return when they serve or `stop` is set.  Raises RuntimeError.

    As ``serve run`` and KubeRay do it, so that ``baton scale`` finds their configuration in the cluster.
    """
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": document["applications"]}))
    _wait_until_running(console, stop)


def _wait_until_running(console: Console, stop: threading.Event) -> None:
    from ray import serve

    began = time.monotonic()
    said: dict[str, str] = {}
    while not stop.wait(0.5):
        applications = serve.status().applications
        for application in applications.values():
            for name, deployment in application.deployments.items():
                state = " ".join(f"{count} {state.lower()}" for state, count in deployment.replica_states.items())
                if state and said.get(name) != state:
                    said[name] = state
                    console.print(f"{time.monotonic() - began:5.0f} s  {name}: {state}")
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"the application did not come up: {application.message}")
        if all(application.status == "RUNNING" for application in applications.values()):
            return


def _say_ready(document: dict[str, Any], http: dict[str, Any], console: Console, seconds: float) -> None:
    base = f"http://{http.get('host', '127.0.0.1')}:{http.get('port', 8000)}"
    models = [model.name for config in _configs(document) for model in config.models]
    console.print(f"\n[bold]Baton serves {', '.join(models)} at {base}[/bold] (after {seconds:.0f} s).  Try:")
    console.print(
        f"""  curl {base}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{models[0]}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
  curl {base}/health      baton verify --url {base}
API reference: {base}/docs      Ctrl-C stops it.""",
        markup=False,
        soft_wrap=True,  # or a terminal's width would break the commands
    )
