"""What a replica does as decode for prompts that others have computed: sequences come in, token deltas go out.

Both travel on the frontends' channels (app/channel/).  Only the reference to a transfer descriptor comes through Ray,
in `attach`, because Ray tracks references only in its own calls.  handoff_rendezvous.py brings a sequence and its
reference together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from ray import ObjectRef

from app.channel.protocol import Submit
from app.channel.server import ChannelServer, FrontendChannel
from app.config import BatonConfig
from app.engines.base import Engine, EngineInfo
from app.engines.kv_format import mismatch
from app.errors import BatonError, CannotResume, InvalidRequest
from app.handoff_seal import damage, misplacement
from app.messages import (
    EngineStats,
    GenerateRequest,
    KvFormat,
    Link,
    ReplicaLoad,
    TransferDescriptor,
)
from deployments.replica.handoff_rendezvous import DescriptorExpired, HandoffRendezvous
from deployments.replica.links import LinkKeeper
from deployments.replica.sequences import Phase

logger = logging.getLogger("baton.decode")


class DecodeHalf:
    """The part of a replica that decodes from prompts which others have computed."""

    def __init__(
        self,
        config: BatonConfig,
        engine: Engine,
        info: EngineInfo,
        kv_format: KvFormat,
        make_keeper: Callable[[], LinkKeeper] | None,
    ) -> None:
        """`make_keeper` makes what probes the prefill replicas; None if KV comes from nobody."""
        self.on_links: Callable[[list[Link]], object] = lambda links: None
        """Called with all links when they have changed."""
        self._config = config
        self._model = config.models[0]
        self._engine = engine
        self._info = info
        self.kv_format = kv_format
        self._make_keeper = make_keeper
        self._links: LinkKeeper | None = None
        self._handoffs = HandoffRendezvous(self._release)

    async def start(self) -> None:
        """Probe the prefill replicas before this one is ready.

        Raises ConfigError if none can be reached by the required transport.
        """
        if self._make_keeper is not None:
            self._links = self._make_keeper()
            await self._links.start(self._info, self.kv_format, can_prefill=self._model.can_decode_prefill)

    def begin(self) -> None:
        """Decode from now on: probe the prefill replicas, and tell of each link when its probe has ended."""
        assert self._make_keeper is not None
        self._links = self._make_keeper()
        self._links.begin(self._info, self.kv_format)
        self.tell_links()

    async def end(self) -> None:
        """Decode no new sequences.  Those that come nevertheless, as a frontend has not heard of it, are served."""
        if self._links is not None:
            await self._links.stop()
            self._links.on_change = lambda links: None
            self.on_links([])

    def tell_links(self) -> None:
        """Call `on_links` with what is known now, and from then on when it changes."""
        if self._links is not None:
            self._links.on_change = self.on_links
            self.on_links(self._links.links())

    @property
    def num_probes(self) -> int:
        return self._links.num_probes if self._links is not None else 0

    def follow(self, server: ChannelServer) -> None:
        """Learn of the channels on which sequences come."""
        server.on_open = lambda channel: self._handoffs.open(channel.id)
        server.on_close = lambda channel: self._handoffs.close(channel.id)

    async def receive(self, channel: FrontendChannel, call: Submit) -> tuple[TransferDescriptor | None, str]:
        """Wait for the descriptor of a sequence, if it has one.

        Returns it, or None and the reason why this replica has to prefill.  Raises InvalidRequest or CannotResume.
        """
        if not call.has_handoff:
            return None, call.local_reason
        return await self._receive(channel, call.number, call.request)

    def transport_from(self, prefill_replica: str) -> str:
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
            if not self._model.can_decode_prefill and (final := _final(error)) is not None:
                raise final from error
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

    def attach(self, channel_id: str, number: int, refs: list[ObjectRef]) -> None:
        """Give sequence `number` of a channel the reference to its transfer descriptor.

        `refs` is a list that holds just this reference.  Passed as an argument of its own, Ray would resolve it before
        the call runs.
        """
        self._handoffs.attach(channel_id, number, refs[0])

    def levels(self, phases: Counter[Phase], load: ReplicaLoad, stats: EngineStats) -> dict[str, float]:
        """Return what of the load is due to sequences whose prompts other replicas do not still have to compute.

        With SGLang those others are among the `promised`.  So are those that its engine has no memory for, and they
        do count as waiting here, as far as this replica's own sequences take up the memory.
        """
        num_promised = phases["promised"]
        num_own = phases.total() - num_promised
        held_up = min(stats.num_held_up, num_promised)
        share = num_own / (num_own + num_promised - held_up) if num_own else 0.0
        return {"waiting": share * held_up, "kv_use": share * load.used_blocks / self._info.num_blocks}

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


def _final(error: Exception) -> BatonError | None:
    """Return anew what prefill's engine says of the sequence itself, for which no replica is to blame; else None.

    Ray raises it as a class of its own, which the channel does not know.
    """
    if isinstance(error, InvalidRequest):
        return InvalidRequest(error.message)
    return CannotResume(error.reason) if isinstance(error, CannotResume) else None
