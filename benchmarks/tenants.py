"""``python -m benchmarks.tenants``: what a tenant that floods the service does to another one, and what overload costs.

    make run CONFIG=cluster/local/sim-tenants.yaml

1. *capacity*: requests/s that are served with always WAITING of them under way.
2. *alone*: the tenant quiet asks at half of its share of that, in an open loop.
3. *beside a flood*: the same, while the tenant flood asks at ten times its own share.
4. *overload*: flood alone at four times the capacity.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console

from app.bench.client import find_card, new_async_client, new_client, parse_url
from app.bench.picture import COLOURS, PAGE_INCHES
from app.bench.report import Source, markdown_table, this_run
from app.cli.entry import run_app, to_app

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEYS = {"quiet": "baton-quiet", "flood": "baton-flood"}
"""Those of cluster/local/tenants.yaml."""
WAITING = 48
PROMPT_TOKENS, OUTPUT_TOKENS = 1900, 16
CAPACITY_S, SETTLED_S = 20.0, 5.0
SHARE = 0.5
"""Of each of two tenants with one weight."""
ANSWER_TIMEOUT_S = 120.0


class Reply(msgspec.Struct, frozen=True):
    """One request."""

    tenant: str
    status: int
    sent_at: float
    """In seconds since its phase began."""
    first_s: float
    """From then to the first token, or to the refusal."""
    ended_s: float


class Phase(msgspec.Struct):
    """What came of the requests of one time."""

    name: str
    seconds: float
    rates: dict[str, float]
    """Requests/s by tenant."""
    replies: list[Reply] = []

    def served(self, tenant: str) -> list[Reply]:
        """Those of a tenant that were served, without those of the first SETTLED_S seconds."""
        return [r for r in self.replies if (r.tenant, r.status) == (tenant, 200) and r.sent_at >= SETTLED_S]

    def refused(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status != 200 and reply.sent_at >= SETTLED_S]

    @property
    def goodput(self) -> float:
        """Requests/s that ended within the phase, after SETTLED_S seconds."""
        ends = [r.sent_at + r.ended_s for r in self.replies if r.status == 200]
        return sum(SETTLED_S <= end <= self.seconds for end in ends) / (self.seconds - SETTLED_S)


class TenantsReport(Source, frozen=True, kw_only=True):
    """All that was measured."""

    capacity: float
    phases: list[Phase]


def percentiles_ms(seconds: Sequence[float]) -> list[float]:
    """Return the median and the 95th and 99th percentile of at least two times, in ms."""
    cuts = quantiles(seconds, n=100, method="inclusive")
    return [1e3 * cuts[index] for index in (49, 94, 98)]


class Load:
    """Sends requests of both tenants."""

    def __init__(self, url: str, model: str, seed: int) -> None:
        self._model = model
        self._random = Random(seed)
        self._clients = {tenant: new_async_client(url, ANSWER_TIMEOUT_S) for tenant in KEYS}
        for tenant, client in self._clients.items():
            client.headers["authorization"] = f"Bearer {KEYS[tenant]}"

    async def ask(self, tenant: str, began_at: float) -> Reply:
        prompt = self._random.choices(range(300, 2000), k=PROMPT_TOKENS)
        body = {"model": self._model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True}
        sent_at, first_at = time.monotonic(), 0.0
        async with self._clients[tenant].stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_raw():
                first_at = first_at or time.monotonic()
        ended_at = time.monotonic()
        first_s = (first_at or ended_at) - sent_at
        return Reply(tenant, answer.status_code, sent_at - began_at, first_s, ended_at - sent_at)

    async def capacity(self) -> float:
        """Return the requests/s that are served while WAITING are always under way."""
        began_at, ended = time.monotonic(), list[float]()

        async def always() -> None:
            while time.monotonic() - began_at < CAPACITY_S:
                reply = await self.ask("flood", began_at)
                if reply.status == 200:
                    ended.append(reply.sent_at + reply.ended_s)

        await asyncio.gather(*(always() for _ in range(WAITING)))
        return sum(SETTLED_S <= end <= CAPACITY_S for end in ended) / (CAPACITY_S - SETTLED_S)

    async def phase(self, name: str, seconds: float, rates: dict[str, float]) -> Phase:
        """Send requests in Poisson processes of these rates, by tenant, and wait for all answers."""
        began_at = time.monotonic()

        async def arrive(tenant: str, rate: float) -> list[asyncio.Task[Reply]]:
            asked, due = list[asyncio.Task[Reply]](), 0.0
            while (due := due + self._random.expovariate(rate)) < seconds:
                await asyncio.sleep(began_at + due - time.monotonic())
                asked.append(asyncio.create_task(self.ask(tenant, began_at)))
            return asked

        asked = await asyncio.gather(*(arrive(tenant, rate) for tenant, rate in rates.items()))
        replies = await asyncio.gather(*(task for tasks in asked for task in tasks))
        return Phase(name, seconds, rates, list(replies))


async def measure(url: str, model: str, seconds: float, seed: int) -> tuple[float, list[Phase]]:
    load = Load(url, model, seed)
    await load.phase("warm", 5.0, {"quiet": 1.0, "flood": 1.0})
    capacity = await load.capacity()
    quiet = SHARE * capacity / 2
    return capacity, [
        await load.phase("alone", seconds, {"quiet": quiet}),
        await load.phase("beside a flood", seconds, {"quiet": quiet, "flood": 10 * SHARE * capacity}),
        await load.phase("overload", seconds, {"flood": 4 * capacity}),
        await load.phase("alone again", seconds, {"quiet": quiet}),
    ]


def bench_tenants(
    url: Annotated[str, typer.Argument(help="Where sim-tenants.yaml is served.")] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=10, help="Of each load.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write every request to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the times there: .svg, .png or .pdf.")] = None,
) -> None:
    """Measure what one tenant's flood does to another tenant, and what is served under overload."""
    _, base_url = parse_url("URL", url)
    with new_client(base_url, ANSWER_TIMEOUT_S) as client:
        client.headers["authorization"] = f"Bearer {KEYS['quiet']}"
        model = find_card("URL", client, None)["id"]
    capacity, phases = asyncio.run(measure(base_url, model, seconds, seed))
    source = this_run("python", "-m", "benchmarks.tenants")
    report = TenantsReport(**msgspec.structs.asdict(source), capacity=capacity, phases=phases)
    print_report(report)
    if json is not None:
        json.write_bytes(msgspec.json.encode(report))
    if picture is not None:
        draw(report, picture)


