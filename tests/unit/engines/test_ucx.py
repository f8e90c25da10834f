"""By which transport KV moves to and from each peer, as UCX's log says it.

The text is what UCX printed in NIXL 1.5.1 between processes of one machine, with other transports put in where the
test is about those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest

from app.config import TransferConfig
from app.engines import ucx
from app.engines.transport import FABRIC_PROVIDERS, watch_transport
from app.engines.ucx import LANES_BY_REQUIREMENT, TLS_BY_REQUIREMENT, UcxLog
from app.messages import TransportEvidence

PREFIX = "[1795829114.426354] [vm:31622:0]   "
OTHER = f"{PREFIX}   ucp_context.c:2119 UCX  DEBUG loaded plug-in\n"
NVLINK, RDMA, TCP, CMA = "cuda_ipc/cuda", "rc_mlx5/mlx5_0:1", "tcp/lo", "cma/memory"

Write = Callable[..., None]


def endpoint(transport: str, *, new: str = "", reach: str = "intra-node") -> str:
    """An endpoint with a lane for `transport` beside that for messages; its configuration is told if it is `new`."""
    lanes = f"me {reach} {new} rma_am(tcp/lo)  amo_am(tcp/lo)  am(tcp/lo {transport})  ka(tcp/lo)"
    lines = [
        *([f"   ucp_worker.c:1997 UCX  INFO    {lanes}"] if new else []),
        "       wireup.c:1464 UCX  DEBUG   ep 0x7f2394ca0040: am_lane 0 wireup_msg_lane 0 cm_lane <none>",
        "       wireup.c:1487 UCX  DEBUG   ep 0x7f2394ca0040: lane[0]:  2:tcp/lo.0 md[1]         -> addr[2] am wireup",
        f"       wireup.c:1487 UCX  DEBUG   ep 0x7f2394ca0040: lane[1]:  5:{transport}.0 md[4]     -> addr[5] rma_bw#0",
        "       wireup.c:1490 UCX  DEBUG   ep 0x7f2394ca0040: err mode 1, flags 0x2",
    ]
    return "".join(f"{PREFIX}{line}\n" for line in lines)


def table(
    carriers: str,
    configuration: str,
    *,
    reach: str = "intra-node",
    operation: str = "remote memory read by ucp_get*(multi) into host memory from host",
    method: str = "zero-copy",
) -> str:
    lines = [
        "+-----------+-------------+-----------------------------------------+",
        f"| me {reach} {configuration}                                              |",
        f"| {operation} |",
        "+-----------+-------------+-----------------------------------------+",
        "|   Range   | Description |                 Config                  |",
        "+-----------+-------------+-----------------------------------------+",
        "|   0..1024 | short       | tcp/lo                                  |",
        f"| 1025..inf | {method}   | {carriers}                              |",
        "+-----------+-------------+-----------------------------------------+",
    ]
    return "".join(f"{PREFIX}{line}\n" for line in lines)


SELF = endpoint(CMA, new="cfg#0", reach="self") + table(TCP, "cfg#0", reach="self")
MESSAGES = table(TCP, "cfg#1", operation="active message by ucp_am_send* from host memory")


def make(required: str, operation: str | None = "get", memory: str = "host") -> tuple[UcxLog, Write]:
    """A log, and a function that writes to it as an engine's process does: into the file that the environment names."""
    log = UcxLog(required, operation, memory)  # type: ignore[arg-type]

    def write(*texts: str) -> None:
        with open(log.environment()["UCX_LOG_FILE"], "w") as file:
            file.writelines(texts)

    return log, write


async def judge(log: UcxLog, write: Write, *texts: str) -> TransportEvidence:
    """What is said of a peer while whose probe these texts were printed."""
    mark = await log.mark()
    write(*texts)
    found = await log.since(mark)
    assert found is not None
    return found


def test_every_transport_that_can_be_required_has_its_list() -> None:
    names = set(get_args(TransferConfig.model_fields["required_transport"].annotation))
    assert set(TLS_BY_REQUIREMENT) == set(LANES_BY_REQUIREMENT) == names


