"""The seam between Baton and an inference engine: token ids in, token deltas out.

An adapter knows its engine and nothing of Ray; a deployment knows this protocol and no engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

import msgspec

from app.engines.prompt_queue import PromptQueue
from app.engines.transport import TransportWatch
from app.messages import Emit, EngineStats, GenerateRequest, KvEvent, PrefixCache, Role, TransferDescriptor


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an adapter needs to start one engine."""

    role: Role
    is_disaggregated: bool
    """Whether KV crosses between a prefill and a decode pool; False for aggregated serving."""
    replica_id: str
    model_path: str
    device: Literal["cpu", "cuda"]
    tensor_parallel_size: int
    engine_args: dict[str, Any]
    kv_host: str = ""
    kv_port: int = 0
    """The port, its own on the node, at which this engine answers other engines' questions about its KV layout."""
    transfer_backends: list[str] = []
    required_transport: str = "any"
    """The transport by which KV must move, as ``transfer.required_transport`` names it."""
    transfer_lease_s: int = 30
    transfer_checksum_rate: float = 0.0
    """The part of the handoffs whose KV decode compares with what prefill computed."""
    transfer_timeout_s: float = 60.0
    """How long decode waits for KV that prefill has promised."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine once it is ready."""

    engine: str
    version: str
    num_blocks: int
    block_size_tokens: int
    max_model_len: int
    chunk_tokens: int = 2048
    """The most prompt tokens that one step computes."""
    max_sequences: int = 0
    """The most sequences that one step computes; 0 if nobody tells."""
    prefix_cache: PrefixCache = "none"
    """With ``published``, `Engine.kv_events` yields what happens to it."""


class Engine(Protocol):
    """One engine in one role.

    Cancelling `prefill` or `generate` aborts the request and gives its KV back: there is no other way to abort.
    """

    prompt_queue: PromptQueue
    transport_watch: TransportWatch

    async def start(self) -> EngineInfo:
        """Return when the engine can serve.  Raises what the engine raised; `stop` can be called afterwards."""

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        """Compute the prompt's KV and return when decode may start to fetch it, which can be before all of it is there.

        The caller owns the KV until decode has pulled it, `release` was called or the lease ran out.
        Raises InvalidRequest, EngineDead, EngineFailed or PrefillFailed.
        """

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        """Run one sequence to its end.  The prompt's KV comes through `descriptor`, or is computed here without one.

        All sequences of one engine step get their deltas, through `emit`, in the same turn of the event loop, so that
        they can travel together.  The first delta carries the report, the last one a finish_reason.  If a transfer
        fails, the KV is computed here.  An engine that cannot do this (`ModelConfig.can_decode_prefill`) raises
        PrefillFailed before the first delta.  No token is ever computed from incomplete KV.
        Raises InvalidRequest, EngineDead or EngineFailed.
        """

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        """Free a prompt's KV that nobody will fetch, at once instead of when its lease runs out.

        It is called on the prefill engine without a descriptor, and on a decode engine with the descriptor that
        `prefill` returned: some engines free their KV by themselves, others only when a decode engine tells them to.
        It has no effect if the request is unknown, was released before, or has had its KV fetched.
        """

    async def stats(self) -> EngineStats:
        """Return the present load.  It takes seconds at most, even if the engine hangs.

        Raises EngineDead, or EngineFailed if the engine does not tell.
        """

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        """Yield what happens to the prefix cache, in order, from the engine's start on.  There is one consumer.

        Where events were lost for good, the list begins with AllBlocksCleared, and only what follows is known to be
        cached.  The generator ends when the engine stops.  It yields nothing if the engine publishes no events
        (`EngineInfo`).
        """

    async def check_health(self) -> None:
        """Raise EngineDead unless the engine's processes run and make steps.  It asks nobody who may not answer."""

    async def stop(self) -> None:
        """End the engine's processes, even if they are stopped (SIGSTOP).

        It may be called twice, and after a failed start.
        """
