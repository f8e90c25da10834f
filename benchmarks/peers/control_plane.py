"""What is measured without engines: the cost of serving if the model costs nothing.

==========================  ===============================================================================
`vllm-fake`                 vLLM's own API server over an engine that computes nothing, in one process: the floor
                            of every server with vLLM's frontend in it
`vllm-rs`                   vLLM's Rust front end over another engine that computes nothing (vllm_rs.py): the floor
                            for the same if it were in Rust
`baton-sim`                 Baton with a decode pool of sim engines
`baton-sim-2`, -4, -8       the same with so many frontends, which share the port
`baton-sim-pd`              `baton-sim` with prefill apart, so with a handoff for each request
`dynamo`                    NVIDIA Dynamo: its frontend with the KV router, and its mocker as the engine
`ray-llm-sim`               Ray Serve LLM's OpenAI application with its defaults, over the engine of `vllm-fake`
`ray-llm-sim-direct`        the same with what its documentation names for throughput: HAProxy, direct streaming, gRPC
`sglang-router-fake`        sglang-router in front of `vllm-fake`: less `vllm-fake` it is the router's cost alone
==========================  ===============================================================================

Each is one engine behind one frontend, but for `baton-sim-2` to -8.  Full speed shows how much load a server can take,
and what it adds to the TTFT.  But a server that puts several tokens into one event can then put many into each.  With
`Setup.token_ms`, every engine makes one token of each sequence in each step, all steps take the same time, and nearly
every token is an event.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from app.ports import free_port
from benchmarks.peers.targets import (
    HOST,
    ONE_REPLICA,
    Command,
    Plan,
    Planner,
    Setup,
    baton_document,
    behind_sglang_router,
    ray_llm_config,
    run_baton,
    run_ray_llm,
    to_flags,
)

FAKE_ENGINE_TOKEN_MS = "FAKE_ENGINE_TOKEN_MS"
"""The same as in benchmarks/peers/fake_engine.py, which cannot be imported here because it imports vLLM."""

REPOSITORY = Path(__file__).parents[2]

FULL_SPEED = {"speedup_ratio": 1_000_000, "decode_speedup_ratio": 1_000}
"""The arguments of Dynamo's mocker.  Its 0, "infinite speedup", is slower: 6 ms a token with 1.6.1."""

FASTEST_RAY_LLM = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
}
"""As in https://docs.ray.io/en/master/kuberay/user-guides/serve-high-throughput.html"""


def _plan_vllm_fake(setup: Setup, folder: Path) -> Plan:
    port = free_port()
    options = {
        "model": setup.model_path,
        "served-model-name": setup.model.name,
        "host": HOST,
        "port": port,
        "disable-log-stats": True,
        **setup.engine_args,
    }
    server = [sys.executable, "-m", "benchmarks.peers.fake_engine", *to_flags(options)]
    return Plan([Command("server", server, {**setup.environment, **_fake_engine_pace(setup)})], port)


def _plan_vllm_rs(setup: Setup, folder: Path) -> Plan:
    port = free_port()
    words = [setup.program("vllm-rs", "vllm-rs"), str(port), setup.model_path, setup.model.name, str(setup.token_ms)]
    server = [sys.executable, "-m", "benchmarks.peers.vllm_rs", *words]
    return Plan([Command("vllm-rs", server, {})], port)


def _fake_engine_pace(setup: Setup) -> dict[str, str]:
    return {FAKE_ENGINE_TOKEN_MS: str(setup.token_ms)} if setup.token_ms else {}


def _plan_sglang_router(setup: Setup, folder: Path) -> Plan:
    return behind_sglang_router(setup, _plan_vllm_fake(setup, folder))


def _plan_baton_sim(setup: Setup, folder: Path) -> Plan:
    return run_baton(setup, folder, sim_document(setup, folder, is_disaggregated=False))


def _plan_baton_frontends(setup: Setup, folder: Path, num: int) -> Plan:
    document = sim_document(setup, folder, is_disaggregated=False)
    document["applications"][0]["args"]["frontend"]["replicas"] = num
    return run_baton(setup, folder, document)


def _plan_baton_sim_pd(setup: Setup, folder: Path) -> Plan:
    return run_baton(setup, folder, sim_document(setup, folder, is_disaggregated=True))