@pytest.mark.parametrize(
    ("carriers", "satisfied"),
    [
        (NVLINK, {"any", "nvlink"}),
        (RDMA, {"any", "rdma"}),
        ("rc_mlx5/mlx5_0:1 50% on path0 and 50% on path1", {"any", "rdma"}),
        (CMA, {"any", "shm"}),
        (TCP, {"any", "tcp"}),
        ("52% on tcp/lo and 48% on tcp/eth0", {"any", "tcp"}),
        ("50% on rc_mlx5/mlx5_0:1 and 50% on tcp/eth0", {"any"}),
        ("a name that nobody knows", {"any"}),
    ],
)
async def test_what_carries_large_sizes_has_to_be_what_is_required(carriers: str, satisfied: set[str]) -> None:
    found = set()
    for required in LANES_BY_REQUIREMENT:
        log, write = make(required)
        evidence = await judge(log, write, SELF, endpoint(NVLINK, new="cfg#1"), MESSAGES, table(carriers, "cfg#1"))
        assert carriers in evidence.transport
        found |= {required} if not evidence.problem else set()
    assert found == satisfied


async def test_a_peer_reached_by_tcp_alone_is_no_nvlink_peer_because_another_one_is() -> None:
    log, write = make("nvlink")
    first = await judge(log, write, endpoint(NVLINK, new="cfg#1"), table(NVLINK, "cfg#1"))
    second = await judge(log, write, endpoint(TCP, new="cfg#2"), table(TCP, "cfg#2", method="software emulation"))
    assert first == TransportEvidence("intra-node cuda_ipc/cuda (zero-copy)")
    assert second.problem == "KV moves by intra-node tcp/lo (software emulation)"
    assert log.transport == "intra-node tcp/lo (software emulation)"


async def test_a_lane_for_messages_does_not_make_it_rdma() -> None:
    log, write = make("rdma")
    evidence = await judge(log, write, endpoint(RDMA, new="cfg#1"), table(TCP, "cfg#1"))
    assert evidence.problem == "KV moves by intra-node tcp/lo (zero-copy)"


async def test_a_log_that_says_nothing_passes_nothing() -> None:
    log, write = make("rdma")
    assert "does not say" in (await judge(log, write)).problem
    assert "does not say" in (await judge(log, write, OTHER, SELF, endpoint(RDMA, new="cfg#1"), MESSAGES)).problem


async def test_a_log_that_cannot_be_read_passes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "READ_TIMEOUT_S", 0.05)
    monkeypatch.setattr(UcxLog, "_read", lambda log: None)
    log, _ = make("nvlink")
    assert "cannot be read" in (await judge(log, lambda: None)).problem
    for _ in range(1000):  # more than a terminal holds: nobody may be stuck in writing
        monkeypatch.setattr(ucx, "READ_TIMEOUT_S", 0.0001)
        await log.mark()
    free, _ = make("any")
    assert (await judge(free, lambda: None)) == TransportEvidence("")


async def test_a_peer_of_a_known_configuration_is_judged_by_its_tables() -> None:
    log, write = make("nvlink")
    await judge(log, write, endpoint(NVLINK, new="cfg#1"), table(NVLINK, "cfg#1"))
    await judge(log, write, endpoint(TCP, new="cfg#2"), table(TCP, "cfg#2"))
    assert not (await judge(log, write, endpoint(NVLINK))).problem
    assert (await judge(log, write, endpoint(TCP))).problem == "KV moves by intra-node tcp/lo (zero-copy)"


async def test_a_rank_of_a_known_configuration_counts_beside_one_of_a_new_one() -> None:
    """With tensor parallelism a peer has several processes, and UCX prints a table for the new kind only."""
    log, write = make("nvlink")
    await judge(log, write, endpoint(TCP, new="cfg#1"), table(TCP, "cfg#1"))
    mixed = await judge(log, write, endpoint(NVLINK, new="cfg#2"), table(NVLINK, "cfg#2"), endpoint(TCP))
    assert "tcp/lo" in mixed.problem


async def test_a_configuration_with_two_ways_does_not_say_which_one_a_peer_takes() -> None:
    """For example peers in another container, whose CUDA IPC handles cannot be opened."""
    log, write = make("nvlink")
    await judge(log, write, endpoint(NVLINK, new="cfg#1"), table(NVLINK, "cfg#1"))
    assert (await judge(log, write, endpoint(NVLINK), table(TCP, "cfg#1"))).problem.startswith("KV moves by")
    assert "by which of these" in (await judge(log, write, endpoint(NVLINK))).problem


