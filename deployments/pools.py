"""The prefill and decode pools as a frontend calls them: the Ray half of app/orchestrator.py.

A decode call is two things.  ``submit`` carries the request and the *reference* to its transfer descriptor, runs
as long as the sequence does and ends with its error, if any; cancelling it aborts the sequence.  The tokens come
on one long-lived stream for each pair of frontend and decode replica (`_Channel`), whose items carry every
sequence's new tokens at once, so that Ray's cost is per engine step and not per token.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import uuid
from collections.abc import AsyncGenerator, Coroutine
from functools import partial
from typing import Any

import msgspec
from ray import ObjectRef
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app.errors import BatonError, EngineFailed, ReplicaLost
from app.messages import GenerateRequest, TokenDelta
from app.orchestrator import Handoff
from app.routing.disaggregation import Placement
from deployments.membership import membership_of

logger = logging.getLogger("baton.pools")

DeltaBatch = list[tuple[str, TokenDelta]]
"""One item of a channel: request ids and what they got."""

_decoder = msgspec.msgpack.Decoder(DeltaBatch)


def spawn_detached(coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """A task outside the current HTTP request, with which Serve would otherwise cancel the task's calls."""
    return asyncio.create_task(coroutine, name=name, context=contextvars.Context())


class RayHandoff:
    """A prefill under way: the reference to its descriptor, which this process never resolves."""

    def __init__(self, replica: str, response: Any, ref: ObjectRef) -> None:
        self.replica = replica
        self.ref = ref
        self._response = response

    def cancel(self) -> None:
        self._response.cancel()


class RayPrefillPool:
    """The prefill replicas."""

    def __init__(self, handle: Any) -> None:
        self._prefill = handle.options(method_name="prefill", _by_reference=True)
        self.membership = membership_of(handle.deployment_id)

    def replicas(self) -> list[str]:
        return self.membership.ids()

    async def start(self, request: GenerateRequest, replica: str) -> RayHandoff:
        response = self._prefill.remote(request, replica_id=replica)
        try:
            ref = await response._to_object_ref()
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost(replica, type(error).__name__) from error
        return RayHandoff(replica, response, ref)


class RayDecodePool:
    """The decode replicas."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._submit = handle.options(method_name="submit", _by_reference=True)
        self._frontend_id = uuid.uuid4().hex
        self._channels: dict[str, _Channel] = {}
        self.membership = membership_of(handle.deployment_id)
        loop = asyncio.get_running_loop()
        self.membership.on_change = partial(loop.call_soon_threadsafe, self._close_idle_channels)

    def replicas(self) -> list[str]:
        return self.membership.ids()

    async def generate(
        self, request: GenerateRequest, handoff: Handoff | None, placement: Placement, replica: str
    ) -> AsyncGenerator[TokenDelta, None]:
        channel = self._channel(replica)
        deltas = channel.register(request.request_id)
        # Nested in a list: as an argument of its own Ray would resolve the reference before the call runs, and
        # a failed prefill would fail the call instead of making decode prefill locally.
        refs = [handoff.ref] if isinstance(handoff, RayHandoff) else []
        response = self._submit.remote(
            request, refs, placement.reason, frontend_id=self._frontend_id, replica_id=replica
        )
        outcome = asyncio.create_task(_report_failure(response, replica, deltas), name="decode-submit")
        is_finished = False
        try:
            while not is_finished:
                delta = await deltas.get()
                if isinstance(delta, BatonError):
                    is_finished = True
                    raise delta
                is_finished = delta.finish_reason is not None
                yield delta
        finally:
            channel.unregister(request.request_id)
            if not is_finished:
                response.cancel()
            outcome.cancel()
            self._close_idle_channels()

    def _channel(self, replica: str) -> _Channel:
        channel = self._channels.get(replica)
        if channel is None or channel.is_closed:
            stream = self._handle.options(method_name="deltas", stream=True, _by_reference=False)
            channel = self._channels[replica] = _Channel(stream, self._frontend_id, replica)
        return channel

    def _close_idle_channels(self) -> None:
        """Let go of replicas that Serve is removing, which wait for their streams to end."""
        ready = set(self.membership.ids())
        for replica, channel in list(self._channels.items()):
            if channel.is_closed or (replica not in ready and channel.is_idle):
                channel.close()
                del self._channels[replica]


class _Channel:
    """The stream of one decode replica's tokens to this frontend."""

    def __init__(self, stream: Any, frontend_id: str, replica: str) -> None:
        self._replica = replica
        self._queues: dict[str, asyncio.Queue[TokenDelta | BatonError]] = {}
        self.is_closed = False
        self._task = spawn_detached(self._receive(stream, frontend_id), name=f"deltas-{replica}")

    @property
    def is_idle(self) -> bool:
        return not self._queues

    def register(self, request_id: str) -> asyncio.Queue[TokenDelta | BatonError]:
        queue: asyncio.Queue[TokenDelta | BatonError] = asyncio.Queue()
        self._queues[request_id] = queue
        return queue

    def unregister(self, request_id: str) -> None:
        self._queues.pop(request_id, None)

    def close(self) -> None:
        self._task.cancel()

    async def _receive(self, stream: Any, frontend_id: str) -> None:
        response = stream.remote(frontend_id, replica_id=self._replica)
        detail = "its stream ended"
        try:
            async for item in response:
                for request_id, delta in _decoder.decode(item):
                    if queue := self._queues.get(request_id):
                        queue.put_nowait(delta)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:  # noqa: BLE001  Serve, Ray and gRPC each have their own; all mean the same here
            detail = type(error).__name__
            logger.warning("decode_replica=%s stream broke: %r", self._replica, error)
        finally:
            self.is_closed = True
            for queue in self._queues.values():
                queue.put_nowait(ReplicaLost(self._replica, detail))


async def _report_failure(response: Any, replica: str, deltas: asyncio.Queue[TokenDelta | BatonError]) -> None:
    """Put what ended a ``submit`` early into its queue; a sequence that ended well has said so itself."""
    try:
        await response
    except BatonError as error:
        deltas.put_nowait(error)
    except (RayError, RayServeException) as error:
        logger.warning("decode_replica=%s submit failed: %r", replica, error)
        deltas.put_nowait(ReplicaLost(replica, type(error).__name__))
    except Exception as error:
        logger.exception("decode_replica=%s submit failed", replica)
        deltas.put_nowait(EngineFailed(type(error).__name__))
