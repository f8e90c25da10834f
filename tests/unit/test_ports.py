"""Ports that replicas on one node reserve: never the same one twice, none that is in use, none that is lost."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.ports import ReservedPort, reserve_port
from tests.conftest import REPOSITORY

RESERVE = """
import sys
from app.ports import reserve_port
port = reserve_port(int(sys.argv[1]), int(sys.argv[2]))
print(port.number, flush=True)
sys.stdin.read()
"""

Reserve = Callable[[int, int], int]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0 and _can_bind(probe, port)


def _can_bind(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind(("", port))
    except OSError:
        return False
    return True


@pytest.fixture
def three_ports() -> tuple[int, int]:
    """The first and the last of three neighbouring ports that nobody uses, below those that the kernel hands out."""
    first = next(port for port in range(15000, 19000, 3) if all(map(is_free, range(port, port + 3))))
    return first, first + 2


@pytest.fixture
def reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reserve]:
    """`reserve_port` apart from the real reservations on this machine; holds on to each until the test ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held: list[ReservedPort] = []

    def reserve(port_min: int, port_max: int) -> int:
        held.append(reserve_port(port_min, port_max))
        return held[-1].number

    yield reserve
    for port in held:
        port.close()


def test_reservations_in_one_process_never_coincide(reserve: Reserve, three_ports: tuple[int, int]) -> None:
    first, last = three_ports
    assert [reserve(first, last) for _ in range(3)] == [first, first + 1, last]


def test_a_port_that_somebody_else_listens_on_is_skipped(reserve: Reserve, three_ports: tuple[int, int]) -> None:
    first, last = three_ports
    with closing(socket.create_server(("127.0.0.1", first))):
        assert reserve(first, last) == first + 1


def test_an_exhausted_range_is_an_error_that_names_the_setting(reserve: Reserve, three_ports: tuple[int, int]) -> None:
    first, _ = three_ports
    reserve(first, first)
    with pytest.raises(ConfigError, match=f"no free port from {first} to {first}") as caught:
        reserve(first, first)
    assert caught.value.field == "transfer.port_max"


def test_a_port_of_another_process_is_taken_until_that_process_is_killed(
    reserve: Reserve, three_ports: tuple[int, int], tmp_path: Path
) -> None:
    first, last = three_ports
    with subprocess.Popen(
        [sys.executable, "-c", RESERVE, str(first), str(last)],
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) == first
        assert reserve(first, last) == first + 1
        other.kill()
    assert reserve(first, last) == first
