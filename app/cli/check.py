"""``baton check``: can a configuration work?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from app.cli.options import DEFAULT_CONFIG, ConfigPath, Host
from app.preflight import check as check_config
from app.preflight import check_address, check_interpreters, check_keys, check_with_sglang, check_with_vllm
from app.role_trade import describe_trade
from app.serve_document import configs, load_document
from deployments.cluster import runs_here


def check(config: ConfigPath = DEFAULT_CONFIG, host: Host = None) -> None:
    """Say whether a configuration can work, without starting anything."""
    document = load_document(config)
    device = check_thoroughly(document, host)
    typer.echo(f"{config}: ok; engines would run on {device}")
    for found in configs(document):
        for index, model in enumerate(found.models):
            if model.is_disaggregated:
                for line in describe_trade(f"models.{index}", model):
                    typer.echo(line)


def local_gpus() -> int:
    """Count the NVIDIA GPUs of this machine, without importing anything that would initialise them."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def http_options(document: dict[str, Any], host: str | None = None, port: int | None = None) -> dict[str, Any]:
    """Return where Serve listens: `host` and `port`, or else what the document says, or else loopback."""
    given = {"host": host, "port": port}
    return {
        "host": "127.0.0.1",
        "port": 8000,
        **document.get("http_options", {}),
        **{name: value for name, value in given.items() if value is not None},
    }


def check_document(document: dict[str, Any], host: str | None = None) -> str:
    """Check everything that takes no noticeable time, and return the device.

    `host` is where Serve is to listen instead of at the document's.  Raises ConfigError.
    """
    found = configs(document)
    devices = [check_config(config, [local_gpus()]) for config in found]
    for config in found:
        check_address(config, http_options(document, host)["host"])
        if runs_here():
            check_interpreters(config)
            check_keys(config)
    return devices[0]


def check_thoroughly(document: dict[str, Any], host: str | None = None) -> str:
    """Check all that `check_document` does, ask Serve and the engines too, and return the device.

    This takes seconds.  Raises ConfigError.
    """
    from deployments.build import check_autoscaling
    from deployments.process import without_collections

    device = check_document(document, host)
    for config in configs(document):
        check_autoscaling(config)
        with without_collections():
            check_with_vllm(config, check_config(config, [local_gpus()]))
        if runs_here():
            check_with_sglang(config)
    return device
