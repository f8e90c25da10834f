"""The profile sglang-disaggregated-70b on a Ray cluster of several machines, its engines simulated.

It is deployed as KubeRay does it, by the REST API of the head's dashboard.  The tests build on one another: each
leaves the cluster serving.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from benchmarks.nodes.cluster import HEAD, Cluster, cluster
from benchmarks.nodes.switch import Wire
from tests.conftest import REPOSITORY, wait_until

PROFILE = REPOSITORY / "cluster/profiles/sglang-disaggregated-70b/serve_config.yaml"
SHAPES: dict[str, dict[str, int]] = {
    "frontend": {"cpus": 4},
    "prefill": {"cpus": 88, "gpus": 4},
    "decode": {"cpus": 88, "gpus": 4},
}
"""The worker groups' nodes, as in the profile."""
MODEL = "llama"
TOKENS_PER_S = 50
"""Of a stream; see `simulated`."""

Document = dict[str, Any]

pytestmark = pytest.mark.timeout(600)  # the first one waits for seven nodes and for what they serve


def simulated(**bounds: int) -> Document:
    """The profile with engines that compute nothing; `bounds` are min_replicas of pools.

    All that says where a replica may run stays as it is.  The number of replicas follows from the bounds at once.
    """
    document: Document = yaml.safe_load(PROFILE.read_text())
    arguments = document["applications"][0]["args"]
    (model,) = arguments["models"]
    arguments["device"] = "cpu"
    arguments["security"] = {"open": True}  # the nodes are network namespaces of this machine, without its secret
    sim = {"profile": "h200-llama-8b", "speed_up": 0.25, "max_model_len": 8192}
    model |= {"name": MODEL, "source": "baton:tiny", "engine_args": sim, "server_args": {}}
    model["routing"] = {"placement": {"policy": "remote"}}
    for role in ("prefill", "decode"):
        pool = model[role]
        pool |= {"engine": "sim", "engine_args": {}}
        pool["resources"]["num_gpus"] = pool["tensor_parallel_size"]
        pool["autoscaling"] |= {"upscale_delay_s": 0, "downscale_delay_s": 0}
        pool["autoscaling"]["min_replicas"] = bounds.get(role, pool["autoscaling"]["min_replicas"])
    return document


class Replica(NamedTuple):
    """What Serve's REST API says of one."""

    id: str
    state: str
    node: str
    pid: int


class Status(NamedTuple):
    """What Serve's REST API says of the application."""

    state: str
    replicas: dict[str, set[Replica]]
    """By group; none while Serve builds the application anew."""
    messages: dict[str, str]

    def nodes(self, group: str) -> set[str]:
        return {replica.node for replica in self.running(group)}

    def running(self, group: str) -> set[Replica]:
        return {replica for replica in self.replicas.get(group, ()) if replica.state == "RUNNING"}

    def is_settled(self) -> bool:
        """Whether all that shall run runs, and nothing else is left."""
        replicas = [replica for group in self.replicas.values() for replica in group]
        return self.state == "RUNNING" and all(replica.state == "RUNNING" for replica in replicas)


def status(cluster: Cluster) -> Status:
    with cluster.dashboard() as client:
        answer = client.get("/api/serve/applications/")
    assert answer.is_success, answer.text
    application = answer.json()["applications"].get("baton", {"status": "NOT_STARTED", "deployments": {}})
    deployments = {name.partition("-")[0]: each for name, each in application["deployments"].items()}
    return Status(
        application["status"],
        {group: {_replica(told) for told in each["replicas"]} for group, each in deployments.items()},
        {group: each["message"] for group, each in deployments.items()},
    )


def _replica(told: dict[str, Any]) -> Replica:
    return Replica(told["replica_id"], told["state"], told.get("node_ip") or "", told.get("pid") or 0)