async def test_a_peer_of_which_nothing_is_said_passes_only_if_every_way_would_do() -> None:
    log, write = make("nvlink")
    await judge(log, write, endpoint(NVLINK, new="cfg#1"), table(NVLINK, "cfg#1"))
    assert not (await judge(log, write, OTHER)).problem
    write(endpoint(TCP, new="cfg#2"), table(TCP, "cfg#2"))
    assert "by which of these" in (await judge(log, write, OTHER)).problem
    assert "does not say" in (await judge(log, write, endpoint(RDMA, new="cfg#3"))).problem


async def test_only_the_operation_and_the_memory_of_kv_count() -> None:
    texts = (
        endpoint(NVLINK, new="cfg#1"),
        table(TCP, "cfg#1", operation="remote memory write by ucp_put* from host memory to host"),
        table(TCP, "cfg#1", operation="remote memory read by ucp_get* into host memory from host"),
        table(NVLINK, "cfg#1", operation="remote memory read by ucp_get*(multi) into cuda/GPU0 from cuda/GPU1"),
        table(CMA, "cfg#1", operation="remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda/dev[1]"),
    )
    for operation, memory, expected in (("get", "cuda", NVLINK), ("put", "cuda", CMA), ("put", "host", TCP)):
        log, write = make("any", operation, memory)
        assert (await judge(log, write, *texts)).transport == f"intra-node {expected} (zero-copy)"


async def test_older_tables_have_their_title_in_one_line() -> None:
    log, write = make("rdma", "put", "cuda")
    title = "| ucp_context_0 inter-node cfg#2 | remote memory write by ucp_put*(multi) from cuda/GPU0 to cuda/dev[0] |"
    row = "|                      2049..inf | zero-copy         | rc_mlx5/mlx5_0:1 50% on path0 and 50% on path1 |"
    evidence = await judge(log, write, f"{PREFIX}{title}\n{PREFIX}{row}\n")
    assert evidence == TransportEvidence("inter-node rc_mlx5/mlx5_0:1 50% on path0 and 50% on path1 (zero-copy)")


async def test_processes_do_not_mix_their_lines() -> None:
    log, write = make("nvlink")
    mine = (endpoint(NVLINK, new="cfg#1") + table(NVLINK, "cfg#1")).splitlines(keepends=True)
    other = [
        line.replace("31622", "4711 ") for line in (endpoint(TCP, new="cfg#1") + table(TCP, "cfg#1")).splitlines(True)
    ]
    evidence = await judge(log, write, *(line for pair in zip(mine, other, strict=True) for line in pair))
    assert "cuda_ipc/cuda" in evidence.transport
    assert "KV moves by" in evidence.problem


async def test_a_side_that_moves_nothing_itself_tells_the_lanes_only() -> None:
    log, write = make("nvlink", None)
    mark = await log.mark()
    write(endpoint(NVLINK, new="cfg#1"), table(TCP, "cfg#1"))
    assert await log.since(mark) is None
    await log.mark()  # all has been read
    assert log.transport == "intra-node rma_am(tcp/lo) amo_am(tcp/lo) am(tcp/lo cuda_ipc/cuda) ka(tcp/lo)"


@pytest.mark.parametrize(("required", "expected"), [("any", {}), ("tcp", {"UCX_TLS": "tcp,self"})])
def test_only_a_required_transport_restricts_ucx(required: str, expected: dict[str, str]) -> None:
    environment = UcxLog(required, "get", "host").environment()
    assert {name: value for name, value in environment.items() if name == "UCX_TLS"} == expected
    assert environment["UCX_PROTO_INFO"] == "y"


async def test_libfabric_is_left_nothing_to_fall_back_on() -> None:
    for required, providers in FABRIC_PROVIDERS.items():
        watch = watch_transport(required, ["LIBFABRIC"], "get", "cuda")
        assert watch.environment() == {"FI_PROVIDER": providers}
        assert await watch.since(await watch.mark()) == TransportEvidence(f"libfabric ({providers})")
    assert "FI_PROVIDER" not in watch_transport("any", ["LIBFABRIC"], "get", "cuda").environment()
