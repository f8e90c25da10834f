"""A Ray cluster of several machines on this one.

Each node has a network, processes, an address and a /tmp of its own: Linux namespaces, as containers have.  So every
node has its own port 8000, its own HAProxy and its own Ray, and the nodes share nothing but the files of this
machine, as nodes do that run one image.

1. `Network` is one process that holds the outer namespaces, with a bridge in them.  Where the tests may not make
   them, they are root in a user namespace.
2. `Cluster.start` starts Ray in namespaces inside those, with a cable to the bridge.
3. Tests talk to a node by `Cluster.http`: Unix sockets that `tests.cluster.relay` passes on into the network.
4. What was started dies with what started it, as the kernel sees to: a node with its process, all nodes and the bridge
   with the network, and that with the tests.  Nothing of it has a name outside, so there is nothing to collide with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml

from deployments import haproxy
from tests.conftest import REPOSITORY, wait_until

BRIDGE = "10.77.0.1"
HEAD = "10.77.0.2"
SERVE_PORT, DASHBOARD_PORT, GCS_PORT, REDIS_PORT = 8000, 8265, 6379, 6380
REDIS_PASSWORD = TOKEN = "of-these-tests"
REDIS = [f"RAY_REDIS_ADDRESS={BRIDGE}:{REDIS_PORT}", "RAY_external_storage_namespace=baton"]
ADDRESSES = [f"10.77.0.{number}" for number in range(3, 12)]
REACHED = [f"{HEAD}:{DASHBOARD_PORT}", *(f"{address}:{SERVE_PORT}" for address in [HEAD, *ADDRESSES])]

DIES_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]

MAKE_BRIDGE = f"""
ip link set lo up
ip link add br0 type bridge
ip addr add {BRIDGE}/24 dev br0
ip link set br0 up
echo ready
exec sleep infinity
"""

# Process 1 is the network's, until the node has processes of its own.  A node that had this address before is dead, but
# its closed connections may hold its end of the cable for a minute; its Ethernet address is the new node's too, or the
# others would look for it at the old one.  What the tests need of the real /tmp stays in sight.
START_NODE = """
address=$1 ethernet=$2 cable=$3 tmp=$4 kept=$5
shift 5
ip link set lo up
nsenter --target 1 --net ip link del $cable 2>/dev/null || true
ip link add eth0 address $ethernet type veth peer name $cable netns 1
ip addr add $address/24 dev eth0
ip link set eth0 up
nsenter --target 1 --net ip link set $cable master br0 up
for folder in $kept; do
    mkdir -p $tmp${folder#/tmp}
    mount --rbind $folder $tmp${folder#/tmp}
done
mount --rbind $tmp /tmp
exec unshare --pid --fork --kill-child --mount-proc bash -c '"$@"; exit' bash "$@"
"""


class Network:
    """Namespaces with a bridge, in which `start` starts something."""

    def __init__(self) -> None:
        _require("ip", "nsenter", "setpriv", "unshare")
        self._started: list[subprocess.Popen[bytes]] = []
        may_already = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
        self._needs_user = may_already.returncode != 0
        user = ["--user", "--map-root-user"] if self._needs_user else []
        namespaces = [*user, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            [*DIES_WITH_PARENT, "unshare", *namespaces, "sh", "-ec", MAKE_BRIDGE],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline().strip()
        if said != "ready":
            self.close()
            pytest.fail(
                f"no namespaces for the nodes of a cluster ({said}): run the tests with CAP_SYS_ADMIN and "
                "CAP_NET_ADMIN, or where user namespaces are allowed",
                pytrace=False,
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
            process.wait()


def _require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)}: not found; `scripts/debian_packages.sh` installs it", pytrace=False)


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


@dataclass
class Node:
    """A machine of the cluster."""

    group: str
    address: str
    cable: str
    process: subprocess.Popen[bytes]


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

    def run(self, *command: str, ready: str) -> None:
        """Start a service in the network and return when its log says `ready`."""
        log = self.folder / f"{Path(command[0]).name}.log"
        service = self.network.start(*command, log=log)
        wait_until(lambda: ready in log.read_text() or service.poll() is not None, 30, f"{log} says {ready!r}")
        assert service.poll() is None, log.read_text()

    def start_head(self) -> Node:
        """The head, again at the same address if there was one."""
        dashboard = ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}"]
        state = [f"--redis-password={REDIS_PASSWORD}"] if self.has_redis else []
        node = self._start("head", HEAD, "--head", f"--port={GCS_PORT}", "--num-cpus=0", *dashboard, *state)
        wait_until(self._is_head_up, 60, "the head's dashboard answers", every_s=0.5)
        return node

    def start(self, group: str, *, cpus: int, gpus: int = 0) -> Node:
        """A worker node; it has not joined yet."""
        address = next(address for address in ADDRESSES if address not in self.nodes)
        return self._start(group, address, f"--address={HEAD}:{GCS_PORT}", f"--num-cpus={cpus}", f"--num-gpus={gpus}")

    def _start(self, group: str, address: str, *options: str) -> Node:
        self._num_started += 1
        folder = self.folder / f"{group}-{self._num_started}"
        folder.mkdir()
        kept = " ".join(str(path) for path in {REPOSITORY, Path(sys.prefix)} if path.is_relative_to("/tmp"))
        number = int(address.rpartition(".")[2])
        ethernet, cable = f"02:00:00:00:00:{number:02x}", f"cable{number}"
        ray = [
            *("env", f"RAY_NODE_TYPE_NAME={group}", *(REDIS if group == "head" and self.has_redis else [])),
            *(str(Path(sys.executable).parent / "ray"), "start", "--block", f"--node-ip-address={address}"),
            *(f"--labels=baton/group={group}", "--object-store-memory=80000000", "--include-log-monitor=false"),
        ]
        process = self.network.start(
            *("unshare", "--net", "--mount", "bash", "-euc", START_NODE, "bash"),
            *(address, ethernet, cable, str(folder), kept, *ray, *options),
            log=self.folder / f"{folder.name}.log",
        )
        self.nodes[address] = Node(group, address, cable, process)
        return self.nodes[address]

    def wait_for_nodes(self) -> None:
        """Return when all that were started have joined."""
        wait_until(lambda: self._joined() >= self.nodes.keys(), 90, "all nodes have joined", every_s=1)

    def _joined(self) -> set[str]:
        with self.dashboard() as client:
            nodes = client.get("/nodes?view=summary").raise_for_status().json()["data"]["summary"]
        raylets = [node.get("raylet", {}) for node in nodes]  # a node comes before what is known of it
        return {raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE"}

    def kill(self, node: Node) -> None:
        """All processes of a node end by SIGKILL at once; the kernel closes their connections."""
        node.process.kill()
        node.process.wait()
        del self.nodes[node.address]

    def cut(self, node: Node) -> None:
        """A node is gone without a word: no connection of its processes is closed."""
        cut = self.network.start("ip", "link", "del", node.cable, log=self.folder / "cut.log")
        assert cut.wait() == 0, (self.folder / "cut.log").read_text()
        self.kill(node)

    def http(self, address: str, port: int = SERVE_PORT) -> httpx.Client:
        """A client of one node, with a connection of its own for each request."""
        transport = httpx.HTTPTransport(uds=str(self.folder / f"{address}:{port}"))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.Client(transport=transport, base_url=f"http://{address}:{port}", headers=headers, timeout=60)

    def dashboard(self) -> httpx.Client:
        """The head's REST API, by which KubeRay deploys."""
        return self.http(HEAD, DASHBOARD_PORT)

    def _is_head_up(self) -> bool:
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
        cluster.run(sys.executable, "-m", "tests.cluster.relay", str(folder), *REACHED, ready="ready")
        if has_redis:
            redis = f"--bind {BRIDGE} --port {REDIS_PORT} --requirepass {REDIS_PASSWORD} --dir {folder}"
            cluster.run("redis-server", *redis.split(), "--save", "", ready="Ready to accept connections")
        yield cluster
    finally:
        network.close()
