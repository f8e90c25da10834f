"""Updates of the running application under load.  They are no faults: nobody may lose anything."""

from __future__ import annotations

from random import Random
from typing import Any, Literal

import msgspec

from benchmarks.faults.deployed import BadAnswer, Deployed
from benchmarks.faults.fleet import Fleet

Part = Literal["prefill", "decode", "frontend"]
PARTS: tuple[Part, ...] = ("prefill", "decode", "frontend")
MARK = "BATON_UPDATE"
"""An environment variable that means nothing.  Serve replaces the replicas whose environment changes."""

OTHER_BLOCKS = {"vllm": {"block_size": 96}, "sim": {"block_size": 96}, "sglang": {"page_size": 64}}
"""Engine arguments for KV that does not fit that of cluster/local/*-faults.yaml, either way.  They change no output."""


def section(arguments: dict[str, Any], part: Part) -> dict[str, Any]:
    """Return the settings of the frontends, or of a pool of the first model."""
    if part == "frontend":
        found: dict[str, Any] = arguments.setdefault("frontend", {})
    else:
        found = arguments["models"][0][part]
    return found


class RollingUpdate(msgspec.Struct, frozen=True):
    """The application is deployed again with a change to some parts or none."""

    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        return f"update {' and '.join(self.parts) or 'without a change'}"

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Raises BadAnswer if the update fails, or replaces other replicas than it has to."""
        deployed = fleet.deployed
        old, changed = deployed.replicas(), deployed.arguments()
        for part in self.parts:
            section(changed, part).setdefault("environment", {})[MARK] = str(random.random())
        await deployed.update(changed)
        self._check(old, deployed.replicas())
        return ""

    def _check(self, old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> None:
        for deployment in old:
            stayed = sorted(old[deployment].keys() & new[deployment].keys())
            is_updated = deployment.startswith(self.parts)
            if stayed != ([] if is_updated else sorted(old[deployment])):
                raise BadAnswer(f"{self.name}: of {deployment} stayed {stayed} of {sorted(old[deployment])}")


class Rescale(msgspec.Struct, frozen=True):
    """A pool loses a replica, gets two and loses one: workers come and go."""

    part: Part

    @property
    def name(self) -> str:
        return f"scale {self.part}"

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Raises BadAnswer."""
        deployed = fleet.deployed
        num = section(deployed.arguments(), self.part)["replicas"]
        for wanted in (max(1, num - 1), num + 1, num):
            arguments = deployed.arguments()
            section(arguments, self.part)["replicas"] = wanted
            await deployed.update(arguments)
        return ""


class OtherKv(msgspec.Struct, frozen=True):
    """Both pools are updated to KV that does not fit the old one, one of them sooner, and back, the other one sooner.

    Serve updates all deployments at once, each one replica after the other.  So the pool that has one is through first.
    """

    first: Part
    last: Part

    @property
    def name(self) -> str:
        return f"update to other KV with {self.first} first and back with {self.last} first"

    async def strike(self, fleet: Fleet, random: Random) -> str:
        """Raises BadAnswer if no pair was refused while both kinds were there, or if one is refused afterwards."""
        deployed, before = fleet.deployed, fleet.deployed.arguments()
        model = before["models"][0]
        own = model.get("engine_args", {})
        other = {**own, **OTHER_BLOCKS[model["decode"].get("engine", "vllm")]}
        try:
            await self._update(deployed, other, self.first, self.last)
            await self._update(deployed, own, self.last, self.first)
        finally:
            await deployed.update(before)
        return ""

    async def _update(self, deployed: Deployed, engine_args: dict[str, Any], first: Part, last: Part) -> None:
        apart = deployed.arguments()
        section(apart, first)["replicas"], section(apart, last)["replicas"] = 1, 2
        await deployed.update(apart)
        changed = deployed.arguments()
        changed["models"][0]["engine_args"] = engine_args
        problems: set[str] = set()
        await deployed.update(changed, lambda: problems.update(deployed.link_problems()))
        if not any("KV of another kind" in problem for problem in problems):
            raise BadAnswer(f"no pair was refused for its KV: {sorted(problems)}")
        if left := deployed.link_problems():
            raise BadAnswer(f"after the update pairs are still refused: {sorted(left)}")


UPDATES: tuple[RollingUpdate | Rescale | OtherKv, ...] = (
    RollingUpdate(()),
    *(RollingUpdate((part,)) for part in PARTS),
    *map(Rescale, PARTS),
    OtherKv("prefill", "decode"),
)
