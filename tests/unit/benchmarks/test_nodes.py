"""The switch between the nodes of a cluster, its wires, the load balancer before them, and faults of all these."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from benchmarks.faults.cluster_fleet import listening_ports
from benchmarks.faults.network_faults import LinkFault, network_faults
from benchmarks.faults.nodes import of_nodes
from benchmarks.nodes.balancer import configuration
from benchmarks.nodes.switch import FRAME_BYTES, IPV4, TCP, Plug, SetWires, Switch, Unplug, Wire, ports

NODES = (2, 3, 4)
TO_ALL = bytes([0xFF] * 6)


def frame(destination: bytes | int, source_port: int = 0, destination_port: int = 0, protocol: int = TCP) -> bytes:
    to = destination if isinstance(destination, bytes) else bytes([2, 0, 0, 0, 0, destination])
    header = bytes([0x46, *[0] * 8, protocol, *[0] * 14])  # of 24 bytes: with an option
    return to + bytes(6) + IPV4 + header + struct.pack("!HH", source_port, destination_port)


class Ends:
    """The nodes' ends of the switch's devices, which are sockets here."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[socket.socket, socket.socket]] = {}

    def open(self, number: int) -> int:
        if number in self._pairs:
            self._pairs[number][1].close()
        pair = self._pairs[number] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in pair:
            end.setblocking(False)
        return pair[0].detach()

    def send(self, number: int, content: bytes) -> None:
        self._pairs[number][1].send(content)

    async def take(self, number: int) -> bytes:
        """The next frame that comes to a node."""
        return await asyncio.get_running_loop().sock_recv(self._pairs[number][1], FRAME_BYTES)

    def close(self) -> None:
        for _, end in self._pairs.values():
            end.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


async def switch_of(ends: Ends, *wires: Wire) -> Switch:
    switch = Switch(Random(1), ends.open)
    for number in NODES:
        switch.obey(Plug(number))
    switch.obey(SetWires(list(wires)))
    return switch


async def unplug_all(switch: Switch) -> None:
    for number in NODES:
        switch.obey(Unplug(number))


def test_ports_are_those_of_tcp_only() -> None:
    assert ports(frame(2, 1000, 8000)) == (1000, 8000)
    assert ports(frame(2, 1000, 8000, protocol=17)) == ()
    assert ports(TO_ALL + bytes(6) + b"\x08\x06" + bytes(28)) == ()


async def test_a_frame_goes_to_the_node_that_it_is_for_and_what_is_for_all_to_all_others(ends: Ends) -> None:
    switch = await switch_of(ends)
    ends.send(2, frame(3))
    ends.send(2, frame(TO_ALL))
    assert [await ends.take(3), await ends.take(3), await ends.take(4)] == [frame(3), frame(TO_ALL), frame(TO_ALL)]
    ends.send(3, frame(2))
    assert await ends.take(2) == frame(2)  # and not what it has sent itself
    await unplug_all(switch)


async def test_a_cut_wire_loses_all_of_its_way_and_nothing_else(ends: Ends) -> None:
    switch = await switch_of(ends, Wire(2, 3, loss=1.0))
    for source, destination in ((2, 3), (2, 4), (3, 2)):
        ends.send(source, frame(destination))
    assert [await ends.take(4), await ends.take(2)] == [frame(4), frame(2)]
    switch.obey(SetWires([]))
    ends.send(2, frame(3, 5, 5))
    assert await ends.take(3) == frame(3, 5, 5)
    await unplug_all(switch)


async def test_a_closed_port_loses_what_comes_from_and_goes_to_it(ends: Ends) -> None:
    switch = await switch_of(ends, Wire(2, 3, loss=1.0, port=8000))
    for source_port, destination_port in ((8000, 1), (1, 8000), (1, 1)):
        ends.send(2, frame(3, source_port, destination_port))
    assert await ends.take(3) == frame(3, 1, 1)
    await unplug_all(switch)


async def test_a_lossy_wire_loses_its_share(ends: Ends) -> None:
    switch = await switch_of(ends, Wire(2, 3, loss=0.2))
    num_received = 0
    for _ in range(100):
        ends.send(2, frame(3))
        ends.send(2, frame(TO_ALL))  # lost as often; always there on its other wire
        await ends.take(4)
    switch.obey(SetWires([]))
    ends.send(2, frame(3, 5, 5))
    while await ends.take(3) != frame(3, 5, 5):
        num_received += 1
    assert 140 <= num_received <= 180
    await unplug_all(switch)


