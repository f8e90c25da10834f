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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `reserve` keeps its files."""
    return tmp_path / f"baton-ports-{os.getuid()}"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of this user to which somebody else plants links."""
    file = tmp_path / "precious"
    file.write_text("not to be lost")
    return file


def test_a_link_in_place_of_a_lock_is_not_followed(
    reserve: Reserve, three_ports: tuple[int, int], folder: Path, precious: Path
) -> None:
    first, last = three_ports
    folder.mkdir(mode=0o700)
    (folder / str(first)).symlink_to(precious)
    (folder / str(first + 1)).symlink_to(folder.parent / "made-by-following")
    assert reserve(first, last) == last
    assert precious.read_text() == "not to be lost"
    assert not (folder.parent / "made-by-following").exists()


def test_what_a_hard_link_leads_to_keeps_its_content(
    reserve: Reserve, three_ports: tuple[int, int], folder: Path, precious: Path
) -> None:
    folder.mkdir(mode=0o700)
    (folder / str(three_ports[0])).hardlink_to(precious)
    reserve(*three_ports)
    assert precious.read_text() == "not to be lost"


def test_a_link_in_place_of_the_folder_is_refused(
    reserve: Reserve, three_ports: tuple[int, int], folder: Path, tmp_path: Path
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(RuntimeError, match="is to be a folder of this user"):
        reserve(*three_ports)
    assert not list(elsewhere.iterdir())


def test_a_folder_in_which_others_can_write_is_refused(
    reserve: Reserve, three_ports: tuple[int, int], folder: Path
) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="with mode 777, and only user"):
        reserve(*three_ports)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(reserve: Reserve, three_ports: tuple[int, int], folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(RuntimeError, match="user 65534 made it"):
        reserve(*three_ports)
