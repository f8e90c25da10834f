"""``baton profile``: measure an engine for ``engine: sim``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.bench.client import use_key
from app.bench.engine_profile import measure_profile
from app.cli.options import ApiKey
from app.engines.sim.profile import TransferTimes


def profile(
    output: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    about: Annotated[str, typer.Option(help="Engine, version, machine: the endpoint does not tell.")] = "an engine",
    url: Annotated[str, typer.Option(help="Where any OpenAI server answers.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the server's first one.")] = None,
    max_prompt: Annotated[int, typer.Option(min=128, help="Longest prompt; no more than one step takes.")] = 2048,
    max_batch: Annotated[int, typer.Option(min=1, help="Streams at a time, at most.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Each time is the median of so many.")] = 5,
    kv_bytes_per_token: Annotated[int, typer.Option(min=1, help="Not measured; by default a Llama-8B's.")] = 131072,
    transfer_base_ms: Annotated[float, typer.Option(min=0, help="Not measured: what any transfer takes.")] = 5.0,
    transfer_gb_per_s: Annotated[float, typer.Option(min=1e-3, help="Not measured: the link's speed.")] = 25.0,
    api_key: ApiKey = None,
) -> None:
    """Measure how long the engine of a running server takes, and write a profile for the sim engine."""
    use_key(api_key)
    transfer = TransferTimes(base_s=transfer_base_ms / 1e3, bytes_per_s=transfer_gb_per_s * 1e9)
    measure_profile(
        url,
        model,
        output,
        max_prompt=max_prompt,
        max_batch=max_batch,
        repeat=repeat,
        transfer=transfer,
        kv_bytes_per_token=kv_bytes_per_token,
        about=about,
    )
