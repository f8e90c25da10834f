"""The decode deployment: sequences come in, token deltas go out.

Both travel on the frontends' channels (app/channel/).  Only the reference to a transfer descriptor comes through Ray,
in `attach`, because Ray tracks references only in its own calls.  handoff_rendezvous.py brings a sequence and its
reference together.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from ray import ObjectRef

from app.channel.protocol import Submit
from app.channel.server import FrontendChannel
from app.config import BatonConfig
from app.engines.base import EngineSpec
from app.engines.kv_format import mismatch
from app.errors import InvalidRequest
from app.handoff_seal import damage, misplacement
from app.messages import (
    EngineStats,
    GenerateRequest,
    Link,
    ReplicaLoad,
    Role,
    TransferDescriptor,
)
from deployments.replica.handoff_rendezvous import DescriptorExpired, HandoffRendezvous
from deployments.replica.link_record import LinkRecord
from deployments.replica.links import LinkKeeper
from deployments.replica.prefill_peers import RayPrefillPeers
from deployments.replica.worker import Worker

logger = logging.getLogger("baton.decode")


class DecodeWorker(Worker):
    """One decode engine, or the only engine of an aggregated deployment."""

    role: Role = "decode"

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: BatonConfig, device: str, prefill: Any = None
    ) -> None:
        """`prefill` is the handle of the pool that KV comes from; None if there is none."""
        self._prefill = prefill
        self._links: LinkKeeper | None = None
        self._record: LinkRecord
        self._handoffs = HandoffRendezvous(self._release)
        await super().__init__(config, device)
        self._sequences.transport_from = self._transport_from
        self._server.on_open = lambda channel: self._handoffs.open(channel.id)
        self._server.on_close = lambda channel: self._handoffs.close(channel.id)
        if self._links is not None:
            self._record = LinkRecord(self._application, self._replica_id, self._background)
            self._links.on_change = self._publish_links
            self._publish_links(self._links.links())

    async def _connect(self, spec: EngineSpec) -> None:
        """Probe the prefill replicas.  Raises ConfigError if none can be reached by the required transport."""
        if self._prefill is not None:
            peers = RayPrefillPeers(self._prefill, self._replica_id)
            self._links = LinkKeeper(spec, self._engine, peers, self._background)
            await self._links.start(self._info, self.kv_format, can_prefill=self._model.can_decode_prefill)

    def _publish_links(self, links: list[Link]) -> None:
        self._server.publish_links(links)
        self._metrics.set_links(links)
        self._record.write(links)

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        descriptor, reason = None, call.local_reason
        if call.has_handoff:
            descriptor, reason = await self._receive(channel, call.number, call.request)
        await self._sequences.run(channel, call, descriptor, reason)

    def _transport_from(self, prefill_replica: str) -> str:
        """Return what carries KV from a prefill replica; "" if that is not known."""
        if self._links is None:
            return ""
        return next((link.transport for link in self._links.links() if link.prefill_replica == prefill_replica), "")

    async def _receive(
        self, channel: FrontendChannel, number: int, request: GenerateRequest
    ) -> tuple[TransferDescriptor | None, str]:
        """Wait for the descriptor.  Returns it, or None and the reason why decode has to prefill locally."""
        try:
            descriptor = await self._handoffs.receive(channel.id, number, self._config.limits.prefill_timeout_s)
        except TimeoutError:
            return None, "prefill_timeout"
        except DescriptorExpired:
            return None, "descriptor_expired"
        except Exception as error:
            if isinstance(error, InvalidRequest) and not self._model.can_decode_prefill:
                # Ray raises the error as a class of its own, which the channel does not know.
                raise InvalidRequest(error.message) from error
            logger.warning("request_id=%s prefill failed: %r", request.request_id, error)
            return None, "prefill_failed"
        is_descriptor = isinstance(descriptor, TransferDescriptor)  # whatever came through Ray
        if is_descriptor and (problem := mismatch(descriptor.kv_format, self.kv_format)):
            logger.warning("request_id=%s %s: %s", request.request_id, descriptor.replica_id, problem)
            await self._release(descriptor)
            return None, "incompatible_kv"
        if problem := damage(descriptor) or misplacement(descriptor, request):
            # Nobody knows any more where the KV lies that was promised; its lease frees it.
            logger.error("request_id=%s %s", request.request_id, problem)
            return None, "descriptor_corrupted"
        if self._links is None or self._links.is_usable(descriptor.replica_id):
            return descriptor, ""
        # The frontend that chose this pair does not know yet what the latest probe found.
        logger.warning("request_id=%s no KV is taken from %s", request.request_id, descriptor.replica_id)
        await self._release(descriptor)
        return None, "transport_refused"

    async def attach(self, channel_id: str, number: int, refs: list[ObjectRef], *, replica_id: str) -> None:
        """Give sequence `number` of a channel the reference to its transfer descriptor.

        `refs` is a list that holds just this reference.  Passed as an argument of its own, Ray would resolve it before
        the call runs.
        """
        self.check_is_me(replica_id)
        self._handoffs.attach(channel_id, number, refs[0])

    def levels(self, load: ReplicaLoad, stats: EngineStats) -> dict[str, float]:
        """Return the levels without sequences whose prompts other replicas still have to compute, and without their KV.

        With SGLang such sequences are among the `promised`.  So are those that its engine has no memory for, and they
        do count as waiting here, as far as this replica's own sequences take up the memory.
        """
        levels = super().levels(load, stats)
        num_promised = self._sequences.phases["promised"]
        num_own = self._sequences.phases.total() - num_promised
        held_up = min(stats.num_held_up, num_promised)
        share = num_own / (num_own + num_promised - held_up) if num_own else 0.0
        return {
            **levels,
            "waiting": levels["waiting"] + share * held_up,
            "kv_use": share * load.used_blocks / self._info.num_blocks,
        }

    async def stats(self, *, replica_id: str) -> EngineStats:
        stats = await super().stats(replica_id=replica_id)
        num_probes = self._links.num_probes if self._links else 0
        return msgspec.structs.replace(stats, num_probes=num_probes)

    async def __del__(self) -> None:
        if hasattr(self, "_record"):
            await self._background.stop("links")
            await self._record.remove()
        await super().__del__()

    async def _release(self, descriptor: TransferDescriptor) -> None:
        """Free KV that nobody will pull, except by a descriptor that may name KV of others.

        What another engine's descriptor says only that engine understands.
        """
        if problem := damage(descriptor):
            logger.error("the lease has to free KV: %s", problem)
            return
        if descriptor.engine != self._info.engine:
            logger.warning("request_id=%s the lease has to free KV of %s", descriptor.request_id, descriptor.engine)
            return
        await self._engine.release(descriptor.request_id, descriptor)


class AggregatedWorker(DecodeWorker):
    """One engine of an aggregated pool, which serves whole requests beside the prefill and decode pools."""

    role = "aggregated"
