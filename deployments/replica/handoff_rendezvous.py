"""Where a sequence, which comes on a channel, and the reference to its descriptor, which comes by Ray, find each other.

1. The sequence calls `receive`, and `attach` brings the reference, in either order; where both have come they meet, and
   the sequence waits for what is referred to.
2. The sequence gets the descriptor, and the engine pulls the KV with it (or gives it back, if it is cancelled later).
3. A sequence that ends before (cancelled, timed out, descriptor expired, channel closed) leaves the reference to
   `release`, be it here already or still on its way.  So does a channel that closes before it brought the sequence.

Each reference thus ends in exactly one of the two, also if Ray brings it twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from app.messages import TransferDescriptor
from deployments.detached import spawn_detached

logger = logging.getLogger("baton.handoff")

Reference = Awaitable[TransferDescriptor]
"""Can be awaited more than once.  Raises what the prefill raised, which then holds no KV."""

REMEMBER_S = 60.0
"""How long the references of a channel that has closed may be late."""


class DescriptorExpired(Exception):
    """The KV came too late to be pulled safely; it is released."""


class _References:
    """The references of one channel's sequences, by the sequences' numbers, which rise by one with each."""

    def __init__(self) -> None:
        self.last_received = -1
        self.is_closed = False
        self.unmet: dict[int, asyncio.Future[Reference]] = {}
        """Where one of the two has not come.  Done: the reference waits.  Cancelled: no sequence waits any more."""


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
        """No sequence comes any more on the channel; those that came have been cancelled."""
        channel = self._channels[channel_id]
        channel.is_closed = True
        for reference in channel.unmet.values():
            if reference.done() and not reference.cancelled():
                self._release_later(reference.result())
        asyncio.get_running_loop().call_later(REMEMBER_S, self._channels.pop, channel_id)

    async def receive(self, channel_id: str, number: int, timeout_s: float) -> TransferDescriptor:
        """The descriptor of a sequence, once prefill has it.

        Raises TimeoutError, DescriptorExpired and what the prefill raised.
        """
        reference = self._expect(self._channels[channel_id], number)
        try:
            async with asyncio.timeout(timeout_s):
                descriptor = await (await reference)
            if descriptor.has_expired(time.time()):
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
        """Bring the reference of a sequence; to bring it again does nothing."""
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
            descriptor = await reference
        except Exception as error:  # noqa: BLE001  a prefill that failed or was cancelled holds no KV
            logger.info("abandoned prefill ended: %s", type(error).__name__)
            return
        await self._release(descriptor)
