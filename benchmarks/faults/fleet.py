"""The processes of an application on this machine, and whether all of it is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from app.bench.client import new_async_client
from app.errors import BatonError
from benchmarks.faults.deployed import Deployed

Target = Literal[
    "prefill replica", "decode replica", "prefill engine", "decode engine", "frontend", "HAProxy", "controller"
]
"""What a fault befalls.  An *engine* is the processes that a replica of vLLM or SGLang has started."""

TITLES: dict[Target, str] = {
    "controller": "ray::ServeController",
    "HAProxy": "haproxy -",
}
"""What the command line of a process contains, for what /health does not list."""
REPLICA_TITLE = "ray::ServeReplica"
ENGINE_TITLES = ("VLLM::", "sglang::")
APPLICATION = "baton"
ANSWER_TIMEOUT_S = 10.0
POLL_S = 0.2
BUSY_POLL_S = 0.01


class NotWhole(BatonError):
    """The application did not come back to what it was."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class Fleet:
    """One model's replicas and what is around them."""

    def __init__(self, url: str, model: str, deployed: Deployed | None = None, socket: Path | None = None) -> None:
        """`deployed`: what can be deployed anew, if anything can.  `socket`: as `new_async_client`."""
        self.url = url
        self.model = model
        self.client = new_async_client(url, ANSWER_TIMEOUT_S, socket)
        self._deployed = deployed
        application = deployed.name if deployed is not None else APPLICATION
        self._titles = {**TITLES, "frontend": f"{REPLICA_TITLE}:{application}:frontend"}
        self.raylet = 0
        self.pools: dict[str, int] = {}
        """The number of ready replicas of each pool, as it was at the beginning."""
        self._num_frontends = 0

    @property
    def deployed(self) -> Deployed:
        """The application as it can be deployed anew.  Raises LookupError if it cannot be."""
        if self._deployed is None:
            raise LookupError("this application cannot be deployed anew")
        return self._deployed

    async def close(self) -> None:
        await self.client.aclose()

    async def learn(self) -> None:
        """Take note of what there is now: the application must be whole.  Raises NotWhole."""
        health = await self._health()
        if health is None or health["status"] != "healthy":
            raise NotWhole("the application is not healthy before the first fault")
        self.pools = {role: pool["ready"] for role, pool in self._of_model(health)["pools"].items()}
        self.raylet = raylet_of(next(endpoint["pid"] for endpoint in health["endpoints"]))
        self._num_frontends = len(self._titled(self._titles["frontend"]))
        if self._deployed is not None:
            await self._deployed.connect(self.raylet)

    async def processes(self, target: Target) -> list[list[psutil.Process]]:
        """Return the processes that a fault of `target` may befall, those of one victim together."""
        if (title := self._titles.get(target)) is not None:
            return [[process] for process in self._titled(title)]
        role, what = target.split()
        health = await self._health()
        pids = [] if health is None else [e["pid"] for e in health["endpoints"] if e["role"] == role]
        replicas = [process for process in map(_process, pids) if process is not None]
        if what == "replica":
            return [[replica] for replica in replicas]
        return [found for replica in replicas if (found := engine_of(replica))]

    async def victims(self, target: Target) -> list[list[psutil.Process]]:
        """Return `processes`.  Raises LookupError if there are none."""
        if not (found := await self.processes(target)):
            raise LookupError(f"there is no {target}")
        return found

    def replica_of(self, engine: psutil.Process) -> psutil.Process:
        """Return the replica that has started a process of an engine."""
        return next(parent for parent in engine.parents() if REPLICA_TITLE in " ".join(parent.cmdline()))

    async def process_of(self, replica_id: str) -> psutil.Process:
        """Return the process of a ready replica.  Raises LookupError if there is none."""
        endpoints = (await self._health() or {}).get("endpoints", ())
        pid = next((endpoint["pid"] for endpoint in endpoints if endpoint["replica_id"] == replica_id), None)
        if pid is None or (process := _process(pid)) is None:
            raise LookupError(f"there is no replica {replica_id}")
        return process

    async def busy_decode_replica(self, timeout_s: float) -> str:
        """Wait until sequences run in the engine of one, and return its id.  Raises NotWhole."""
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(httpx.HTTPError, ValueError):
                for replica in (await self.client.get("/stats")).json()["replicas"]:
                    if replica.get("num_running") and self._decodes(replica):
                        return str(replica["replica_id"])
            if time.monotonic() > deadline:
                raise NotWhole(f"no decode replica ran a request within {timeout_s:.0f} s")
            await asyncio.sleep(BUSY_POLL_S)

    def _decodes(self, replica: dict[str, Any]) -> bool:
        is_it: bool = replica["model"] == self.model and replica["role"] == "decode"
        return is_it

    def _titled(self, title: str) -> list[psutil.Process]:
        return below(self.raylet, title)

    async def _health(self, client: httpx.AsyncClient | None = None) -> dict[str, Any] | None:
        """Return the answer of /health, by default of `self.client`; None if there is none now."""
        try:
            health: dict[str, Any] = (await (client or self.client).get("/health")).json()
        except (httpx.HTTPError, ValueError):
            return None
        return health if "models" in health else None

    def _of_model(self, health: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = next(model for model in health["models"] if model["name"] == self.model)
        return found

    async def is_whole(self) -> bool:
        """Whether all replicas that there were are ready and can be reached again."""
        if not self._shows_all(await self._health()):
            return False
        return len(self._titled(self._titles["frontend"])) == self._num_frontends

    def _shows_all(self, health: dict[str, Any] | None) -> bool:
        if health is None or health["status"] != "healthy":
            return False
        wanted = {role: {"ready": num, "reachable": num} for role, num in self.pools.items()}
        is_full: bool = self._of_model(health)["pools"] == wanted
        return is_full

    async def has_successor(self) -> bool:
        """Whether a second decode replica could go on with what one decodes, or the only one is there."""
        if (health := await self._health()) is None:
            return False
        pool = self._of_model(health)["pools"]["decode"]
        return bool(min(pool["ready"], pool["reachable"]) >= min(2, self.pools["decode"]))

    async def until_whole(self, timeout_s: float) -> float:
        """Wait until `is_whole`.  Returns the seconds that it took.  Raises NotWhole."""
        return await self._until(self.is_whole, timeout_s)

    async def until_succeeded(self, timeout_s: float) -> float:
        """Wait until `has_successor`.  Returns the seconds that it took.  Raises NotWhole."""
        return await self._until(self.has_successor, timeout_s)

    async def _until(self, holds: Callable[[], Awaitable[bool]], timeout_s: float) -> float:
        """Wait until that holds three times in a row, as each answer may come from another frontend.

        Returns the seconds until the first of the three.  Raises NotWhole.
        """
        began, since, num = time.monotonic(), 0.0, 0
        while num < 3:
            num, since = (num + 1, since or time.monotonic()) if await holds() else (0, 0.0)
            if time.monotonic() > began + timeout_s:
                raise NotWhole(f"after {timeout_s:.0f} s not all replicas are back: {await self._health()}")
            await asyncio.sleep(POLL_S)
        return since - began

    async def held_blocks(self) -> int | None:
        """Return the KV blocks that requests hold in all replicas together; None if a replica does not tell."""
        try:
            replicas = (await self.client.get("/stats")).json()["replicas"]
        except (httpx.HTTPError, ValueError):
            return None
        held = [replica.get("num_used_blocks") for replica in replicas if replica["model"] == self.model]
        return sum(held) if None not in held else None


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def engine_of(replica: psutil.Process) -> list[psutil.Process]:
    """Return the processes of its engine; it also has a guard (deployments/guard.py)."""
    return [process for title in ENGINE_TITLES for process in below(replica.pid, title)]


def raylet_of(pid: int) -> int:
    """Return the process id of the raylet that started a process."""
    found: int = next(parent.pid for parent in psutil.Process(pid).parents() if parent.name() == "raylet")
    return found


def below(pid: int, title: str) -> list[psutil.Process]:
    """Return the descendants of a process whose command lines contain `title`; none if it is gone."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
    return found
