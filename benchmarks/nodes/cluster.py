"""A Ray cluster of several machines on this one.

Each node has a network, processes, an address and a /tmp of its own: Linux namespaces, as containers have.  So every
node has its own port 8000, its own HAProxy and its own Ray, and the nodes share nothing but the files of this
machine, as nodes do that run one image.

1. `Network` is one process that holds the outer namespaces.  Where they may not be made otherwise, it is root in a
   user namespace.
2. A switch in it (switch.py) connects the nodes.  `Cluster.set_wires` makes it lose or delay what goes between two.
3. `Cluster.start` starts Ray in namespaces inside those, with a cable to the switch.
4. One talks to a node by `Cluster.http`: Unix sockets that relay.py passes on into the network.
5. What was started dies with what started it, as the kernel sees to: a node with its process, all nodes and the switch
   with the network, and that with its maker.  Nothing of it has a name outside, so there is nothing to collide with.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import yaml

from app.bench.client import new_client
from app.errors import BatonError
from benchmarks.nodes import switch
from benchmarks.nodes.switch import Plug, SetWires, Unplug, Wire
from deployments import haproxy

REPOSITORY = Path(__file__).parents[2]

OUTSIDE = f"{switch.NETWORK}{switch.OUTSIDE}"
"""Where Redis, the relay and load balancers are: beside the nodes, in the network."""
HEAD = f"{switch.NETWORK}2"
SERVE_PORT, DASHBOARD_PORT, GCS_PORT, REDIS_PORT = 8000, 8265, 6379, 6380
REDIS_PASSWORD = TOKEN = "of-these-nodes"
REDIS = [f"RAY_REDIS_ADDRESS={OUTSIDE}:{REDIS_PORT}", "RAY_external_storage_namespace=baton"]
ADDRESSES = [f"{switch.NETWORK}{number}" for number in range(3, 12)]
REACHED = [f"{HEAD}:{DASHBOARD_PORT}", *(f"{address}:{SERVE_PORT}" for address in [HEAD, *ADDRESSES])]

START_S = 240.0
"""How long anything may take to start, on a busy machine."""
DIES_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]

HOLD = "ip link set lo up; echo ready; exec sleep infinity"

# Process 1 is the network's, until the node has processes of its own.  Each node at an address has the same Ethernet
# address, or the others would look for it at the old one.  What is needed of the real /tmp stays in sight.
START_NODE = """
address=$1 ethernet=$2 mtu=$3 cable=$4 tmp=$5 kept=$6
shift 6
ip link set lo up
nsenter --target 1 --net ip link set $cable netns $$ name eth0
ip link set eth0 address $ethernet mtu $mtu up
ip addr add $address/24 dev eth0
for folder in $kept; do
    mkdir -p $tmp${folder#/tmp}
    mount --rbind $folder $tmp${folder#/tmp}
done
mount --rbind $tmp /tmp
exec unshare --pid --fork --kill-child --mount-proc bash -c '"$@"; exit' bash "$@"
"""


class NoCluster(BatonError):
    """A cluster cannot be made here, or a part of it does not come up."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)


class Network:
    """Namespaces in which `start` starts something."""

    def __init__(self) -> None:
        """Raises NoCluster where there may be no namespaces."""
        _require("ip", "nsenter", "setpriv", "unshare")
        self._started: list[subprocess.Popen[bytes]] = []
        may_already = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
        self._needs_user = may_already.returncode != 0
        user = ["--user", "--map-root-user"] if self._needs_user else []
        namespaces = [*user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*DIES_WITH_PARENT, "unshare", *namespaces, "sh", "-ec", HOLD],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline().strip()
        if said != "ready":
            self.close()
            raise NoCluster(
                f"no namespaces for the nodes of a cluster ({said}): run this with CAP_SYS_ADMIN and CAP_NET_ADMIN, or "
                "where user namespaces are allowed"
            )

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Start `command` in the network; killing what is returned kills it."""
        user = ["--user", "--preserve-credentials"] if self._needs_user else []
        first = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().strip()
        enter = ["nsenter", "--target", first, *user, "--net", "--mount", "--pid"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*enter, *DIES_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=_environment(),
            )
        self._started.append(process)
        return process

    def close(self) -> None:
        """Kill all that runs in it."""
        self._holder.kill()
        self._holder.communicate()
        for process in self._started:
            process.kill()  # nsenter stops with what it has started, and does not go on with it
            process.wait()


def _require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise NoCluster(f"{', '.join(missing)}: not found; `scripts/debian_packages.sh` installs it")


def _environment() -> dict[str, str]:
    """What the manifests give the processes of every node, and what KubeRay adds."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    manifest: dict[str, str] = yaml.safe_load((REPOSITORY / "cluster/base/environment.yaml").read_text())["data"]
    return {
        **outside,
        **{name: value for name, value in manifest.items() if name.startswith("RAY_")},
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.command(),
        "PYTHONPATH": str(REPOSITORY),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",  # how long workers wait for a new head
        "SERVE_SLOW_STARTUP_WARNING_S": "5",  # when Serve begins to say that a replica finds no place
        "RAY_prestart_worker_first_driver": "0",  # else each node starts a process for each of its CPUs
    }


def _wait_until(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.1) -> None:
    """Raises NoCluster when `timeout_s` has passed."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NoCluster(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)


@dataclass
class Node:
    """A machine of the cluster."""

    group: str
    address: str
    options: tuple[str, ...]
    """Of ``ray start``."""
    process: subprocess.Popen[bytes]

    @property
    def number(self) -> int:
        return int(self.address.rpartition(".")[2])


@dataclass
class Cluster:
    """Ray nodes in a network."""

    network: Network
    folder: Path
    has_redis: bool
    """Whether the head keeps the cluster's state there, and so can be started again."""
    nodes: dict[str, Node] = field(default_factory=dict)
    """The running ones, by address."""
    _num_started: int = 0

    redis: subprocess.Popen[bytes] | None = None

    def run(self, *command: str, ready: str) -> subprocess.Popen[bytes]:
        """Start a service in the network and return it when its log says `ready`.  Raises NoCluster."""
        log = self.folder / f"{Path(command[0]).name}-{self._number()}.log"
        service = self.network.start(*command, log=log)
        _wait_until(lambda: ready in log.read_text() or service.poll() is not None, START_S, f"{log} says {ready!r}")
        if service.poll() is not None:
            raise NoCluster(f"{command[0]} has ended: {log.read_text()}")
        return service

    def _number(self) -> int:
        self._num_started += 1
        return self._num_started

    def start_redis(self) -> None:
        """With what it kept before, if it was started before."""
        options = f"--bind {OUTSIDE} --port {REDIS_PORT} --requirepass {REDIS_PASSWORD} --dir {self.folder}"
        command = [
            "redis-server",
            *options.split(),
            "--save",
            "",
            "--appendonly",
            "yes",
        ]  # as in cluster/base/redis.yaml
        self.redis = self.run(*command, ready="Ready to accept connections")

    def start_head(self) -> Node:
        """The head, again at the same address if there was one."""
        dashboard = ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        state = [f"--redis-password={REDIS_PASSWORD}"] if self.has_redis else []
        self._start("head", HEAD, "--head", f"--port={GCS_PORT}", "--num-cpus=0", *dashboard, *state)
        _wait_until(self._is_head_up, START_S, "the head's dashboard answers", every_s=0.5)
        return self.nodes[HEAD]

    def start(self, group: str, *, cpus: int, gpus: int = 0) -> Node:
        """A worker node; it has not joined yet."""
        address = next(address for address in ADDRESSES if address not in self.nodes)
        return self._start(group, address, f"--address={HEAD}:{GCS_PORT}", f"--num-cpus={cpus}", f"--num-gpus={gpus}")

    def start_again(self) -> None:
        """Start each node anew whose Ray has ended, as Kubernetes does with pods; the head first."""
        for node in sorted(self.nodes.values(), key=lambda node: node.group != "head"):
            if node.process.poll() is not None:
                self.start_anew(node)

    def start_anew(self, node: Node) -> None:
        """Start a node in the place of one that has ended."""
        if node.group == "head":
            self.start_head()
        else:
            self._start(node.group, node.address, *node.options)

    def _start(self, group: str, address: str, *options: str) -> Node:
        folder = self.folder / f"{group}-{self._number()}"
        folder.mkdir()
        kept = " ".join(str(path) for path in {REPOSITORY, Path(sys.prefix)} if path.is_relative_to("/tmp"))
        number = int(address.rpartition(".")[2])
        self._switch(Plug(number))
        ray = [
            *("env", f"RAY_NODE_TYPE_NAME={group}", *(REDIS if group == "head" and self.has_redis else [])),
            *(str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={address}"),
            *(f"--labels=baton/group={group}", "--object-store-memory=80000000", "--include-log-monitor=false"),
        ]
        process = self.network.start(
            *("unshare", "--net", "--mount", "bash", "-euc", START_NODE, "bash"),
            *(address, switch.ethernet(number), str(switch.MTU), f"cable{number}", str(folder), kept, *ray, *options),
            log=self.folder / f"{folder.name}.log",
        )
        self.nodes[address] = Node(group, address, options, process)
        return self.nodes[address]

    def set_wires(self, *wires: Wire) -> None:
        """From now on these wires are bad, and all others are good."""
        self._switch(SetWires(list(wires)))

    def _switch(self, command: switch.Command) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "switch"))
            connection.sendall(msgspec.json.encode(command) + b"\n")
            answer = connection.makefile().readline().strip()
        if answer != "done":
            raise NoCluster(f"the switch cannot make a cable: {answer}")

    def wait_for_nodes(self) -> None:
        """Return when all that were started have joined.  Raises NoCluster."""
        _wait_until(self._have_joined, START_S, "all nodes have joined", every_s=1)

    def _have_joined(self) -> bool:
        self.start_again()  # those whose Ray gave up waiting for a part of itself
        return self._joined() >= self.nodes.keys()

    def _joined(self) -> set[str]:
        with self.dashboard() as client:
            nodes = client.get("/nodes?view=summary").raise_for_status().json()["data"]["summary"]
        raylets = [node.get("raylet", {}) for node in nodes]  # a node comes before what is known of it
        return {raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def wait_until_missed(self, node: Node) -> None:
        """Return when Ray has noticed that a node is gone.  Raises NoCluster."""
        _wait_until(lambda: node.address not in self._joined(), START_S, f"{node.address} is missed", every_s=0.5)

    def kill(self, node: Node) -> None:
        """All processes of a node end by SIGKILL at once; the kernel closes their connections."""
        node.process.kill()
        node.process.wait()
        del self.nodes[node.address]

    def cut(self, node: Node) -> None:
        """A node is gone without a word: no connection of its processes is closed."""
        self._switch(Unplug(node.number))
        self.kill(node)

    def http(self, address: str, port: int = SERVE_PORT) -> httpx.Client:
        """A client of one node, with a connection of its own for each request."""
        client = new_client(f"http://{address}:{port}", 60, self.folder / f"{address}:{port}")
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        return client

    def dashboard(self) -> httpx.Client:
        """The head's REST API, by which KubeRay deploys."""
        return self.http(HEAD, DASHBOARD_PORT)

    def deploy(self, document: dict[str, Any]) -> None:
        """Deploy a Serve config as KubeRay does: again until it is accepted.  Raises NoCluster."""

        def put() -> bool:
            return client.put("/api/serve/applications/", json=document).is_success

        with self.dashboard() as client:
            _wait_until(put, START_S, "the dashboard takes the document", every_s=1)

    def _is_head_up(self) -> bool:
        head = self.nodes[HEAD]
        if head.process.poll() is not None:  # on a busy machine Ray gives up on its own dashboard
            self._start(head.group, head.address, *head.options)
        try:
            with self.dashboard() as client:
                return client.get("/api/serve/applications/").is_success
        except httpx.TransportError:
            return False


@contextmanager
def cluster(folder: Path, *, has_redis: bool = True) -> Iterator[Cluster]:
    """A cluster that has no nodes yet; all that it becomes ends with the block."""
    _require(*(["redis-server"] if has_redis else []))
    network = Network()
    try:
        cluster = Cluster(network, folder, has_redis)
        cluster.run(sys.executable, "-m", "benchmarks.nodes.switch", str(folder / "switch"), ready="ready")
        cluster.run(sys.executable, "-m", "benchmarks.nodes.relay", str(folder), *REACHED, ready="ready")
        if has_redis:
            cluster.start_redis()
        yield cluster
    finally:
        network.close()
