"""Faults of machines and of what connects them, on a cluster of several nodes (benchmarks/nodes)."""

from __future__ import annotations

import asyncio
import signal
from random import Random
from typing import Literal

import msgspec

from benchmarks.faults.cluster_fleet import ClusterFleet
from benchmarks.faults.fleet import Fleet
from benchmarks.faults.process_faults import send_signal
from benchmarks.nodes.cluster import Node
from benchmarks.nodes.switch import Wire

Group = Literal["frontend", "prefill", "decode"]
CUT_PAIRS: tuple[tuple[Group, Group], ...] = (("prefill", "decode"), ("frontend", "decode"))
BAD_PAIRS: tuple[tuple[Group, Group], ...] = (*CUT_PAIRS, ("frontend", "prefill"), ("frontend", "frontend"))
HOLDS_S = (3.0, 15.0, 60.0)
BAD_S = 15.0
"""How long links are slow or lossy, and ports closed."""
STOPS_S = (1.0, 10.0, 60.0)
NODE_LOST_S = 5.0
"""How long a node is away that is lost."""


class LinkFault(msgspec.Struct, frozen=True):
    """What goes between a node of one group and a node of another suffers for some time, `ways` of these ways."""

    cluster: ClusterFleet
    name: str
    ends: tuple[Group, Group]
    wire: Wire
    """What suffers how; its ends are to be chosen."""
    hold_s: float
    ways: Literal["both", "there", "back"] = "both"
    port: Literal["", "KV", "channel"] = ""
    """Whether only one port of the second node is closed: the one that gives KV, or its replica's channel."""

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if there is no such node or port."""
        first = random.choice(self.cluster.nodes(self.ends[0]))
        second = random.choice([node for node in self.cluster.nodes(self.ends[1]) if node is not first])
        there = msgspec.structs.replace(
            self.wire, source=first.number, destination=second.number, port=await self._port_of(second)
        )
        back = msgspec.structs.replace(there, source=second.number, destination=first.number)
        wires = {"both": (there, back), "there": (there,), "back": (back,)}[self.ways]
        try:
            self.cluster.cluster.set_wires(*wires)
            await asyncio.sleep(self.hold_s)
        finally:
            self.cluster.cluster.set_wires()

    async def _port_of(self, node: Node) -> int | None:
        if self.port == "KV":
            return await self.cluster.kv_port(node)
        return self.cluster.channel_port(node) if self.port == "channel" else None


class NodeFault(msgspec.Struct, frozen=True):
    """A worker node is lost, at once or without a word, and comes back; or its raylet is."""

    cluster: ClusterFleet
    group: Group
    act: Literal["kill", "unplug", "kill raylet", "stop raylet"]
    hold_s: float = NODE_LOST_S

    @property
    def name(self) -> str:
        return {
            "kill": f"lose a {self.group} node",
            "unplug": f"lose a {self.group} node without a word",
            "kill raylet": f"kill -9 raylet of {self.group}",
            "stop raylet": f"stop raylet of {self.group} {self.hold_s:g} s",
        }[self.act]

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Return when the node is back, or its raylet has been killed or goes on."""
        cluster, node = self.cluster.cluster, random.choice(self.cluster.nodes(self.group))
        if self.act in ("kill", "unplug"):
            await asyncio.to_thread(cluster.kill if self.act == "kill" else cluster.cut, node)
            await asyncio.sleep(self.hold_s)
            await asyncio.to_thread(cluster.wait_until_missed, node)  # before that all looks whole
            await asyncio.to_thread(cluster.start_anew, node)
        elif self.act == "kill raylet":
            send_signal(self.cluster.part("raylet", node), signal.SIGKILL)
        else:
            await _stop(self.cluster, "raylet", node, self.hold_s)


class HeadFault(msgspec.Struct, frozen=True):
    """What keeps the cluster's state is killed and comes back, or is stopped and goes on."""

    cluster: ClusterFleet
    part: Literal["GCS", "Redis"]
    act: Literal["kill", "stop"]
    hold_s: float = NODE_LOST_S

    @property
    def name(self) -> str:
        return f"kill -9 {self.part}" if self.act == "kill" else f"stop {self.part} {self.hold_s:g} s"

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Return when Redis is back, or the GCS has been killed; the head then ends and is started again."""
        (head,) = self.cluster.nodes("head")
        node = head if self.part == "GCS" else None
        if self.act == "stop":
            await _stop(self.cluster, self.part, node, self.hold_s)
            return
        send_signal(self.cluster.part(self.part, node), signal.SIGKILL)
        await asyncio.sleep(self.hold_s)
        if self.part == "Redis":
            await asyncio.to_thread(self.cluster.cluster.start_redis)


async def _stop(fleet: ClusterFleet, part: str, node: Node | None, hold_s: float) -> None:
    processes = fleet.part(part, node)
    if not processes:
        raise LookupError(f"there is no {part}")
    try:
        send_signal(processes, signal.SIGSTOP)
        await asyncio.sleep(hold_s)
    finally:
        send_signal(processes, signal.SIGCONT)


def network_faults(cluster: ClusterFleet) -> list[LinkFault | NodeFault | HeadFault]:
    """Return all kinds."""
    return [
        *_cuts(cluster),
        *_bad_links(cluster),
        *(NodeFault(cluster, group, act) for group in ("frontend", "prefill", "decode") for act in ("kill", "unplug")),
        *(NodeFault(cluster, group, "kill raylet") for group in ("prefill", "decode")),
        *(NodeFault(cluster, "decode", "stop raylet", hold_s) for hold_s in STOPS_S),
        *(HeadFault(cluster, part, "kill") for part in ("GCS", "Redis")),
        *(HeadFault(cluster, "Redis", "stop", hold_s) for hold_s in STOPS_S),
    ]


def _cuts(cluster: ClusterFleet) -> list[LinkFault]:
    lost, arrows = Wire(0, 0, loss=1.0), {"both": "-", "there": "->", "back": "<-"}
    return [
        *(
            LinkFault(cluster, f"cut {ends[0]} {arrows[ways]} {ends[1]} {hold_s:g} s", ends, lost, hold_s, ways)
            for ends in CUT_PAIRS
            for ways in ("both", "there", "back")
            for hold_s in HOLDS_S
        ),
        LinkFault(cluster, f"cut frontend - frontend {BAD_S:g} s", ("frontend", "frontend"), lost, BAD_S),
        LinkFault(cluster, f"cut frontend - prefill {BAD_S:g} s", ("frontend", "prefill"), lost, BAD_S),
        LinkFault(cluster, "close side channel", ("decode", "prefill"), lost, BAD_S, port="KV"),
        LinkFault(cluster, "close channel of decode", ("frontend", "decode"), lost, BAD_S, port="channel"),
    ]


def _bad_links(cluster: ClusterFleet) -> list[LinkFault]:
    wires = {
        "delay 200 ms": Wire(0, 0, delay_s=0.2),
        "lose 5 %": Wire(0, 0, loss=0.05),
        "lose 20 %": Wire(0, 0, loss=0.2),
    }
    return [
        LinkFault(cluster, f"{what} {ends[0]} - {ends[1]}", ends, wire, BAD_S)
        for what, wire in wires.items()
        for ends in BAD_PAIRS
    ]
