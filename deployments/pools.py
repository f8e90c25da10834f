"""The prefill and decode pools as a frontend calls them: the Ray half of app/orchestrator.py.

A sequence travels on the channel to its decode replica (app/channel.py), both ways.  If it has been handed to
prefill, Ray brings the *reference* to its transfer descriptor after it (``attach``).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app.channel import Channel, Sequence
from app.engines.base import Emit
from app.errors import BatonError, ReplicaLost
from app.messages import GenerateRequest
from app.orchestrator import Handoff
from app.routing.disaggregation import Placement
from deployments.membership import membership_of

logger = logging.getLogger("baton.pools")

RECONNECT_S = 0.5
"""Between attempts to reach a replica that Serve still counts as ready."""


def spawn_detached(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A task outside the current HTTP request, with which Serve would otherwise cancel the task's calls."""
    return asyncio.create_task(coroutine, name=name, context=contextvars.Context())


class RayHandoff:
    """A prefill under way: the reference to its descriptor, which this process never resolves."""

    def __init__(self, replica: str, ref: ObjectRef, abandon: Callable[[], None]) -> None:
        self.replica = replica
        self.ref = ref
        self.cancel = abandon


class RayPrefillPool:
    """The prefill replicas."""

    def __init__(self, handle: Any) -> None:
        self._prefill = handle.options(method_name="prefill", _by_reference=True)
        self._abandon = handle.options(method_name="abandon", _by_reference=True)
        self._abandoning: set[asyncio.Task[None]] = set()
        self.membership = membership_of(handle.deployment_id)

    def replicas(self) -> list[str]:
        return self.membership.ids()

    async def start(self, request: GenerateRequest, replica: str) -> RayHandoff:
        # Outside the HTTP request: with it Serve would cancel the call, and the descriptor might be lost (`abandon`).
        response = contextvars.Context().run(self._prefill.remote, request, replica_id=replica)
        abandon = partial(self._abandon_later, request.request_id, replica)
        try:
            ref = await response._to_object_ref()
        except asyncio.CancelledError:
            abandon()
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost(replica, type(error).__name__) from error
        return RayHandoff(replica, ref, abandon)

    def _abandon_later(self, request_id: str, replica: str) -> None:
        """Goes on if the request is cancelled."""
        task = spawn_detached(self._abandon_now(request_id, replica), name="abandon-prefill")
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    async def _abandon_now(self, request_id: str, replica: str) -> None:
        try:
            await self._abandon.remote(request_id, replica_id=replica)
        except (BatonError, RayError, RayServeException) as error:  # gone, and its prefills with it
            logger.info("prefill_replica=%s cannot abandon: %r", replica, error)


class RayDecodePool:
    """The decode replicas, each with a channel to it."""

    def __init__(self, handle: Any) -> None:
        self._attach = handle.options(method_name="attach", _by_reference=True)
        self._channels: dict[str, asyncio.Task[Channel]] = {}
        self._lost: set[str] = set()
        self._attaching: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.membership = membership_of(handle.deployment_id)
        self.membership.on_change = partial(self._loop.call_soon_threadsafe, self._follow_membership)

    def replicas(self) -> list[str]:
        """Those that Serve knows as ready, less those that cannot be reached: Serve takes seconds to notice."""
        return [replica for replica in self.membership.ids() if replica not in self._lost]

    async def generate(
        self, request: GenerateRequest, handoff: Handoff | None, placement: Placement, replica: str, emit: Emit
    ) -> None:
        channel = await self._channel(replica)
        sequence = channel.submit(request, emit, has_handoff=handoff is not None, local_reason=placement.reason)
        try:
            if isinstance(handoff, RayHandoff):
                task = spawn_detached(self._hand_over(handoff.ref, channel, sequence, replica), name="attach")
                self._attaching.add(task)
                task.add_done_callback(self._attaching.discard)
            await sequence.ended
        finally:
            channel.finish(sequence)
            if replica not in self.membership.ids():
                self._let_go(replica)

    async def _hand_over(self, ref: ObjectRef, channel: Channel, sequence: Sequence, replica: str) -> None:
        """Goes on if the request is cancelled: decode then has the prefilled KV released."""
        try:
            await self._attach.remote(channel.link_id, sequence.number, [ref], replica_id=replica)
        except (BatonError, RayError, RayServeException) as error:
            logger.warning("decode_replica=%s attach failed: %r", replica, error)
            sequence.fail(ReplicaLost(replica, type(error).__name__))

    async def _channel(self, replica: str) -> Channel:
        """The channel to a replica.  Raises ReplicaLost."""
        if replica in self._lost:
            raise ReplicaLost(replica)
        connecting = self._connecting(replica)
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            if connecting.cancelled():  # Serve removed the replica meanwhile; the request itself goes on
                raise ReplicaLost(replica) from None
            raise

    def _connecting(self, replica: str) -> asyncio.Task[Channel]:
        if replica not in self._channels:
            self._channels[replica] = spawn_detached(self._connect(replica), name=f"connect-{replica}")
        return self._channels[replica]

    def _follow_membership(self) -> None:
        """Connect to new replicas before the first request does, and let go of those that Serve removes."""
        for replica in self.membership.ids():
            self._connecting(replica)
        for replica in set(self._channels) - set(self.membership.ids()):
            self._let_go(replica)

    async def _connect(self, replica: str) -> Channel:
        """Connect, be it late.  Raises ReplicaLost once Serve has removed the replica."""
        while (metadata := self.membership.metadata().get(replica)) is not None:
            try:
                channel = await Channel.connect(replica, metadata["channel"])
            except ReplicaLost as error:
                logger.warning("%s", error)
                self._lost.add(replica)
                await asyncio.sleep(RECONNECT_S)
            else:
                self._lost.discard(replica)
                channel.on_close = partial(self._on_close, replica, channel)
                return channel
        raise ReplicaLost(replica)

    def _on_close(self, replica: str, channel: Channel) -> None:
        task = self._channels.get(replica)
        if task is None or not task.done() or task.result() is not channel:
            return
        self._lost.add(replica)
        self._channels[replica] = spawn_detached(self._reconnect(replica), name=f"reconnect-{replica}")

    async def _reconnect(self, replica: str) -> Channel:
        await asyncio.sleep(RECONNECT_S)
        return await self._connect(replica)

    def _let_go(self, replica: str) -> None:
        """Close the channel to a replica that Serve removes, once no sequence uses it."""
        task = self._channels.get(replica)
        if task is None:
            return
        is_connected = task.done() and not task.cancelled() and task.exception() is None
        if is_connected and not task.result().is_idle:
            return
        del self._channels[replica]
        self._lost.discard(replica)
        task.cancel()
        if is_connected:
            task.result().close()
