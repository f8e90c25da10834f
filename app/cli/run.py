"""``baton run``: Ray, Serve and the application in one foreground process, with progress.

It starts the same application as ``serve run`` does from the same file.  It adds a check before the start, progress
during it, hints after it, and Serve flags that make streaming cheap (deployments/cluster.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from app.cli.check import check_document, http_options
from app.cli.options import DEFAULT_CONFIG, ConfigPath, Host
from app.engine_defaults import cpu_dtype, takes_default_dtype
from app.serve_document import configs, load_document
from deployments.cluster import start_cluster, stop_cluster


def run(
    config: ConfigPath = DEFAULT_CONFIG,
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Instead of http_options.port.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Ray's dashboard, if Ray is started here.")] = True,
    verbose: Annotated[bool, typer.Option(help="Show the replicas' logs here.")] = False,
) -> None:
    """Start Ray and the application here and serve until Ctrl-C.  MODEL=... replaces the only model."""
    console = Console(stderr=True, highlight=False)
    started_at = time.monotonic()
    document = load_document(config)
    device = check_document(document, host)
    console.print(f"{config}: ok; engines run on {describe_device(document, device)}", soft_wrap=True)
    http = http_options(document, host, port)

    def say(what: str) -> None:
        console.print(f"{time.monotonic() - started_at:5.0f} s  {what}", soft_wrap=True)

    stop = threading.Event()
    _set_on_signals(stop)
    # vLLM's check takes as long as Ray's start, so both run at once.  It has a process of its own because it changes
    # the environment.
    thorough = subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", "check", str(config), "--host", http["host"]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    say("starting Ray; meanwhile vLLM checks the configuration")
    dashboard_address = start_cluster(http, document.get("proxy_location", "EveryNode"), dashboard, verbose)
    _set_on_signals(stop)  # again, as Ray's own handler of SIGTERM ends this process at once and leaves HAProxy running
    try:
        if thorough.poll() is None:
            say("waiting for vLLM's check of the configuration")
        _, problem = thorough.communicate()
        if thorough.returncode:
            raise RuntimeError(problem.strip().splitlines()[-1].removeprefix("baton: "))
        from deployments.application import deploy

        say("deploying")
        deploy(document, say, stop)
        if not stop.is_set():
            _say_ready(document, http, console, time.monotonic() - started_at)
            if dashboard_address:
                _say_dashboard(dashboard_address, console)
            stop.wait()
        console.print("stopping")
    finally:
        stop_cluster()


def describe_device(document: dict[str, Any], device: str) -> str:
    """Describe the device.  For a CPU this includes the dtype that Baton chooses for models that set none."""
    if device != "cpu":
        return device
    dtype = ""
    if any(takes_default_dtype(config) for config in configs(document)):
        dtype = cpu_dtype()
        dtype = f" with {dtype}" + (": this CPU emulates bfloat16" if dtype == "float32" else "")
    return f"cpu{dtype} (no GPU found)"


def _set_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _say_ready(document: dict[str, Any], http: dict[str, Any], console: Console, seconds: float) -> None:
    base = f"http://{http['host']}:{http['port']}"
    models = [model.name for config in configs(document) for model in config.models]
    console.print(f"\n[bold]Baton serves {', '.join(models)} at {base}[/bold] (after {seconds:.0f} s).  Try:")
    console.print(
        f"""  curl {base}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{models[0]}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'
  curl {base}/health      baton verify --url {base}
API reference: {base}/docs      Ctrl-C stops it.""",
        markup=False,
        soft_wrap=True,  # otherwise long commands would be broken at the terminal's width
    )


def _say_dashboard(address: str, console: Console) -> None:
    """Say where Ray's dashboard is, and what prints the token without which its API answers 401 and its pages ask."""
    asks = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"  # as Ray has set it by now, unless the user has
    token = "; the token that it asks for: ray get-auth-token" if asks else ""
    console.print(f"Ray's dashboard: http://{address}{token}", soft_wrap=True)
