"""The switch that connects the nodes of a network, on whose wires frames may be lost or late.

Each node has a tap device, whose frames come here and go on to the node that they are for; between any two nodes there
is a wire each way.  (A bridge in the kernel would be quicker, but this one is often built without netem.)

python -m benchmarks.nodes.switch SOCKET      takes commands there, each a line of JSON, and answers with a line
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import subprocess
import sys
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec

NETWORK = "10.77.0."
OUTSIDE = 1
"""The number of the network's own end, which is no node's."""
MTU = 9001
"""As in AWS's networks; frames come one at a time, so few large ones cost less."""
FRAME_BYTES = MTU + 18
READS_AT_ONCE = 64
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
IPV4, TCP = b"\x08\x00", 6


class Wire(msgspec.Struct, frozen=True):
    """What frames suffer on their way from one node to another, which are named by their numbers."""

    source: int
    destination: int
    loss: float = 0.0
    """The share of the frames that get lost, without a word to either side."""
    delay_s: float = 0.0
    port: int | None = None
    """Only TCP from or to this port suffers; None for everything."""

    def concerns(self, frame: bytes) -> bool:
        return self.port is None or self.port in ports(frame)


class Plug(msgspec.Struct, frozen=True, tag=True):
    """Make a device for a node, ``cable<number>``.  The device that the node had before disappears."""

    number: int


class Unplug(msgspec.Struct, frozen=True, tag=True):
    """The node's device disappears, and nobody is told."""

    number: int


class SetWires(msgspec.Struct, frozen=True, tag=True):
    """From now on these wires are bad and all others are good.  For a frame the first one that concerns it counts."""

    wires: list[Wire]


Command = Plug | Unplug | SetWires


def ethernet(number: int) -> str:
    """Return the Ethernet address of a node."""
    return f"02:00:00:00:00:{number:02x}"


def ports(frame: bytes) -> tuple[int, ...]:
    """Return source and destination port of a TCP segment in IPv4; nothing for other frames."""
    if frame[12:14] != IPV4 or frame[23] != TCP:
        return ()
    found: tuple[int, ...] = struct.unpack_from("!HH", frame, 14 + 4 * (frame[14] & 15))
    return found


class Switch:
    """The devices of all nodes, by the nodes' numbers."""

    def __init__(self, random: Random, open_device: Callable[[int], int]) -> None:
        """`open_device` makes the device of a node and returns its file, which does not block."""
        self._random = random
        self._open_device = open_device
        self._taps: dict[int, int] = {}
        self._wires: dict[tuple[int, int], list[Wire]] = {}
        self._loop = asyncio.get_running_loop()

    def obey(self, command: Command) -> None:
        """Raises OSError if a device cannot be made."""
        if isinstance(command, SetWires):
            self._wires = {}
            for wire in command.wires:
                self._wires.setdefault((wire.source, wire.destination), []).append(wire)
            return
        self._unplug(command.number)
        if isinstance(command, Plug):
            tap = self._taps[command.number] = self._open_device(command.number)
            self._loop.add_reader(tap, self._read, command.number, tap)

    def _unplug(self, number: int) -> None:
        if (tap := self._taps.pop(number, None)) is not None:
            self._loop.remove_reader(tap)
            os.close(tap)

    def _read(self, number: int, tap: int) -> None:
        for _ in range(READS_AT_ONCE):
            try:
                frame = os.read(tap, FRAME_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the device has gone with the node
                self._unplug(number)
                return
            for destination in self._receivers(number, frame):
                self._pass(number, destination, frame)

    def _receivers(self, source: int, frame: bytes) -> list[int]:
        is_for_all = frame[0] & 1
        return [number for number in self._taps if number != source and (is_for_all or number == frame[5])]

    def _pass(self, source: int, destination: int, frame: bytes) -> None:
        wire = next((wire for wire in self._wires.get((source, destination), ()) if wire.concerns(frame)), None)
        if wire is None:
            self._write(destination, frame)
        elif self._random.random() >= wire.loss:
            self._loop.call_later(wire.delay_s, self._write, destination, frame)

    def _write(self, destination: int, frame: bytes) -> None:
        if (tap := self._taps.get(destination)) is None:
            return
        try:
            os.write(tap, frame)
        except OSError:  # the node is not up, or does not take more: its frames get lost, as on any wire
            return


def open_tap(number: int) -> int:
    """Make a node's tap device in this network, which lasts as long as the file that is returned.  Raises OSError."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", f"cable{number}".encode(), IFF_TAP | IFF_NO_PI))
    return tap


async def serve(path: Path) -> None:
    switch = Switch(Random(0), open_tap)

    async def listen(reader: StreamReader, writer: StreamWriter) -> None:
        while line := await reader.readline():
            try:
                switch.obey(msgspec.json.decode(line, type=Command))
                writer.write(b"done\n")
            except OSError as problem:
                writer.write(f"{problem}\n".encode())
        writer.close()

    switch.obey(Plug(OUTSIDE))
    cable = f"cable{OUTSIDE}"
    for command in (
        ["link", "set", cable, "address", ethernet(OUTSIDE), "mtu", str(MTU), "up"],
        ["addr", "add", f"{NETWORK}{OUTSIDE}/24", "dev", cable],
    ):
        subprocess.run(["ip", *command], check=True)  # noqa: ASYNC221  nothing else runs yet
    await asyncio.start_unix_server(listen, path)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
