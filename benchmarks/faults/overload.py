"""More requests than can be served, come what may: an open loop at several times the measured capacity."""

from __future__ import annotations

import asyncio
import math
import time
from random import Random
from statistics import median

import httpx
import msgspec
import psutil

from app.bench.client import new_async_client
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fleet import Fleet

TIMES_CAPACITY = 4
OPEN_S, CLOSED_S = 20.0, 8.0
"""How long requests come at that rate, and how long the capacity is measured before."""
CLIENTS = 48
"""Clients of the measurement, each with one request at a time: more than the replicas have slots for prompts."""
PROMPT_TOKENS, OUTPUT_TOKENS = 1900, 16
SETTLED_S = 5.0
"""The goodput counts from so long after the first request on, as a line has to form before any is refused."""
MIN_GOODPUT = 0.9
"""Of the capacity."""
MAX_GROWTH_BYTES = 256 * 1024 * 1024
"""By how much a frontend's memory may grow."""
MAX_RECOVERY_S = 10.0
WAIT_S = 100.0
"""How long a client waits for its answer."""


class Reply(msgspec.Struct, frozen=True):
    """How one request ended, and when by the monotonic clock."""

    status: int
    has_retry_after: bool
    ended_at: float
    seconds: float


class Overload(msgspec.Struct, frozen=True):
    """Requests come at TIMES_CAPACITY times the capacity, beside the load, while there are so many frontends."""

    num_frontends: int

    @property
    def name(self) -> str:
        plural = "" if self.num_frontends == 1 else "s"
        return f"overload {TIMES_CAPACITY} times, {self.num_frontends} frontend{plural}"

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Raises BadAnswer."""
        before = fleet.deployed.arguments()
        scaled = fleet.deployed.arguments()
        scaled.setdefault("frontend", {})["replicas"] = self.num_frontends
        await fleet.deployed.update(scaled)
        try:
            measured = await _overload(fleet, random)
        finally:
            await fleet.deployed.update(before)
        measured.check()
        return str(measured)


class Measured(msgspec.Struct, frozen=True):
    """What an overload showed."""

    capacity: float
    """Requests of that kind that are served in a second."""
    began_at: float
    """When the first of the replies was asked for, by the monotonic clock."""
    replies: list[Reply]
    recovery_s: float
    growth_bytes: int
    """By how much the memory of a frontend grew."""

    @property
    def served(self) -> list[Reply]:
        """The replies of the time from which the goodput is taken."""
        good = [reply for reply in self.replies if reply.status == httpx.codes.OK]
        return [reply for reply in good if SETTLED_S < reply.ended_at - self.began_at < OPEN_S]

    @property
    def goodput(self) -> float:
        """Of the capacity, from 0 to 1 and a little more."""
        return len(self.served) / (OPEN_S - SETTLED_S) / self.capacity

    @property
    def unfair(self) -> set[int]:
        """The statuses of refused replies other than 429 and 503, and of those that do not say when to come again."""
        refused = [reply for reply in self.replies if reply.status != httpx.codes.OK]
        return {reply.status for reply in refused if reply.status not in (429, 503) or not reply.has_retry_after}

    def __str__(self) -> str:
        median_s = median(reply.seconds for reply in self.served) if self.served else math.inf
        return (
            f"{len(self.replies)} requests at {TIMES_CAPACITY} x {self.capacity:.1f}/s, goodput {self.goodput:.2f} of "
            f"it, median {median_s:.1f} s, recovery {self.recovery_s:.1f} s, "
            f"{self.growth_bytes / 2**20:.0f} MiB more in a frontend"
        )

    def check(self) -> None:
        """Raises BadAnswer."""
        is_good = self.goodput >= MIN_GOODPUT and self.recovery_s <= MAX_RECOVERY_S
        if self.unfair or not is_good or self.growth_bytes > MAX_GROWTH_BYTES:
            raise BadAnswer(f"unfair {sorted(self.unfair)}; {self}")


async def _overload(fleet: Fleet, random: Random) -> Measured:
    frontends = [process for found in await fleet.processes("frontend") for process in found]
    async with new_async_client(fleet.url, WAIT_S) as client:
        undisturbed_s = await _probe_s(client, fleet.model)
        capacity = await _measure_capacity(client, fleet.model, random)
        sizes = _sizes(frontends)
        began_at = time.monotonic()
        asked = await _open_loop(client, fleet.model, random, TIMES_CAPACITY * capacity)
        recovery_s = await _recover(client, fleet.model, undisturbed_s)
        replies = await asyncio.gather(*asked)
        growth = max(after - before for before, after in zip(sizes, _sizes(frontends), strict=True))
    return Measured(capacity, began_at, replies, recovery_s, growth)


async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int]) -> Reply:
    began_at = time.monotonic()
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.HTTPError:
        return Reply(0, False, time.monotonic(), time.monotonic() - began_at)
    now = time.monotonic()
    return Reply(answer.status_code, "retry-after" in answer.headers, now, now - began_at)


def _draw(random: Random) -> list[int]:
    return random.choices(range(300, 2000), k=PROMPT_TOKENS)


async def _measure_capacity(client: httpx.AsyncClient, model: str, random: Random) -> float:
    """Return how many of the requests are served in a second if as many as possible are under way."""
    began_at = time.monotonic()
    replies: list[Reply] = []

    async def go_on() -> None:
        while time.monotonic() < began_at + CLOSED_S:
            replies.append(await _ask(client, model, _draw(random)))

    await asyncio.gather(*(go_on() for _ in range(CLIENTS)))
    return sum(r.status == httpx.codes.OK for r in replies) / (max(r.ended_at for r in replies) - began_at)


async def _open_loop(client: httpx.AsyncClient, model: str, random: Random, rate: float) -> list[asyncio.Task[Reply]]:
    """Send `rate` requests a second, for OPEN_S, whether earlier ones have been answered or not."""
    began_at = time.monotonic()
    asked: list[asyncio.Task[Reply]] = []
    while (wanted := time.monotonic() - began_at) < OPEN_S:
        while len(asked) < wanted * rate:
            asked.append(asyncio.create_task(_ask(client, model, _draw(random))))
        await asyncio.sleep(0.01)
    return asked


async def _probe_s(client: httpx.AsyncClient, model: str) -> float:
    """Return the seconds that a short request takes; infinity if it is refused."""
    reply = await _ask(client, model, [400, 401, 402])
    return reply.seconds if reply.status == httpx.codes.OK else math.inf


async def _recover(client: httpx.AsyncClient, model: str, undisturbed_s: float) -> float:
    """Return after how many seconds three short requests in a row were answered nearly as fast as before."""
    began_at, since, num = time.monotonic(), 0.0, 0
    while num < 3:
        sent_at = time.monotonic()
        if sent_at > began_at + WAIT_S:
            return WAIT_S
        is_fast = await _probe_s(client, model) < 2 * undisturbed_s + 0.5
        num, since = (num + 1, since or sent_at) if is_fast else (0, 0.0)
        await asyncio.sleep(0.2)
    return since - began_at


def _sizes(processes: list[psutil.Process]) -> list[int]:
    return [process.memory_info().rss for process in processes]


OVERLOADS = (Overload(1), Overload(4))