def deploy(cluster: Cluster, **bounds: int) -> None:
    """As KubeRay does: again until it is accepted."""
    with cluster.dashboard() as client:
        put = partial(client.put, "/api/serve/applications/", json=simulated(**bounds))
        wait_until(lambda: put().is_success, 60, "the dashboard takes the document", every_s=1)


def settled(cluster: Cluster, timeout_s: float = 60, **num: int) -> Status:
    """The status once the application runs with so many replicas of these groups."""

    def poll() -> Status | None:
        now = status(cluster)
        is_there = all(len(now.replicas.get(group, ())) == number for group, number in num.items())
        return now if is_there and now.is_settled() else None

    found: Status = wait_until(poll, timeout_s, f"the application runs with {num}", every_s=0.5)
    return found


def request(max_tokens: int, **fields: Any) -> dict[str, Any]:
    """A prompt that nobody has cached."""
    prompt = [random.randrange(300, 2000) for _ in range(100)]
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **fields}


def ask(cluster: Cluster, address: str, timeout_s: float = 60) -> dict[str, Any]:
    """One short request; what came of it, with how it was routed."""
    with cluster.http(address) as client:
        answer = client.post(
            "/v1/completions", json=request(3), headers={"x-baton-explain": "1"}, timeout=timeout_s
        ).raise_for_status()
    return {"usage": answer.json()["usage"], **json.loads(answer.headers["x-baton-explain"])[0]}


