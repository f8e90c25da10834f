"""``python -m benchmarks.faults.nodes``: faults of machines and networks under load, on a cluster made here."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from app.bench.output import check_files
from app.cli.entry import run_app, to_app
from benchmarks.faults.carrying_out import carry_out, choose
from benchmarks.faults.cluster_fleet import ClusterFleet
from benchmarks.faults.load import Load
from benchmarks.faults.network_faults import network_faults
from benchmarks.faults.questions import draw_questions
from benchmarks.nodes.cluster import REPOSITORY, SERVE_PORT, Cluster, cluster

CONFIG = REPOSITORY / "cluster/local/sim-faults.yaml"
GROUPS = ("frontend", "prefill", "decode")
NODES_PER_GROUP = 2


def bench_faults_of_nodes(
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 50,
    only: Annotated[str, typer.Option(help="Only kinds whose names contain one of these, as: kill,stop.")] = "",
    streams: Annotated[int, typer.Option(min=1, help="Streams of requests at a time.")] = 8,
    questions: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 24,
    seed: Annotated[int, typer.Option(help="Of faults, victims and prompts.")] = 0,
    minutes: Annotated[float, typer.Option(help="Begin no more faults after so long.")] = math.inf,
    json: Annotated[Path | None, typer.Option(help="Write everything there.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the nodes' files there.")] = None,
) -> None:
    """Cut, slow and lose what connects nodes, and nodes, while all answers are compared with those without faults.

    The nodes are namespaces on this machine: a head with Redis, and two with a replica each of frontend, prefill and
    decode, on engines that compute nothing.  Exits with 1 if any answer was wrong or hung, if KV leaked, or if a fault
    showed what should not be.
    """
    check_files(json, None)
    with tempfile.TemporaryDirectory(prefix="baton-nodes-") as folder, cluster(logs or Path(folder)) as nodes:
        fleet = serve(nodes)
        load = Load(fleet.url, fleet.model, draw_questions(questions, seed), streams, fleet.socket)
        carry_out(choose(network_faults(fleet), only), faults, fleet, load, seed, json, 60 * minutes)


def serve(nodes: Cluster) -> ClusterFleet:
    """Start all nodes and the application on them.  Raises NoCluster."""
    nodes.start_head()
    for group in GROUPS:
        for _ in range(NODES_PER_GROUP):
            nodes.start(group, cpus=1)
            nodes.wait_for_nodes()  # one after the other, as each start takes seconds of all cores
    document = of_nodes(yaml.safe_load(CONFIG.read_text()))
    nodes.deploy(document)
    return ClusterFleet(nodes, document["applications"][0]["args"]["models"][0]["name"])


def of_nodes(document: dict[str, Any]) -> dict[str, Any]:
    """Change a Serve config for one machine such that each replica takes a node of its group."""
    document["http_options"] = {"host": "0.0.0.0", "port": SERVE_PORT}
    arguments = document["applications"][0]["args"]
    arguments["security"] = {"open": True}  # the nodes are network namespaces of this machine
    (model,) = arguments["models"]
    for group in GROUPS:
        deployment = arguments[group] if group == "frontend" else model[group]
        deployment["replicas"] = NODES_PER_GROUP
        deployment["resources"] = {"num_cpus": 1, "node_labels": {"baton/group": group}}
    return document


if __name__ == "__main__":
    run_app(to_app(bench_faults_of_nodes), "benchmarks.faults.nodes")
