"""The decode deployment: sequences come in, token deltas go out.

Both travel on the frontends' channels (app/channel/).  Only the reference to a transfer descriptor comes through Ray,
in `attach`, because Ray tracks references only in its own calls.  handoff_rendezvous.py brings a sequence and its
reference together.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any, Literal

import msgspec
from ray import ObjectRef

from app.channel.protocol import Submit
from app.channel.server import FrontendChannel
from app.config import BatonConfig
from app.engines.base import EngineSpec
from app.errors import InvalidRequest
from app.messages import (
    EngineStats,
    GenerateRequest,
    Link,
    PrefillReport,
    ReplicaLoad,
    Role,
    TokenDelta,
    TransferDescriptor,
)
from deployments.replica.handoff_rendezvous import DescriptorExpired, HandoffRendezvous
from deployments.replica.link_record import LinkRecord
from deployments.replica.links import LinkKeeper
from deployments.replica.prefill_peers import RayPrefillPeers
from deployments.replica.worker import Worker

logger = logging.getLogger("baton.decode")

Phase = Literal["prefilling", "promised", "waiting", "decoding"]
"""How far a sequence is.  *prefilling*: its prompt is being computed here.  *promised*: its descriptor is here, but
another replica is still computing its prompt (SGLang).  *waiting*: its prompt was computed on another replica, and it
waits for a slot or for its KV, even if prefill sampled its first token.  *decoding*: it gets a token with each step."""


class DecodeWorker(Worker):
    """One decode engine, or the only engine of an aggregated deployment."""

    role: Role = "decode"

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: BatonConfig, device: str, prefill: Any = None
    ) -> None:
        """`prefill` is the handle of the pool that KV comes from; None if there is none."""
        self._prefill = prefill
        self._links: LinkKeeper | None = None
        self._handoffs = HandoffRendezvous(self._release)
        self._phases: Counter[Phase] = Counter()
        self._generated_tokens = 0
        await super().__init__(config, device)
        self._server.on_open = lambda channel: self._handoffs.open(channel.id)
        self._server.on_close = lambda channel: self._handoffs.close(channel.id)
        self._record = LinkRecord(self._application, self._replica_id)
        if self._links is not None:
            self._links.on_change = self._publish_links
            self._publish_links(self._links.links())

    async def _connect(self, spec: EngineSpec) -> None:
        """Probe the prefill replicas.  Raises ConfigError if none can be reached by the required transport."""
        if self._prefill is not None:
            self._links = LinkKeeper(spec, self._engine, RayPrefillPeers(self._prefill, self._replica_id))
            await self._links.start(self._info, can_prefill=self._model.can_decode_prefill)

    def _publish_links(self, links: list[Link]) -> None:
        self._server.publish_links(links)
        self._metrics.set_links(links)
        self._record.write(links)

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        self._publisher.poll_soon()
        try:
            descriptor, reason = None, call.local_reason
            if call.has_handoff:
                descriptor, reason = await self._receive(channel, call.number, call.request)
            await self._generate(channel, call, descriptor, reason)
        finally:
            self._publisher.poll_soon()

    async def _generate(
        self, channel: FrontendChannel, call: Submit, descriptor: TransferDescriptor | None, reason: str
    ) -> None:
        """Generate with the KV of `descriptor`, or without one because of `reason`."""
        phase = _first_phase(descriptor)
        began_at = time.time()
        is_first = True

        def emit(delta: TokenDelta) -> None:
            nonlocal phase, is_first
            if (report := delta.report) is not None:
                transport = self._transport_from(report.prefill_replica)
                completed = _complete(report, reason, descriptor, began_at, transport)
                delta = msgspec.structs.replace(delta, report=completed)
            if not is_first:
                self._generated_tokens += len(delta.token_ids)
            is_first = False
            if phase != "decoding" and (report is None or report.is_complete):
                if phase in ("waiting", "promised"):
                    self._meter.count(started=1)
                self._phases[phase] -= 1
                phase = "decoding"
                self._phases[phase] += 1
                self._publisher.poll_soon()
            channel.put(call.number, delta)

        self._phases[phase] += 1
        self._publisher.poll_soon()
        try:
            await self._engine.generate(call.request, descriptor, emit)
        finally:
            self._phases[phase] -= 1

    def _transport_from(self, prefill_replica: str | None) -> str:
        """Return what carries KV from a prefill replica; "" if that is not known."""
        if self._links is None or prefill_replica is None:
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

    def num_requests(self) -> tuple[int, int]:
        return self._server.num_sequences(), self._phases["decoding"]

    def levels(self, load: ReplicaLoad, stats: EngineStats) -> dict[str, float]:
        """Return the levels without sequences whose prompts other replicas still have to compute, and without their KV.

        With SGLang such sequences are among the `promised`.  So are those that its engine has no memory for, and they
        do count as waiting here, as far as this replica's own sequences take up the memory.
        """
        phases = self._phases
        num_own = phases["prefilling"] + phases["waiting"] + phases["decoding"]
        held_up = min(stats.num_held_up, phases["promised"])
        share = num_own / (num_own + phases["promised"] - held_up) if num_own else 0.0
        return {
            **super().levels(load, stats),
            "prefilling": phases["prefilling"],
            "waiting": phases["waiting"] + share * held_up,
            "decoding": phases["decoding"],
            "kv_use": share * load.used_blocks / self._info.num_blocks,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {**super().record_autoscaling_stats(), "generated_tokens": self._generated_tokens}

    async def stats(self, *, replica_id: str) -> EngineStats:
        stats = await super().stats(replica_id=replica_id)
        num_probes = self._links.num_probes if self._links else 0
        return msgspec.structs.replace(stats, num_probes=num_probes)

    async def __del__(self) -> None:
        if self._links is not None:
            await self._links.stop()
        if hasattr(self, "_record"):
            await self._record.remove()
        await super().__del__()

    async def _release(self, descriptor: TransferDescriptor) -> None:
        await self._engine.release(descriptor.request_id, descriptor)


class AggregatedWorker(DecodeWorker):
    """One engine of an aggregated pool, which serves whole requests beside the prefill and decode pools."""

    role = "aggregated"


def _first_phase(descriptor: TransferDescriptor | None) -> Phase:
    if descriptor is None:
        return "prefilling"
    return "promised" if descriptor.prefill_s is None else "waiting"


def _complete(
    report: PrefillReport, reason: str, descriptor: TransferDescriptor | None, began_at: float, transport: str
) -> PrefillReport:
    """Add to `report` what the engine cannot know.

    That is why decode prefilled, how long prefill took, the hop's phases, and what a probe found to carry KV from that
    prefill replica.  `began_at` is when the engine got the sequence, in Unix time.
    """
    changed: dict[str, Any] = {"reason": reason} if reason else {}
    if transport and report.transferred_tokens:
        changed["transport"] = transport
    if descriptor is not None and report.kind == "remote":
        of_engine = report.phases
        if report.is_complete and not of_engine and descriptor.prefill_s is None:
            of_engine = {"engine": time.time() - began_at}
        changed["phases"] = {**descriptor.phases, "delivery": began_at - descriptor.ready_at, **of_engine}
        if descriptor.prefill_s is not None:
            changed |= {"prefill_s": descriptor.prefill_s, "prefill_cached_tokens": descriptor.cached_tokens}
    return msgspec.structs.replace(report, **changed)