class Stream(threading.Thread):
    """A stream of `seconds`, read as it comes."""

    def __init__(self, cluster: Cluster, address: str, seconds: float) -> None:
        super().__init__(daemon=True)
        self.decode = ""
        """The replica that decodes it; known once its first token is there."""
        self.error: Exception | None = None
        self.num_tokens = 0
        self.longest_gap_s = 0.0
        self._cluster = cluster
        self._address = address
        self._wanted = int(seconds * TOKENS_PER_S)
        self.start()
        wait_until(lambda: self.decode or self.error, 30, "the stream has begun")

    def run(self) -> None:
        try:
            self._read()
        except (httpx.HTTPError, AssertionError) as error:
            self.error = error

    def _read(self) -> None:
        body = request(self._wanted, stream=True, stream_options={"include_usage": True})
        headers = {"x-baton-explain": "1"}
        with (
            self._cluster.http(self._address) as client,
            client.stream("POST", "/v1/completions", json=body, headers=headers) as response,
        ):
            self.decode = json.loads(response.headers["x-baton-explain"])[0]["decode"]["replica"]
            last_at = time.monotonic()
            for line in response.iter_lines():
                assert not line.startswith('data: {"error"'), line
                self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - last_at)
                last_at = time.monotonic()
                if '"usage":{' in line:
                    self.num_tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]

    def ends_complete(self, longest_gap_s: float = 5) -> None:
        """Fails unless every token came, and none late."""
        self.join(120)
        assert self.error is None
        assert self.num_tokens == self._wanted
        assert self.longest_gap_s < longest_gap_s


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, and two nodes of each group."""
    with cluster(tmp_path_factory.mktemp("nodes")) as nodes:
        nodes.start_head()
        for group, shape in SHAPES.items():
            for _ in range(2):
                nodes.start(group, **shape)
        nodes.wait_for_nodes()
        deploy(nodes)
        settled(nodes, 180, frontend=2, prefill=1, decode=1)
        yield nodes


def nodes_of(cluster: Cluster, group: str) -> set[str]:
    return {node.address for node in cluster.nodes.values() if node.group == group}


def a_frontend(cluster: Cluster) -> str:
    return min(status(cluster).nodes("frontend"))


def streams_on(cluster: Cluster, replicas: set[Replica], seconds: float) -> dict[str, list[Stream]]:
    """Streams such that each of these decode replicas has one, by replica."""
    found: dict[str, list[Stream]] = {replica.id: [] for replica in replicas}

    def start() -> bool:
        stream = Stream(cluster, a_frontend(cluster), seconds)
        found[stream.decode].append(stream)
        return all(found.values())

    wait_until(start, 20, "each replica has a stream")
    return found


class Questions(threading.Thread):
    """Short requests to some nodes, twice a second, as long as the block lasts."""

    def __init__(self, cluster: Cluster, addresses: set[str]) -> None:
        super().__init__(daemon=True)
        self.errors: list[str] = []
        self.slowest_s = 0.0
        self.kinds: Counter[str] = Counter()
        self._cluster = cluster
        self._addresses = sorted(addresses)
        self._is_over = threading.Event()
        self._asking: list[threading.Thread] = []

    def __enter__(self) -> Questions:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self.join()
        for thread in self._asking:
            thread.join()

    def run(self) -> None:
        for address in itertools.cycle(self._addresses):
            thread = threading.Thread(target=self._ask, args=(address,), daemon=True)
            thread.start()
            self._asking.append(thread)
            if self._is_over.wait(0.5):
                return

    def _ask(self, address: str) -> None:
        began = time.monotonic()
        try:
            self.kinds[ask(self._cluster, address)["actual"]["kind"]] += 1
        except httpx.HTTPError as error:
            self.errors.append(f"{address}: {error!r}")
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def were_answered(self, within_s: float) -> None:
        assert not self.errors
        assert self.slowest_s < within_s


def test_replicas_run_on_the_nodes_of_their_group(ray_cluster: Cluster) -> None:
    now = status(ray_cluster)
    for group in SHAPES:
        assert now.nodes(group) <= nodes_of(ray_cluster, group)
    assert len(now.nodes("frontend")) == 2  # each takes all CPUs of a node


def test_every_node_with_a_replica_answers(ray_cluster: Cluster) -> None:
    now = status(ray_cluster)
    for address in {HEAD, *now.nodes("frontend"), *now.nodes("prefill"), *now.nodes("decode")}:
        answer = wait_until(partial(try_to_ask, ray_cluster, address), 20, f"{address} answers")
        assert answer["actual"]["kind"] == "remote"


def try_to_ask(cluster: Cluster, address: str) -> dict[str, Any] | None:
    """What `ask` returns; None while the node has no HAProxy yet that knows a frontend."""
    try:
        return ask(cluster, address)
    except httpx.HTTPError:
        return None


def test_more_replicas_come_to_the_nodes_of_their_group_and_restart_no_other(ray_cluster: Cluster) -> None:
    before = status(ray_cluster)
    stream = Stream(ray_cluster, a_frontend(ray_cluster), 10)
    deploy(ray_cluster, decode=2)
    now = settled(ray_cluster, decode=2)
    assert now.running("decode") > before.running("decode")
    assert now.nodes("decode") == nodes_of(ray_cluster, "decode")
    for group in ("frontend", "prefill"):
        assert now.running(group) == before.running(group)
    stream.ends_complete()


def test_a_way_that_is_cut_between_prefill_and_decode_loses_nothing(ray_cluster: Cluster) -> None:
    """Decode hears nothing of the KV that it asks for, and prefill does not know."""
    now = status(ray_cluster)
    (prefill,) = (ray_cluster.nodes[address] for address in now.nodes("prefill"))
    decode = ray_cluster.nodes[min(now.nodes("decode"))]
    ray_cluster.set_wires(Wire(prefill.number, decode.number, loss=1.0))
    with Questions(ray_cluster, now.nodes("frontend")) as questions:
        wait_until(lambda: sum(questions.kinds.values()) > 20, 30, "requests are answered")
    ray_cluster.set_wires()
    questions.were_answered(within_s=15)  # the first ones of this pair wait for 10 s
    after = status(ray_cluster)
    for group in ("frontend", "prefill", "decode"):  # those that wait for KV may make decode grow
        assert after.running(group) >= now.running(group)


def test_a_replica_without_a_place_waits_for_a_node_of_its_group(ray_cluster: Cluster) -> None:
    deploy(ray_cluster, decode=3)
    message = wait_until(
        lambda: status(ray_cluster).messages.get("decode"), 30, "Serve says that a replica finds no place"
    )
    assert "1 replicas that have taken more than" in message
    assert '"GPU": 4.0' in message
    before = status(ray_cluster)
    assert len(before.running("decode")) == 2  # although prefill has a node with four free GPUs
    added = ray_cluster.start("decode", **SHAPES["decode"])
    now = settled(ray_cluster, decode=3)
    assert {replica.node for replica in now.running("decode") - before.running("decode")} == {added.address}


def test_fewer_replicas_let_their_streams_end(ray_cluster: Cluster) -> None:
    before = status(ray_cluster)
    streams = streams_on(ray_cluster, before.running("decode"), 12)
    deploy(ray_cluster, decode=2)
    wait_until(lambda: len(status(ray_cluster).running("decode")) == 2, 30, "one is to end")
    for stream in itertools.chain.from_iterable(streams.values()):
        stream.ends_complete()
    now = settled(ray_cluster, decode=2)
    assert now.running("decode") < before.running("decode")
    for group in ("frontend", "prefill"):
        assert now.running(group) == before.running(group)


def test_the_replica_of_a_node_that_dies_moves_to_another_of_its_group(ray_cluster: Cluster) -> None:
    before = status(ray_cluster)
    (lost,) = before.running("prefill")
    stream = Stream(ray_cluster, a_frontend(ray_cluster), 20)
    with Questions(ray_cluster, before.nodes("frontend")) as questions:
        ray_cluster.kill(ray_cluster.nodes[lost.node])
        now = wait_until(lambda: (now := status(ray_cluster)).running("prefill") - {lost} and now, 90, "it is back")
    assert now.nodes("prefill") <= nodes_of(ray_cluster, "prefill")
    questions.were_answered(within_s=10)
    stream.ends_complete()
    settled(ray_cluster, prefill=1)
    address = a_frontend(ray_cluster)  # decode probes the new replica before it takes KV from there
    wait_until(lambda: ask(ray_cluster, address)["actual"]["kind"] == "remote", 60, "prefilled by the new replica")


def test_a_node_that_is_gone_without_a_word_holds_up_its_own_streams_and_ends_none(ray_cluster: Cluster) -> None:
    """Its connections are not closed: frontends must find out.  Then its streams go on elsewhere."""
    before = status(ray_cluster)
    streams = streams_on(ray_cluster, before.running("decode"), 25)
    lost, kept = before.running("decode")
    with Questions(ray_cluster, before.nodes("frontend")) as questions:
        ray_cluster.cut(ray_cluster.nodes[lost.node])
        for stream in streams[lost.id]:
            stream.ends_complete(longest_gap_s=25)
        for stream in streams[kept.id]:
            stream.ends_complete()
        now = wait_until(
            lambda: len((now := status(ray_cluster)).running("decode") - {lost}) == 2 and now, 120, "it is back"
        )
    assert now.running("decode") > {kept}
    assert now.nodes("decode") == nodes_of(ray_cluster, "decode")
    questions.were_answered(within_s=30)
    settled(ray_cluster, 90, decode=2)


def test_serving_goes_on_without_the_head_and_a_new_head_finds_everything(ray_cluster: Cluster) -> None:
    before = settled(ray_cluster)
    stream = Stream(ray_cluster, a_frontend(ray_cluster), 35)
    ray_cluster.kill(ray_cluster.nodes[HEAD])
    with Questions(ray_cluster, before.nodes("frontend") | before.nodes("decode")) as questions:
        wait_until(lambda: sum(questions.kinds.values()) > 20, 30, "requests are answered without a head")
        ray_cluster.start_head()
        now = settled(ray_cluster, 90)
    assert now.replicas == before.replicas
    questions.were_answered(within_s=10)
    assert set(questions.kinds) == {"remote"}
    stream.ends_complete()
    deploy(ray_cluster, decode=1)  # the controller works, too
    assert settled(ray_cluster, decode=1).running("decode") < before.running("decode")
