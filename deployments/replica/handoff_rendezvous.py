"""Brings together a sequence, which comes on a channel, and the reference to its descriptor, which comes through Ray.

1. The sequence calls `receive`, and `attach` brings the reference, in either order.  When both have come, the sequence
   waits for the descriptor behind the reference.
2. The sequence gets the descriptor, and the engine uses it to pull the KV (or to give it back, if the sequence is
   cancelled later).
3. If the sequence ends before that (cancelled, timed out, descriptor expired, channel closed), the reference goes to
   `release`, whether it has come already or is still on its way.  The same happens if a channel closes before it has
   brought the sequence.

So each reference ends with either 2 or 3, even if Ray brings it twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from app.handoff_seal import unpack
from app.messages import TransferDescriptor
from deployments.detached import spawn_detached

logger = logging.getLogger("baton.handoff")

Reference = Awaitable[Any]
"""Gives a packed descriptor, and can be awaited more than once.  Raises what the prefill raised; a prefill that failed
holds no KV."""

REMEMBER_S = 60.0
"""How long after a channel has closed its references may still come."""


class DescriptorExpired(Exception):
    """The descriptor came too late to pull the KV safely.  The KV is released."""


class _References:
    """The references of one channel's sequences, by the sequences' numbers, which rise by one with each."""

    def __init__(self) -> None:
        self.last_received = -1
        self.is_closed = False
        self.unmet: dict[int, asyncio.Future[Reference]] = {}
        """The pairs of which only one part has come.  A future is done if the reference has come and waits for its
        sequence, and cancelled if the sequence has ended and no longer waits for its reference."""


class HandoffRendezvous:
    """The rendezvous of all channels of one decode replica."""

    def __init__(self, release: Callable[[TransferDescriptor], Awaitable[None]]) -> None:
        """`release` frees KV that nobody will pull."""
        self._release = release
        self._channels: dict[str, _References] = {}
        self._releasing: set[asyncio.Task[Any]] = set()

    def open(self, channel_id: str) -> None:
        self._channels[channel_id] = _References()

    def close(self, channel_id: str) -> None:
        """Note that the channel has closed: it brings no more sequences, and those that came have been cancelled."""
        channel = self._channels[channel_id]
        channel.is_closed = True
        for reference in channel.unmet.values():
            if reference.done() and not reference.cancelled():
                self._release_later(reference.result())
        asyncio.get_running_loop().call_later(REMEMBER_S, self._channels.pop, channel_id)

    async def receive(self, channel_id: str, number: int, timeout_s: float) -> Any:
        """Wait for the descriptor of a sequence and return it, or what came in its place.

        Raises TimeoutError, DescriptorExpired and whatever the prefill raised.
        """
        reference = self._expect(self._channels[channel_id], number)
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(timeout_s):
                descriptor = unpack(await (await reference))
            if isinstance(descriptor, TransferDescriptor) and descriptor.has_expired(clock() - began):
                raise DescriptorExpired
        except BaseException:
            if not reference.cancel() and not reference.cancelled():
                self._release_later(reference.result())
            raise
        return descriptor

    def _expect(self, channel: _References, number: int) -> asyncio.Future[Reference]:
        channel.last_received = number
        reference = channel.unmet.pop(number, None)
        if reference is None:
            reference = channel.unmet[number] = asyncio.get_running_loop().create_future()
        return reference

    def attach(self, channel_id: str, number: int, reference: Reference) -> None:
        """Bring the reference of a sequence.  Bringing it again does nothing."""
        channel = self._channels.get(channel_id)
        if channel is None:
            self._release_later(reference)
        elif number > channel.last_received:
            self._keep(channel, number, reference)
        elif (expected := channel.unmet.pop(number, None)) is None:
            return
        elif expected.cancelled():
            self._release_later(reference)
        else:
            expected.set_result(reference)

    def _keep(self, channel: _References, number: int, reference: Reference) -> None:
        """For a sequence that comes later; not if the channel has closed."""
        if number in channel.unmet:
            return
        channel.unmet[number] = asyncio.get_running_loop().create_future()
        channel.unmet[number].set_result(reference)
        if channel.is_closed:
            self._release_later(reference)

    def _release_later(self, reference: Reference) -> None:
        task = spawn_detached(self._release_when_there(reference), name="release-handoff")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _release_when_there(self, reference: Reference) -> None:
        try:
            # No deadline: Serve ends a replica that does not answer, and Ray its calls.
            descriptor = unpack(await reference)
        except Exception as error:  # noqa: BLE001  a prefill that failed or was cancelled holds no KV
            logger.info("abandoned prefill ended: %s", type(error).__name__)
            return
        await self._release(descriptor)
