"""The kinds of the campaign that update the application: what they deploy, and what they call wrong."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from benchmarks.faults.deployed import BadAnswer, Deployed
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.updates import OtherKv, Part, Rescale, RollingUpdate

ARGUMENTS: dict[str, Any] = {
    "models": [{"prefill": {"engine": "sim", "replicas": 2}, "decode": {"engine": "sim", "replicas": 2}}],
    "frontend": {"replicas": 1},
}
SECTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "prefill-tiny": lambda arguments: arguments["models"][0]["prefill"],
    "decode-tiny": lambda arguments: arguments["models"][0]["decode"],
    "frontend": lambda arguments: arguments["frontend"],
}
KV = "KV of another kind: block_size_tokens is 16 at prefill and 96 at decode"


class FakeDeployed(Deployed):
    """Serve, which replaces the replicas whose environment changes, and those of `also`."""

    def __init__(self, also: str = "", problems: tuple[set[str], ...] = ()) -> None:
        super().__init__("baton")
        self.history = [ARGUMENTS]
        self._also = also
        self._problems = list(problems)
        self._generation = dict.fromkeys(SECTIONS, 0)

    def arguments(self) -> dict[str, Any]:
        from app.serve_document import unshared

        return unshared(self.history[-1])

    def deploy(self, arguments: dict[str, Any]) -> None:
        for name, section in SECTIONS.items():
            is_changed = section(arguments).get("environment") != section(self.history[-1]).get("environment")
            self._generation[name] += is_changed or name == self._also
        self.history.append(arguments)

    def replicas(self) -> dict[str, dict[str, str]]:
        return {name: {f"{name}-{number}": "RUNNING"} for name, number in self._generation.items()}

    def has_settled(self) -> bool:
        return True

    def link_problems(self) -> set[str]:
        return self._problems.pop(0)


async def strike(fault: RollingUpdate | Rescale | OtherKv, deployed: FakeDeployed) -> None:
    fleet = Fleet("http://nowhere", "tiny", deployed)
    try:
        await fault.strike(fleet, Random(0))
    finally:
        await fleet.close()


@pytest.mark.parametrize("parts", [(), ("prefill",), ("frontend",), ("prefill", "decode")])
async def test_an_update_changes_its_parts(parts: tuple[Part, ...]) -> None:
    deployed = FakeDeployed()
    await strike(RollingUpdate(parts), deployed)
    _, changed = deployed.history
    marked = [name for name, section in SECTIONS.items() if section(changed).get("environment")]
    assert [name.removesuffix("-tiny") for name in marked] == list(parts)


@pytest.mark.parametrize(
    ("parts", "also"), [(("prefill",), "decode-tiny"), (("decode",), "frontend"), ((), "frontend")]
)
async def test_replicas_that_are_replaced_for_nothing_are_told(parts: tuple[Part, ...], also: str) -> None:
    with pytest.raises(BadAnswer, match=also):
        await strike(RollingUpdate(parts), FakeDeployed(also))


async def test_replicas_that_are_not_replaced_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDeployed, "deploy", lambda self, arguments: self.history.append(arguments))
    with pytest.raises(BadAnswer, match="decode-tiny"):
        await strike(RollingUpdate(("decode",)), FakeDeployed())


async def test_a_pool_loses_a_replica_and_gets_two() -> None:
    deployed = FakeDeployed()
    await strike(Rescale("decode"), deployed)
    assert [SECTIONS["decode-tiny"](arguments)["replicas"] for arguments in deployed.history] == [2, 1, 3, 2]


async def test_other_kv_is_refused_between_the_pairs_that_do_not_fit_in_both_orders() -> None:
    deployed = FakeDeployed(problems=({KV}, set(), {KV}, set()))
    await strike(OtherKv("decode", "prefill"), deployed)
    _, apart, changed, other_way_apart, back, after = deployed.history
    pools = ("decode-tiny", "prefill-tiny")
    numbers = [[SECTIONS[name](each)["replicas"] for name in pools] for each in (apart, changed, other_way_apart, back)]
    assert numbers == [[1, 2], [1, 2], [2, 1], [2, 1]]
    arguments = [each["models"][0].get("engine_args", {}) for each in deployed.history]
    assert arguments == [{}, {}, {"block_size": 96}, {"block_size": 96}, {}, {}]
    assert after == ARGUMENTS


@pytest.mark.parametrize("problems", [(set(), set()), ({KV}, {KV})], ids=["none refused", "still refused"])
async def test_pairs_that_are_not_refused_or_stay_refused_are_told(problems: tuple[set[str], ...]) -> None:
    with pytest.raises(BadAnswer, match="refused"):
        await strike(OtherKv("prefill", "decode"), FakeDeployed(problems=problems * 2))
