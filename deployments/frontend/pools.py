"""The replicas of one model as a frontend calls them: the Ray half of app/frontend/attempt.py.

Whatever a replica's role is, it is called through the handle of its deployment.  Its state in the router is kept up to
date by the channel to it (pool_channels.py).  A sequence travels on the channel to the replica that decodes it, both
ways.  If it has been handed to prefill, Ray brings the *reference* to its transfer descriptor after it (``attach``).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from app.background import watch
from app.channel.client import Channel, SubmittedSequence
from app.channel.protocol import Backlog
from app.errors import BatonError, HandoffNotTaken, PrefillFailed, ReplicaLost, TakenElsewhere
from app.frontend.attempt import Handoff, Lost
from app.frontend.sequence_progress import SequenceProgress
from app.messages import GenerateRequest, Role
from app.routing.role_pools import RolePools
from deployments.detached import spawn_detached
from deployments.frontend.pool_channels import PoolChannels, share_backlog
from deployments.ready_replicas import ready_replicas_of
from deployments.serve_hooks import call_by_reference, deployment_id_of

logger = logging.getLogger("baton.pools")

ABANDON_TIMEOUT_S = 10.0
"""How long a replica may take to answer `abandon`, which it can at once."""
ATTACH_TIMEOUT_S, ATTACH_AGAIN_S, ATTACH_DEADLINE_S = 3.0, 0.2, 8.0
"""How long one call of `attach` may take; when it is made again if its answer was lost (then after twice as long, and
so on); how long all that may take.  Decode itself waits longer for the reference (``limits.prefill_timeout_s``)."""


class RayHandoff:
    """A prefill that has been started.  It holds the reference to the descriptor, which this process never resolves."""

    def __init__(self, replica: str, ref: ObjectRef, lost: Lost, abandon: Callable[[], None]) -> None:
        """`lost` is done when the prefill replica is gone.  Ray itself may notice that half a minute later."""
        self.replica = replica
        self.ref = ref
        self.lost = lost
        self.cancel = abandon


class RayReplicas:
    """All replicas of a model, each of which may be of any deployment and in any role."""

    def __init__(self, handles: Mapping[Role, Any], pools: RolePools) -> None:
        """`handles` are those of the deployments, by their roles."""
        self._pools = pools
        self._deployments = {home: RayDeployment(handle, pools, home) for home, handle in handles.items()}

    def unreachable(self, home: Role) -> dict[str, str]:
        """Why ready replicas of a deployment cannot be reached, by their ids."""
        return self._deployments[home].channels.unreachable

    def tell_backlog(self, role: Role, backlog: Backlog) -> None:
        """Tell the replicas of a role their shares of what waits in this process for it."""
        share_backlog([self._of(replica).channels.channel(replica) for replica in self._pools[role].replicas], backlog)

    def _of(self, replica: str) -> RayDeployment:
        """Return the deployment of a replica.  Raises ReplicaLost."""
        for deployment in self._deployments.values():
            if replica in deployment.channels:
                return deployment
        raise ReplicaLost(replica)

    async def start(self, request: GenerateRequest, replica: str) -> RayHandoff:
        return await self._of(replica).start(request, replica)

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        await self._of(replica).generate(request, handoff, local_reason, replica, progress)


class RayDeployment:
    """The replicas of one deployment."""

    def __init__(self, handle: Any, pools: RolePools, home: Role) -> None:
        self.channels = PoolChannels(handle, pools, home)
        self._ready = ready_replicas_of(deployment_id_of(handle))
        handle.options()  # with this Serve begins to tell this process which replicas are ready
        self._abandoning: set[asyncio.Task[None]] = set()
        self._attaching: set[asyncio.Task[None]] = set()

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        channel = self.channels.channel(replica)
        sequence = channel.submit(request, progress.take, has_handoff=handoff is not None, local_reason=local_reason)
        progress.let_go = partial(sequence.fail, TakenElsewhere())
        sequence.on_leaving = lambda: progress.on_leaving()
        try:
            if isinstance(handoff, RayHandoff):
                self._hand_over(handoff, channel, sequence, replica, progress)
            await sequence.ended  # as long as the limits allow (`in_time` of the orchestrator) and the channel stands
        finally:
            channel.finish(sequence)

    async def start(self, request: GenerateRequest, replica: str) -> RayHandoff:
        """The call is on its way when this returns; that it arrives is not awaited."""
        lost = self.channels.channel(replica).lost
        try:
            ref = self._call("prefill", replica, request)
        except RayError as error:
            raise ReplicaLost(replica, type(error).__name__) from error
        return RayHandoff(replica, ref, lost, partial(self._abandon_later, request.request_id, replica))

    def _call(self, method: str, replica: str, *arguments: Any) -> ObjectRef[Any]:
        """Call a method of a ready replica.  Raises ReplicaLost for another, and RayError."""
        ready = self._ready.find(replica)
        if ready is None:
            raise ReplicaLost(replica)
        return call_by_reference(ready, method, *arguments)

    def _abandon_later(self, request_id: str, replica: str) -> None:
        """Start to abandon the prefill, in a task that goes on even if the request is cancelled."""
        task = spawn_detached(self._abandon_now(request_id, replica), name="abandon-prefill")
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)
        watch(task, lambda _: None)  # the KV is freed when its lease ends

    async def _abandon_now(self, request_id: str, replica: str) -> None:
        try:
            async with asyncio.timeout(ABANDON_TIMEOUT_S):
                await self._call("abandon", replica, request_id)
        except (BatonError, RayError, TimeoutError) as error:
            # Either the replica is gone, and its prefills with it, or the KV is freed when its lease ends.
            logger.info("prefill_replica=%s cannot abandon: %r", replica, error)

    def _hand_over(
        self,
        handoff: RayHandoff,
        channel: Channel,
        sequence: SubmittedSequence,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        """Send decode the reference.  If the handoff fails before the first token, the sequence fails too.

        With the first token decode has the reference, so that it does not matter if the answer of `attach` is lost; and
        with the KV all that it needs, so that it does not matter if the prefill replica is gone.  What waits for the KV
        of a replica that is gone is better resumed: engines notice some seconds later that none comes.  `attach` goes
        on if the request is cancelled, so that decode can release the prefilled KV.
        """

        def fail(error: BatonError) -> None:
            if not progress.has_first_token:
                sequence.fail(error)

        def on_lost(_: object) -> None:
            if not progress.has_first_token or progress.waits_for_kv:
                sequence.fail(PrefillFailed("the prefill replica is gone"))

        async def attach() -> None:
            try:
                async with asyncio.timeout(ATTACH_DEADLINE_S):
                    await self._bring(handoff.ref, channel, sequence.number, replica, progress)
            except (BatonError, RayTaskError, TimeoutError) as error:
                logger.warning("decode_replica=%s attach failed: %r", replica, error)
                fail(HandoffNotTaken(replica, f"it cannot be given the handoff: {type(error).__name__}"))

        handoff.lost.add_done_callback(on_lost)
        sequence.ended.add_done_callback(lambda _: handoff.lost.remove_done_callback(on_lost))
        task = spawn_detached(attach(), name="attach")
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)
        watch(task, lambda error: fail(HandoffNotTaken(replica, type(error).__name__)))

    async def _bring(
        self, ref: ObjectRef, channel: Channel, number: int, replica: str, progress: SequenceProgress
    ) -> None:
        """Call `attach` until it is answered, the first token shows that decode has the reference, or decode is gone.

        That an answer is lost does not say whether decode got the reference, so this asks again: decode takes a
        reference once, however often it comes.  Raises what the replica answered, if no earlier call can have reached
        it.
        """
        may_have_it = False
        again_s = ATTACH_AGAIN_S
        while not (progress.has_first_token or channel.is_closed):
            try:
                async with asyncio.timeout(ATTACH_TIMEOUT_S):
                    await self._call("attach", replica, channel.channel_id, number, [ref])
                return
            except (BatonError, RayTaskError) as error:  # it was not sent, or `attach` itself raised it
                if not may_have_it:
                    raise
                lost: Exception = error
            except (RayError, TimeoutError) as error:
                may_have_it, lost = True, error
            logger.warning("decode_replica=%s the answer to attach is lost: %r", replica, lost)
            await asyncio.sleep(again_s)
            again_s *= 2