async def test_a_slow_wire_is_late_by_its_delay(ends: Ends) -> None:
    switch = await switch_of(ends, Wire(2, 3, delay_s=0.2))
    began = time.monotonic()
    ends.send(2, frame(3))
    assert await ends.take(3) == frame(3)
    assert time.monotonic() - began >= 0.2
    await unplug_all(switch)


async def test_a_node_that_is_plugged_again_gets_its_frames_at_its_new_device(ends: Ends) -> None:
    switch = await switch_of(ends)
    switch.obey(Unplug(3))
    for destination in (3, 4):
        ends.send(2, frame(destination))
    assert await ends.take(4) == frame(4)
    switch.obey(Plug(3))
    ends.send(2, frame(3, 5, 5))
    assert await ends.take(3) == frame(3, 5, 5)
    await unplug_all(switch)


def test_the_balancer_has_each_node_as_a_target() -> None:
    told = configuration(Path("/tmp/b"), ["10.77.0.3:8000", "10.77.0.4:8000"])
    assert "bind unix@/tmp/b\n" in told
    assert told.endswith("    server node0 10.77.0.3:8000\n    server node1 10.77.0.4:8000\n")


class Cluster:
    """A cluster of two nodes of each group, as faults know it; it notes what its wires are set to."""

    def __init__(self) -> None:
        groups = ["frontend"] * 2 + ["prefill"] * 2 + ["decode"] * 2
        self._nodes = [SimpleNamespace(group=group, number=number) for number, group in enumerate(groups, 3)]
        self.cluster = self
        self.set: list[tuple[Wire, ...]] = []

    def nodes(self, group: str) -> list[Any]:
        return [node for node in self._nodes if node.group == group]

    def set_wires(self, *wires: Wire) -> None:
        self.set.append(wires)

    async def kv_port(self, node: Any) -> int:
        return 5000 + int(node.number)


async def strike(name: str) -> tuple[Wire, ...]:
    """What a kind of fault sets the wires to, before it makes them all good again."""
    cluster = Cluster()
    fault = next(fault for fault in network_faults(cluster) if fault.name == name)  # type: ignore[arg-type]
    assert isinstance(fault, LinkFault)
    await msgspec.structs.replace(fault, hold_s=0.0).strike(cluster, Random(2))  # type: ignore[arg-type]
    during, after = cluster.set
    assert after == ()
    return during


def group_of(number: int) -> str:
    return ("frontend", "prefill", "decode")[(number - 3) // 2]


def test_kinds_of_faults_have_names_of_their_own() -> None:
    names = [fault.name for fault in network_faults(Cluster())]  # type: ignore[arg-type]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("cut prefill - decode 3 s", [("prefill", "decode"), ("decode", "prefill")]),
        ("cut prefill -> decode 15 s", [("prefill", "decode")]),
        ("cut frontend <- decode 60 s", [("decode", "frontend")]),
        ("cut frontend - frontend 15 s", [("frontend", "frontend"), ("frontend", "frontend")]),
    ],
)
async def test_a_cut_loses_everything_on_its_ways(name: str, ways: list[tuple[str, str]]) -> None:
    wires = await strike(name)
    assert [(group_of(wire.source), group_of(wire.destination)) for wire in wires] == ways
    assert all((wire.loss, wire.port) == (1.0, None) and wire.source != wire.destination for wire in wires)


async def test_a_closed_side_channel_is_the_port_of_the_prefill_node() -> None:
    there, back = await strike("close side channel")
    assert group_of(there.destination) == "prefill"
    assert there.port == back.port == 5000 + there.destination


async def test_a_bad_link_is_bad_both_ways() -> None:
    assert [wire.delay_s for wire in await strike("delay 200 ms frontend - decode")] == [0.2, 0.2]
    assert [wire.loss for wire in await strike("lose 5 % prefill - decode")] == [0.05, 0.05]


def test_ports_are_those_at_which_a_process_listens_itself_on_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as own, socket.create_server(("0.0.0.0", 0)):
        assert listening_ports(os.getpid(), "127.0.0.1") == [own.getsockname()[1]]


def test_each_replica_takes_a_node_of_its_group() -> None:
    model: dict[str, Any] = {"prefill": {"engine": "sim"}, "decode": {"engine": "sim"}}
    arguments = {"models": [model], "frontend": {"replicas": 1}}
    of_nodes({"applications": [{"args": arguments}]})
    for group, deployment in {**model, "frontend": arguments["frontend"]}.items():
        assert deployment["resources"] == {"num_cpus": 1, "node_labels": {"baton/group": group}}
        assert deployment["replicas"] == 2