def print_report(report: TenantsReport) -> None:
    console = Console(width=150)
    machine = report.machine
    console.print(f"{report.date}, {machine.num_cores} cores of {machine.cpu}; {report.command}")
    console.print(f"capacity {report.capacity:.1f} requests/s of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens")
    table = markdown_table(["load", "tenant", "asks/s", "served/s", "TTFT p50 ms", "p95", "p99"], "Tenants")
    for phase in report.phases:
        for tenant, rate in phase.rates.items():
            times = [reply.first_s for reply in phase.served(tenant)]
            found = [f"{each:.0f}" for each in percentiles_ms(times)] if len(times) > 1 else ["-"] * 3
            served = len(times) / (phase.seconds - SETTLED_S)
            table.add_row(phase.name, tenant, f"{rate:.1f}", f"{served:.1f}", *found)
    console.print(table)
    for phase in report.phases:
        refused = phase.refused()
        statuses = sorted({reply.status for reply in refused})
        after = [f"{each:.0f}" for each in percentiles_ms([r.first_s for r in refused])] if len(refused) > 1 else []
        console.print(
            f"{phase.name}: goodput {phase.goodput / report.capacity:.2f} of the capacity, {len(refused)} refused "
            f"{statuses}, p50, p95 and p99 after {', '.join(after) or '-'} ms"
        )


def draw(report: TenantsReport, path: Path) -> None:
    """Draw when each request of quiet got its first token, by the time at which it was sent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=PAGE_INCHES, layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(report.phases), sharey=True)
    for axes, phase in zip(panels, report.phases, strict=True):
        for tenant, colour in zip(("flood", "quiet"), (COLOURS[1], COLOURS[0]), strict=True):
            served = [reply for reply in phase.replies if (reply.tenant, reply.status) == (tenant, 200)]
            times = [reply.sent_at for reply in served], [1e3 * reply.first_s for reply in served]
            axes.plot(*times, ".", color=colour, label=tenant, markersize=4)
        refused = [reply for reply in phase.replies if reply.status == 429]
        times = [reply.sent_at for reply in refused], [1e3 * reply.first_s for reply in refused]
        axes.plot(*times, "x", color="#999999", label="refused", markersize=3)
        axes.set_title("\n".join([phase.name, *(f"{tenant} {rate:.1f}/s" for tenant, rate in phase.rates.items())]))
        axes.set_yscale("log")
        axes.set_xlabel("sent at, s")
        axes.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("ms to the first token, or to the refusal")
    panels[1].legend(loc="upper right")
    figure.suptitle(
        f"A tenant beside another one's flood: capacity {report.capacity:.1f} requests/s", fontweight="bold"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_app(to_app(bench_tenants), "benchmarks.tenants")
