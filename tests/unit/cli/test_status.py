"""What `baton status` prints of the links between replicas."""

from __future__ import annotations

import io

from rich.console import Console

from app.cli.status import print_status
from deployments.application import LinkStatus, Status


def link(
    prefill_replica: str, transport: str, bytes_per_s: float | None, latency_s: float | None, problem: str
) -> LinkStatus:
    return LinkStatus(
        decode_replica="d0",
        prefill_replica=prefill_replica,
        transport=transport,
        bytes_per_s=bytes_per_s,
        latency_s=latency_s,
        probe_s=None if problem else 0.0212,
        problem=problem,
    )


def printed(*links: LinkStatus) -> list[str]:
    """The lines, with one space between two words."""
    status = Status(application="baton", status="RUNNING", message="", pools=[], links=list(links), nodes={"none": 1})
    out = io.StringIO()
    print_status([status], Console(file=out, highlight=False, width=160))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_each_pair_has_a_line_with_what_is_known_of_it() -> None:
    lines = printed(
        link("p0", "intra-node cuda_ipc/cuda (zero-copy)", 189e9, 0.00021, ""),
        link("p1", "", None, None, "the probe failed: TimeoutError"),
    )
    assert "d0 p0 intra-node cuda_ipc/cuda (zero-copy) 189 0.21 ms 21.2 ms none" in lines
    assert "d0 p1 - - - - the probe failed: TimeoutError" in lines


def test_without_links_there_is_no_table_of_them() -> None:
    assert not any("prefill" in line for line in printed())