def sim_document(setup: Setup, folder: Path, *, is_disaggregated: bool) -> dict[str, Any]:
    """Return the Serve config with sim engines in place of its engines."""
    document = baton_document(setup.document, is_disaggregated=is_disaggregated)
    model = document["applications"][0]["args"]["models"][0]
    model["engine_args"] = {"speed_up": "max"}
    if setup.token_ms:
        profile = folder / "profile.yaml"
        profile.write_text(yaml.safe_dump(constant_profile(setup.token_ms)))
        model["engine_args"] = {"profile": str(profile)}
    for pool in (model[name] for name in ("prefill", "decode") if name in model):
        pool["engine"] = "sim"
        pool.pop("engine_args", None)
    return document


def constant_profile(token_ms: float) -> dict[str, Any]:
    """Return a profile of the sim engine in which prompts and transfers take no time and a step takes `token_ms`."""
    return {
        "source": "made up",
        "prefill": {"base_s": 0.0, "per_token_s": 0.0, "per_token_squared_s": 0.0},
        "step": {"base_s": token_ms / 1000, "per_sequence_s": 0.0, "per_kv_token_s": 0.0},
        "transfer": {"base_s": 0.0, "bytes_per_s": 1e15},
        "kv_bytes_per_token": 1,
    }


def _plan_dynamo(setup: Setup, folder: Path) -> Plan:
    port, python = free_port(), setup.python("dynamo")
    environment = {"DYN_FILE_KV": str(folder / "discovery"), "HF_HUB_OFFLINE": "1"}
    planes = {"discovery-backend": "file", "request-plane": "tcp"}
    speed = {"planner-profile-data": _mocker_times(setup.token_ms, folder)} if setup.token_ms else FULL_SPEED
    mocker = {"model-path": setup.model_path, "model-name": setup.model.name, **speed, **planes}
    frontend = {"http-host": HOST, "http-port": port, "router-mode": "kv", **planes}
    return Plan(
        [
            Command("mocker", [python, "-m", "dynamo.mocker", *to_flags(mocker)], environment),
            Command("frontend", [python, "-m", "dynamo.frontend", *to_flags(frontend)], environment),
        ],
        port,
    )


def _mocker_times(token_ms: float, folder: Path) -> Path:
    """Write the mocker's table of times.  Prompts take no time, and a step takes `token_ms` with any amount of KV."""
    import numpy

    path, few_and_many = folder / "times.npz", [1.0, 1e6]
    numpy.savez(
        path,
        prefill_isl=few_and_many,
        prefill_ttft_ms=[0.0, 0.0],
        decode_active_kv_tokens=few_and_many,
        decode_context_length=few_and_many,
        decode_itl=[[token_ms, token_ms], [token_ms, token_ms]],
    )
    return path


def _plan_ray_llm_sim(setup: Setup, folder: Path) -> Plan:
    args = {"llm_configs": [ray_llm_config(setup)], "ingress_deployment_config": ONE_REPLICA}
    return run_ray_llm(setup, folder, "build_openai_app", args, _with_fake_engine(setup))


def _plan_ray_llm_sim_direct(setup: Setup, folder: Path) -> Plan:
    # The default is fixed, so another HAProxy of Serve on this machine would have the same port.
    ports = {name: str(free_port()) for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")}
    args = {"llm_configs": [ray_llm_config(setup)]}
    environment = {**_with_fake_engine(setup), **FASTEST_RAY_LLM, **ports}
    return run_ray_llm(setup, folder, "build_openai_app", args, environment)


def _with_fake_engine(setup: Setup) -> dict[str, str]:
    return {
        **setup.environment,
        **_fake_engine_pace(setup),
        "RAYLLM_VLLM_ENGINE_CLS": "benchmarks.peers.ray_llm_fake.FakeVLLMEngine",
        "PYTHONPATH": str(REPOSITORY),
    }


TARGETS: dict[str, Planner] = {
    "vllm-fake": _plan_vllm_fake,
    "vllm-rs": _plan_vllm_rs,
    "baton-sim": _plan_baton_sim,
    **{f"baton-sim-{num}": partial(_plan_baton_frontends, num=num) for num in (2, 4, 8)},
    "baton-sim-pd": _plan_baton_sim_pd,
    "dynamo": _plan_dynamo,
    "ray-llm-sim": _plan_ray_llm_sim,
    "ray-llm-sim-direct": _plan_ray_llm_sim_direct,
    "sglang-router-fake": _plan_sglang_router,
}
