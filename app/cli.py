"""The ``baton`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.bench.cli import bench
from app.bench.prefix_cache import bench_cache
from app.bench.routing.cli import bench_routing
from app.bench.scaling import bench_scaling
from app.errors import BatonError
from app.serve_document import edit
from app.smoke import smoke

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[Path, typer.Argument(help="A Serve config file.")]
DEFAULT_CONFIG = Path("serve_config.yaml")


@app.command()
def run(
    config: ConfigPath = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Instead of http_options.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of http_options.port.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Ray's dashboard, if Ray is started here.")] = True,
    verbose: Annotated[bool, typer.Option(help="Show the replicas' logs here.")] = False,
) -> None:
    """Start Ray and the application here and serve until Ctrl-C.  MODEL=... replaces the only model."""
    from app import launch

    launch.run(config, host, port, dashboard, verbose)


@app.command()
def check(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Say whether a configuration can work, without starting anything."""
    from app import launch

    device = launch.check_thoroughly(launch.load_document(config))
    typer.echo(f"{config}: ok; engines would run on {device}")


@app.command()
def environments(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Print what a configuration needs besides .venv, one name a line, for scripts/setup.sh."""
    from app import launch

    for name in launch.environments(launch.load_document(config)):
        typer.echo(name)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show the running application: the replicas of each pool, how many it aims at and why, and the nodes."""
    import msgspec
    from rich.console import Console

    from app.running import print_status, read_status

    found = read_status()
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        print_status(found, Console(highlight=False))


@app.command()
def scale(
    name: Annotated[str, typer.Argument(help="A model's name, or the application's if it serves one model.")],
    targets: Annotated[list[str], typer.Argument(metavar="POOL=N|POOL=MIN..MAX...", help="frontend, prefill, decode.")],
    file: Annotated[
        Path | None, typer.Option(allow_dash=True, help="Change this Serve config (- is standard input) and print it.")
    ] = None,
) -> None:
    """Change how many replicas pools of the running application have, or between which bounds they scale."""
    from app.scale import parse_targets, scale_file

    wanted = parse_targets(targets)
    if file is not None:
        typer.echo(scale_file(Path("/dev/stdin") if str(file) == "-" else file, name, wanted), nl=False)
        return
    from app.running import scale_running

    for line in scale_running(name, wanted):
        typer.echo(line)


@app.command()
def verify(
    url: Annotated[str, typer.Option(help="Where Baton serves.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first that is disaggregated.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="An aggregated model there of the same weights, to compare with.")
    ] = None,
    spoil: Annotated[bool, typer.Option(help="Give decode wrong KV: the check must then fail.")] = False,
    tolerance: Annotated[
        float | None, typer.Option(help="Logprob difference that always passes; by default 0.03, or 0.2 by prefill.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
) -> None:
    """Compare output under disaggregation with output without it, on the running application."""
    from app.verify import verify as run_verify

    if not run_verify(url, model=model, reference=reference, spoil=spoil, tolerance=tolerance, seed=seed):
        raise typer.Exit(1)


app.command()(bench)
app.command()(bench_cache)
app.command()(smoke)
app.command()(edit)
app.add_typer(bench_routing, name="bench-routing")
app.command()(bench_scaling)


@app.command()
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
) -> None:
    """Measure how long the engine of a running server takes, and write a profile for the sim engine."""
    from app.engines.sim_profile import TransferTimes
    from app.profile import profile as run_profile

    transfer = TransferTimes(base_s=transfer_base_ms / 1e3, bytes_per_s=transfer_gb_per_s * 1e9)
    run_profile(
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


def main() -> None:
    """Run the command; an error that Baton raised on purpose is one line and exit code 2."""
    try:
        app()
    except (BatonError, RuntimeError) as error:
        typer.echo(f"baton: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
