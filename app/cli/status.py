"""``baton status``: the running application as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from deployments.application import LinkStatus, Status


def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show the running application: replicas, how many are wanted and why, how KV moves between them, and the nodes."""
    from deployments.application import read_status  # imported here, as it imports Ray: other commands save seconds

    found = read_status()
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        print_status(found, Console(highlight=False))


def print_status(found: Sequence[Status], console: Console) -> None:
    for status in found:
        nodes = ", ".join(f"{count} {group}" for group, count in status.nodes.items())
        console.print(f"[bold]{status.application}[/bold]: {status.status}   nodes: {nodes}")
        if status.message:
            console.print(status.message, markup=False)
        table = Table("deployment", "replicas", "target", "bounds", "why", box=None, pad_edge=False)
        for pool in status.pools:
            replicas = ", ".join(f"{count} {state}" for state, count in pool.replicas.items()) or "none"
            replicas += "".join(f" ({count} as {role})" for role, count in pool.switched.items())
            why = pool.plan["reason"] if pool.plan else "a fixed number"
            table.add_row(pool.name, replicas, str(pool.target), pool.bounds, why)
        console.print(table)
        if status.links:
            console.print(_link_table(status.links))
        for pool in status.pools:
            if pool.status != "HEALTHY" and pool.message:
                console.print(f"{pool.name} {pool.status}: {pool.message}", markup=False)


def _link_table(links: Sequence[LinkStatus]) -> Table:
    """One row for each pair of a decode and a prefill replica; a dash is what the engine does not tell."""
    table = Table("decode", "prefill", "KV moves by", "GB/s", "latency", "probe", "problem", box=None, pad_edge=False)
    for link in links:
        table.add_row(
            link.decode_replica,
            link.prefill_replica,
            link.transport or "-",
            "-" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e9:.3g}",
            _ms(link.latency_s),
            _ms(link.probe_s),
            link.problem or "none",
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms"
