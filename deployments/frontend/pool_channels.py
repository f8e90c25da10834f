"""A frontend's channels to the replicas of one deployment, and through them the state of the pools that its router goes
by.  A replica is in the pool of its role, which may be another than its deployment's (app/routing/role_pools.py), while
its channel stands: from the moment that a connection succeeds, which begins with all that is known of its load and
cache, until the connection breaks, it says nothing for too long, or Serve removes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from app.background import watch
from app.channel.client import Channel
from app.channel.protocol import Backlog
from app.channel.silence import LOOK_S, Silence
from app.errors import EngineDead, ReplicaLost
from app.messages import ReplicaInfo, Role
from app.observers import tell
from app.routing.role_pools import RolePools
from deployments.detached import spawn_detached
from deployments.ready_replicas import ready_replicas_of
from deployments.serve_hooks import deployment_id_of

logger = logging.getLogger("baton.pool_channels")

RECONNECT_S, MAX_RECONNECT_S = 0.5, 5.0
"""The time between attempts to reach a replica that Serve still counts as ready.  It doubles from the one to the other:
what is not over soon may be another release of the protocol, which stays until the rolling update is through."""


class PoolChannels:
    """Connects to every ready replica, and connects again if a connection breaks."""

    def __init__(self, handle: Any, pools: RolePools, home: Role) -> None:
        """`home` is the role of the deployment that `handle` is for."""
        self._pools = pools
        self._pool = pools[home]
        self._channels: dict[str, Channel] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self.unreachable: dict[str, str] = {}
        """Why there is no channel to a replica that Serve counts as ready, once it was tried.  /health says this to
        everybody, so no address is in it."""
        self._retired: set[Channel] = set()
        """Those to replicas that Serve has removed.  They stand until the replicas have drained: prefill has no
        sequence that would show that its KV is still awaited."""
        self._silences: dict[Channel, Silence] = {}
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[str, str] = {}
        """Those of the ready replicas."""
        self._ready = ready_replicas_of(deployment_id_of(handle))
        self._ready.on_change = partial(self._loop.call_soon_threadsafe, self._follow_ready_replicas)
        self._follow_ready_replicas()
        self._loop.call_later(LOOK_S, self._look_for_silence)

    def channel(self, replica: str) -> Channel:
        """The channel to a replica of the pool.  Raises ReplicaLost for another."""
        channel = self._channels.get(replica)
        if channel is None:
            raise ReplicaLost(replica)
        return channel

    def __contains__(self, replica: str) -> bool:
        return replica in self._channels

    def _look_for_silence(self) -> None:
        """Close the channel to a replica that has work of this frontend, or drains, and says nothing for too long.

        Its sequences fail, so that they are tried elsewhere.  It joins the pool again when it answers a new connection.
        """
        self._loop.call_later(LOOK_S, self._look_for_silence)
        with_work = [channel for replica, channel in self._channels.items() if self._has_work(replica)]
        speaking = {channel for channel in self._channels.values() if not self._silences[channel].num_looks}
        for channel, silence in list(self._silences.items()):
            has_work = channel in self._retired or channel in with_work
            if silence.look(channel.num_heard, has_work=has_work, can_be_replaced=bool(speaking - {channel})):
                logger.warning("replica_id=%s has work and says nothing", channel.replica_id)
                channel.close("it has work and says nothing")

    def _has_work(self, replica: str) -> bool:
        state = self._pools.find(replica)
        return state is not None and state.sequences.own > 0

    def _follow_ready_replicas(self) -> None:
        ready = self._ready.metadata()
        for replica in ready.keys() - self._channels.keys() - self._connecting.keys():
            self._connect_later(replica, ready[replica], delay_s=0)
            self._pool.joining[replica] = self._connecting[replica]
        for replica in self._connecting.keys() - ready.keys():
            self._connecting.pop(replica).cancel()
            self._pool.joining.pop(replica, None)
            self.unreachable.pop(replica, None)
        for replica in self._channels.keys() - ready.keys():
            # What it has runs to its end on this channel.  If Serve brings it back it gets another one, so that the
            # state starts afresh.
            channel = self._leave(replica)
            self._retired.add(channel)
            channel.retire()
        for replica in self._nodes.keys() - ready.keys():
            tell(self._pool.on_end, replica, self._nodes[replica])
        self._nodes = {replica: metadata["info"]["node_ip"] for replica, metadata in ready.items()}

    def _connect_later(self, replica: str, metadata: dict[str, Any], delay_s: float) -> None:
        connecting = spawn_detached(self._connect(replica, metadata, delay_s), name=f"connect-{replica}")
        self._connecting[replica] = connecting

        def on_death(_: BaseException) -> None:
            if self._connecting.get(replica) is connecting:  # Serve has not removed the replica meanwhile
                self._connect_later(replica, metadata, MAX_RECONNECT_S)

        watch(connecting, on_death)

    async def _connect(self, replica: str, metadata: dict[str, Any], delay_s: float) -> None:
        """Try to connect until it succeeds.  This is cancelled once Serve has removed the replica."""
        while True:
            await asyncio.sleep(delay_s)
            try:
                info = msgspec.convert(metadata["info"], ReplicaInfo)
                channel = await Channel.connect(replica, metadata["channel"], self._pools)
                # No await from here on: the pool must know the replica before the channel tells of it.
                self._join(replica, info, metadata, channel)
                return
            except ReplicaLost as error:
                logger.warning("%s (%r)", error, error.__cause__)
                self.unreachable[replica] = error.detail
            except Exception as error:
                logger.exception("replica_id=%s cannot be connected to", replica)
                self.unreachable[replica] = type(error).__name__
            self._pool.joining.pop(replica, None)  # nobody knows how long it will take
            delay_s = min(max(2 * delay_s, RECONNECT_S), MAX_RECONNECT_S)

    def _join(self, replica: str, info: ReplicaInfo, metadata: dict[str, Any], channel: Channel) -> None:
        try:
            self._pools.join(info)
        except BaseException:
            self._pools.leave(replica)
            channel.close()
            raise
        del self._connecting[replica]
        self._pool.joining.pop(replica, None)
        self.unreachable.pop(replica, None)
        self._channels[replica] = channel
        self._silences[channel] = Silence()
        channel.on_close = partial(self._on_close, replica, metadata, channel)

    def _on_close(self, replica: str, metadata: dict[str, Any], channel: Channel) -> None:
        del self._silences[channel]
        self._retired.discard(channel)
        if self._channels.get(replica) is channel:
            self.unreachable[replica] = "its connection ended"
            self._connect_later(replica, metadata, RECONNECT_S)
            self._leave(replica)
        if channel.lost.done() and isinstance(channel.lost.result(), EngineDead):
            tell(self._pool.on_end, replica, None)

    def _leave(self, replica: str) -> Channel:
        channel = self._channels.pop(replica)
        self._pools.leave(replica)
        return channel


def share_backlog(channels: Sequence[Channel], backlog: Backlog) -> None:
    """Tell the replicas of one pool what waits in this process for it, in equal shares.  Only changed ones are sent."""
    for index, channel in enumerate(channels):
        shares = (_share(number, len(channels), index) for number in (backlog.queued_tokens, backlog.sequences))
        channel.tell_backlog(Backlog(*shares))


def _share(number: int, parts: int, index: int) -> int:
    """Return part `index` of `number`, cut into `parts` whole numbers that differ by at most one."""
    share, rest = divmod(number, parts)
    return share + (index < rest)
