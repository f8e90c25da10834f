"""``python -m benchmarks.faults.ray_llm``: the same faults on Ray Serve LLM's own P/D application, which this starts.

Only those of processes are made: the other kinds ask for what is Baton's own.  It does not tell what its KV blocks are
held for, so leaks cannot be counted.
"""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from app.bench.client import new_async_client
from app.bench.output import check_files
from app.cli.check import check_document
from app.cli.entry import run_app, to_app
from app.serve_document import load_document
from benchmarks.faults.carrying_out import carry_out, choose
from benchmarks.faults.fleet import ANSWER_TIMEOUT_S, Fleet, Target, engine_of, raylet_of
from benchmarks.faults.load import Load
from benchmarks.faults.process_faults import ProcessFault, process_faults
from benchmarks.faults.questions import draw_questions
from benchmarks.peers.servers import running
from benchmarks.peers.targets import ONE_REPLICA, Setup, ray_llm_pd_args, run_ray_llm

APPLICATION = "ray-llm"
DEPLOYMENTS = {"prefill": "Prefill:", "decode": "Decode:", "frontend": "OpenAiIngress"}
"""What the names of its deployments begin with."""
NUM_DECODE = 2


class RayLlmFleet(Fleet):
    """Ray Serve LLM's replicas, as Ray's dashboard lists them."""

    def __init__(self, url: str, model: str, dashboard: str) -> None:
        super().__init__(url, model)
        self._dashboard = new_async_client(dashboard, ANSWER_TIMEOUT_S)

    async def close(self) -> None:
        await self._dashboard.aclose()
        await super().close()

    async def learn(self) -> None:
        replicas = await self._replicas()
        self.pools = {role: len(pids) for role, pids in replicas.items()}
        self.raylet = raylet_of(replicas["decode"][0])

    async def processes(self, target: Target) -> list[list[psutil.Process]]:
        if target in ("HAProxy", "controller"):
            return await super().processes(target)
        role, _, what = target.partition(" ")
        replicas = [psutil.Process(pid) for pid in (await self._replicas())[role] if psutil.pid_exists(pid)]
        return [engine_of(replica) if what == "engine" else [replica] for replica in replicas]

    async def is_whole(self) -> bool:
        """Whether as many replicas run as did at the beginning, and a completion succeeds."""
        body = {"model": self.model, "prompt": "Ready?", "max_tokens": 1}
        try:
            found = {role: len(pids) for role, pids in (await self._replicas()).items()}
            return found == self.pools and (await self.client.post("/v1/completions", json=body)).is_success
        except httpx.HTTPError:
            return False

    async def held_blocks(self) -> int | None:
        return 0

    async def _replicas(self) -> dict[str, list[int]]:
        """Return the process ids of the running replicas, by role.  Raises httpx.HTTPError."""
        answer = await self._dashboard.get("/api/serve/applications/")
        deployments: dict[str, Any] = answer.raise_for_status().json()["applications"][APPLICATION]["deployments"]
        return {
            role: [
                replica["pid"]
                for name, deployment in deployments.items()
                if name.startswith(prefix)
                for replica in deployment["replicas"]
                if replica["state"] == "RUNNING"
            ]
            for role, prefix in DEPLOYMENTS.items()
        }


def ray_llm_faults() -> list[ProcessFault]:
    """Return the kinds that its processes can take: it has no HAProxy unless it is told to."""
    return [kind for kind in process_faults(has_engines=True) if kind.target != "HAProxy"]


def strike_ray_llm(
    environments: Annotated[
        Path, typer.Option(help="The peers' Python environments (benchmarks/peers/environments.sh).")
    ],
    config: Annotated[
        Path, typer.Option(help="The Serve config file whose model and engine arguments it gets.")
    ] = Path("cluster/local/vllm-faults.yaml"),
    faults: Annotated[int, typer.Option(min=1, help="How many faults.")] = 20,
    minutes: Annotated[float, typer.Option(min=0.0, help="Begin no other fault after so many minutes.")] = math.inf,
    only: Annotated[str, typer.Option(help="Only kinds whose names contain one of these, as: kill,stop.")] = "",
    streams: Annotated[int, typer.Option(min=1, help="Streams of requests at a time.")] = 4,
    questions: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 8,
    seed: Annotated[int, typer.Option(help="Of faults, victims and prompts.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write everything there.")] = None,
) -> None:
    """Start Ray Serve LLM with one prefill and two decode replicas, and kill and stop its processes under load.

    Exits with 1 if any answer was wrong or hung, or if the application did not come back.
    """
    check_files(json, None)
    document = load_document(config)
    setup = Setup(document, check_document(document), environments.absolute())
    with tempfile.TemporaryDirectory(prefix="baton-faults-") as name:
        folder = Path(name)
        args = ray_llm_pd_args(setup)
        args["decode_config"]["deployment_config"] = {**ONE_REPLICA, "num_replicas": NUM_DECODE}
        environment = {**setup.environment, "RAY_AUTH_MODE": "disabled"}  # else the dashboard asks for a token
        plan = run_ray_llm(setup, folder, "build_pd_openai_app", args, environment)
        with running(plan, setup.model.name, folder):
            fleet = RayLlmFleet(plan.base_url, setup.model.name, _dashboard(folder / "serve-run.log"))
            load = Load(plan.base_url, setup.model.name, draw_questions(questions, seed), streams)
            carry_out(choose(ray_llm_faults(), only), faults, fleet, load, seed, json, 60 * minutes)


def _dashboard(log: Path) -> str:
    """Return the URL of Ray's dashboard, which Ray writes into its log."""
    found = re.search(r"dashboard at\W+(?:\S*m)?(?:http://)?(127\.0\.0\.1:\d+)", log.read_text())
    assert found is not None, log
    return f"http://{found[1]}"


if __name__ == "__main__":
    run_app(to_app(strike_ray_llm), "benchmarks.faults.ray_llm")
