"""The short form of `make test-faults`: some faults under load on sim engines, with every answer compared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from rich.console import Console

from app.serve_document import unshared
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.deployed import Deployed
from benchmarks.faults.fault import Fault
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.kinds import kinds
from benchmarks.faults.load import Load
from benchmarks.faults.questions import draw_questions
from benchmarks.faults.report import Row, summarise
from benchmarks.faults.updates import RollingUpdate
from tests.conftest import REPOSITORY, wait_until

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

HARMLESS = ("poison", "flood of sequences", "flood of bytes", "silent clients", "clients that leave", "burst")
"""What clients do.  Nobody else may notice."""
INSIDE = (
    "descriptor: other blocks",
    "descriptor: older",
    "descriptor: undecoded",
    "exception in decode replica's follow-cache",
    "exception in prefill replica's watch-load",
    "exception in frontend's channel",
)
"""What no client may see."""
UPDATE = RollingUpdate(("prefill", "decode"))
LOSSES = ("kill -9 prefill replica", "kill -9 decode replica", "stop decode replica 1 s")


class DeployedHere(Deployed):
    """The application as this process deploys it.  Building it anew in the cluster would take seconds each time."""

    current: dict[str, Any]

    async def connect(self, raylet: int) -> None:
        pass

    def arguments(self) -> dict[str, Any]:
        return unshared(self.current)

    def deploy(self, arguments: dict[str, Any]) -> None:
        from benchmarks.faults.agent_calls import build

        self.current = arguments
        serve.run(build(unshared(arguments)), name=self.name, route_prefix="/faults")


DEPLOYED = DeployedHere("faults")


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    config = yaml.safe_load((REPOSITORY / "cluster" / "local" / "sim-faults.yaml").read_text())
    arguments = config["applications"][0]["args"]
    arguments["models"][0]["engine_args"]["speed_up"] = 0.5
    arguments["frontend"]["replicas"] = 1  # a second one takes longer to start than all faults of a kind
    DEPLOYED.deploy(arguments)
    url = f"{serve_url}/faults"
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "healthy", 60, "both pools ready")
    yield url
    serve.delete("faults")


def strike(url: str, *names: str) -> tuple[dict[str, Row], int]:
    """Return what was seen of each kind of fault, and how many KV blocks leaked."""

    async def run() -> tuple[dict[str, Row], int]:
        found: dict[str, Fault] = {kind.name: kind for kind in [*kinds("sim"), UPDATE]}
        load = Load(url, "tiny", draw_questions(8, seed=1), num_streams=4)
        campaign = Campaign(Fleet(url, "tiny", DEPLOYED), load, Console(quiet=True))
        assert await campaign.run([found[name] for name in names], Random(1)) == ""
        return {row.name: row for row in summarise(campaign.struck, load.answers, load.right)}, campaign.num_leaked

    return asyncio.run(run())


def test_nobody_notices_what_clients_do(url: str) -> None:
    rows, num_leaked = strike(url, *HARMLESS)
    assert {name: row.problems for name, row in rows.items()} == {name: [] for name in HARMLESS}
    for row in rows.values():
        assert row.ends.keys() <= {"right", "refused"}, row
        assert row.ends["refused"] == 0 or row.name == "burst", row
    assert num_leaked == 0


def test_what_goes_wrong_inside_gives_no_wrong_answer(url: str) -> None:
    rows, num_leaked = strike(url, *INSIDE)
    assert {name: row.problems for name, row in rows.items()} == {name: [] for name in INSIDE}
    for row in rows.values():
        assert row.num_answers > 0
        assert row.ends.keys() <= {"right", "ended"}, row
        assert row.ends["ended"] == 0 or row.name == "exception in frontend's channel", row
    assert num_leaked == 0


def test_the_loss_of_one_of_two_replicas_costs_no_answer(url: str) -> None:
    rows, num_leaked = strike(url, *LOSSES)
    for row in rows.values():
        assert row.num_answers > 0
        assert row.ends.keys() == {"right"}, row
    assert num_leaked == 0


def test_an_update_of_both_pools_loses_nothing(url: str) -> None:
    rows, num_leaked = strike(url, UPDATE.name)
    row = rows[UPDATE.name]
    assert (row.problems, num_leaked) == ([], 0)
    assert row.num_answers > 0
    assert row.ends.keys() == {"right"}, row
