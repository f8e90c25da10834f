"""The seam between Baton and an inference engine: token ids in, token deltas out.

An adapter knows its engine and nothing of Ray; a deployment knows this protocol and no engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

import msgspec

from app.engines.prompt_queue import PromptQueue
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
    """Where this engine answers other engines' questions about its KV layout (its own port on the node)."""
    transfer_backends: list[str] = []
    required_transport: str = "any"
    """What KV must move by, as ``transfer.required_transport`` names it."""
    transfer_lease_s: int = 30
    transfer_timeout_s: float = 60.0
    """How long decode waits for KV that prefill has promised."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine once it is ready."""

    engine: str
    version: str
    num_blocks: int
    block_size_tokens: int
    max_model_len: int
    prefix_cache: PrefixCache = "none"
    """``published``: by `Engine.kv_events`."""


class Engine(Protocol):
    """One engine in one role.

    Cancelling `prefill` or `generate` aborts the request and gives its KV back: there is no other way to abort.
    """

    prompt_queue: PromptQueue

    async def start(self) -> EngineInfo:
        """Return when the engine can serve.  Raises what the engine raised; `stop` is safe afterwards."""

    async def prefill(self, request: GenerateRequest) -> TransferDescriptor:
        """Compute the prompt's KV and return when decode may start to fetch it, be it before it is all there.

        The caller owns the KV until decode has pulled it, `release` was called or the lease ran out.
        Raises InvalidRequest, EngineDead, EngineFailed or PrefillFailed.
        """

    async def generate(self, request: GenerateRequest, descriptor: TransferDescriptor | None, emit: Emit) -> None:
        """Run one sequence to its end; KV comes through `descriptor` or is computed here.

        `emit` gets each delta in the same turn of the event loop as the other sequences of its engine step, so
        that what a step produced can travel together.  The first delta carries the report, the last a
        finish_reason.  A transfer that fails is recomputed here, or raises PrefillFailed before the first delta by
        an engine that cannot (`ModelConfig.can_decode_prefill`); incomplete KV is never served from.
        Raises InvalidRequest, EngineDead or EngineFailed.
        """

    async def release(self, request_id: str, descriptor: TransferDescriptor | None = None) -> None:
        """Nobody will fetch this prompt's KV: have it freed at once instead of when its lease runs out.

        Called on the prefill engine without a descriptor, and on a decode engine with the one that `prefill` returned:
        some engines free their KV by themselves, others only when a decode engine tells them.  Does no harm where the
        request is unknown, was released before, or has had its KV fetched.
        """

    async def stats(self) -> EngineStats:
        """The present load."""

    def kv_events(self) -> AsyncGenerator[list[KvEvent], None]:
        """What happens to the prefix cache, in order, from the engine's start on, for one consumer.

        Where events were lost for good the list begins with AllBlocksCleared, and what follows is all that is known
        to be there.  Ends when the engine stops; is empty if the engine publishes none (`EngineInfo`).
        """

    async def check_health(self) -> None:
        """Raise EngineDead unless the engine's processes run."""

    async def stop(self) -> None:
        """End the engine's processes; safe to call twice and after a failed start."""
