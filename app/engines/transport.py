"""By which transport KV moves, and whether that is the required one.

Nobody asks NIXL, which does not say.  With the UCX backend the answer comes from UCX's log (app/engines/ucx.py).  With
LIBFABRIC it is so by construction: the process sees only providers that satisfy the requirement, so an engine that
starts has nothing to fall back on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from app.engines.ucx import UcxLog
from app.messages import TransportEvidence

Operation = Literal["get", "put"]
"""How the engine that starts a transfer moves KV: it reads from its peer, or writes to it."""

FABRIC_PROVIDERS = {"rdma": "cxi,efa", "tcp": "tcp"}
"""``FI_PROVIDER`` for each transport that can be required of LIBFABRIC.  NIXL's plug-in takes the first of cxi, efa,
tcp and sockets that libfabric offers, so these are all of its RDMA providers."""


class TransportWatch(Protocol):
    """What an engine's transfer library says about the way that KV takes."""

    @property
    def transport(self) -> str:
        """The way to the latest peer, for people; "" if none is known."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables that an engine's processes must start with."""

    async def mark(self) -> int:
        """Return a position after everything that has been said so far."""

    async def since(self, mark: int) -> TransportEvidence | None:
        """Judge by what was said since `mark`, while KV moved between this engine and one peer, and no other was new.

        Returns None if this engine takes no part in the choice, so that the peer's engine is the one to ask.
        """


class NamedTransport:
    """A transport that is known without watching."""

    def __init__(self, transport: str, environment: dict[str, str] | None = None) -> None:
        self.transport = transport
        self._environment = environment or {}

    def environment(self) -> dict[str, str]:
        return self._environment

    async def mark(self) -> int:
        return 0

    async def since(self, mark: int) -> TransportEvidence | None:
        return TransportEvidence(self.transport)


def watch_transport(
    required_transport: str, backends: Sequence[str], operation: Operation | None, device: Literal["cpu", "cuda"]
) -> TransportWatch:
    """Return the watch for an engine with these NIXL `backends`.

    `operation` is None if this engine's peers start the transfers.
    """
    if required_transport != "any" and list(backends) == ["LIBFABRIC"]:
        providers = FABRIC_PROVIDERS[required_transport]
        return NamedTransport(f"libfabric ({providers})", {"FI_PROVIDER": providers})
    return UcxLog(required_transport, operation, "cuda" if device == "cuda" else "host")
