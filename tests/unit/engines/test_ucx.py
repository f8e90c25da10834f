"""The transports that UCX may use, and those that its log says it uses."""

from collections.abc import Callable
from typing import get_args

import pytest

from app.config import TransferConfig
from app.engines.ucx import LANES_BY_REQUIREMENT, TLS_BY_REQUIREMENT, UcxLog
from tests.conftest import wait_until

PREFIX = "[1763683200.123456] [host:4711 :0] ucp_worker.c:1888 UCX  INFO      ucp_context_0"
SELF = f"{PREFIX} self cfg#0 tag(self/memory cma/memory)\n"
INTRA = f"{PREFIX} intra-node cfg#1 rma(cuda_ipc/cuda)  am(tcp/lo) \n"
INTER = f"{PREFIX} inter-node cfg#12 rma_am(rc_mlx5/mlx5_0:1)\n"
OTHER = f"{PREFIX} loaded plug-in\n"


@pytest.fixture
def log() -> UcxLog:
    return UcxLog()


@pytest.fixture
def write(log: UcxLog) -> Callable[..., None]:
    """Write lines as an engine's process does: into the file that the environment names."""

    def write(*lines: str) -> None:
        with open(log.environment("any")["UCX_LOG_FILE"], "w") as file:
            file.writelines(lines)

    return write


def test_every_transport_that_can_be_required_has_its_list() -> None:
    assert set(TLS_BY_REQUIREMENT) == set(get_args(TransferConfig.model_fields["required_transport"].annotation))


@pytest.mark.parametrize(
    ("line", "satisfied"),
    [(INTRA, {"any", "nvlink", "tcp"}), (INTER, {"any", "rdma"}), (SELF, set(LANES_BY_REQUIREMENT))],
)
def test_falling_back_is_noticed(log: UcxLog, write: Callable[..., None], line: str, satisfied: set[str]) -> None:
    write(line)
    if line != SELF:
        wait_until(lambda: log.transport, 5, "a transport", every_s=0.01)
    assert {name for name in LANES_BY_REQUIREMENT if not log.falls_short(name)} == satisfied


def test_no_transport_is_known_before_a_peer_is(log: UcxLog) -> None:
    assert log.transport == ""


def test_the_transport_to_a_peer_is_read_while_the_log_is_written(log: UcxLog, write: Callable[..., None]) -> None:
    write(OTHER, SELF, INTRA)
    wait_until(lambda: log.transport, 5, "a transport", every_s=0.01)
    assert log.transport == "intra-node rma(cuda_ipc/cuda) am(tcp/lo)"


def test_the_newest_peer_wins(log: UcxLog, write: Callable[..., None]) -> None:
    write(INTRA, INTER)
    wait_until(lambda: log.transport.startswith("inter-node"), 5, "the newer peer", every_s=0.01)
    assert log.transport == "inter-node rma_am(rc_mlx5/mlx5_0:1)"


def test_other_lines_change_nothing_however_many_there_are(log: UcxLog, write: Callable[..., None]) -> None:
    write(INTRA)
    wait_until(lambda: log.transport, 5, "a transport", every_s=0.01)
    write(SELF, *[OTHER] * 3000)  # more than a terminal holds, so that all but the last have been read
    assert log.transport == "intra-node rma(cuda_ipc/cuda) am(tcp/lo)"


@pytest.mark.parametrize(("required", "expected"), [("any", {}), ("tcp", {"UCX_TLS": "tcp,self"})])
def test_only_a_required_transport_restricts_ucx(log: UcxLog, required: str, expected: dict[str, str]) -> None:
    environment = log.environment(required)
    assert {name: value for name, value in environment.items() if name == "UCX_TLS"} == expected
    assert environment["UCX_LOG_LEVEL"] == "info"
