"""The prefill replicas as a decode replica calls them: the Ray half of links.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from app.background import watch
from app.errors import BatonError, PrefillFailed
from app.handoff_seal import unpack
from app.messages import GenerateRequest, Role, TransferDescriptor, TransportEvidence
from deployments.detached import spawn_detached
from deployments.ready_replicas import ready_replicas_of
from deployments.roles import RoleWatch
from deployments.serve_hooks import deployment_id_of

BEAT_S = 1.0
"""How often a prefill replica is told that its turn is still in use.  It gives the turn to another decode replica soon
after this one has died (SILENT_S in prefill.py)."""


class RayPrefillPeers:
    """The ready replicas whose role is prefill, each called by its id through the handle of its deployment."""

    def __init__(self, handles: Mapping[Role, Any], decode_replica: str, roles: RoleWatch) -> None:
        """`handles` are those of the deployments whose replicas may prefill, by their roles."""
        # With `options` Serve begins to tell this process which replicas are ready.
        self._handles = {home: handle.options() for home, handle in handles.items()}
        self._decode_replica = decode_replica
        self._roles = roles
        self._ready = {home: ready_replicas_of(deployment_id_of(handle)) for home, handle in handles.items()}
        self._abandoning: set[asyncio.Task[None]] = set()
        self._keeping: dict[str, asyncio.Task[None]] = {}

    def follow(self, on_change: Callable[[], object]) -> None:
        for ready in self._ready.values():
            ready.on_change = partial(asyncio.get_running_loop().call_soon_threadsafe, on_change)
        self._roles.on_change["peers"] = on_change

    def ready(self) -> Set[str]:
        role_of, own = self._roles.role_of, self._decode_replica
        return {
            replica
            for home, ready in self._ready.items()
            for replica in ready.ids()
            if role_of(replica, home) == "prefill" and replica != own
        }

    async def begin_probe(self, replica: str) -> None:
        await self._call("begin_probe", replica, self._decode_replica)
        self._keeping[replica] = keeping = spawn_detached(self._keep(replica), name=f"keep-probe-{replica}")
        watch(keeping, lambda _: None)  # the turn may be over then, and the probe tells

    async def _keep(self, replica: str) -> None:
        """Say that the turn is in use, until it has ended."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self._call("keep_probe", replica, self._decode_replica)
            except BatonError:  # the replica is gone, and its turns with it
                return

    async def prefill(self, request: GenerateRequest, replica: str) -> TransferDescriptor:
        descriptor: TransferDescriptor = unpack(await self._call("prefill", replica, request))
        return descriptor

    def abandon(self, request_id: str, replica: str) -> None:
        task = spawn_detached(self._abandon(request_id, replica), name="abandon-probe")
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    async def _abandon(self, request_id: str, replica: str) -> None:
        try:
            await self._call("abandon", replica, request_id)
        except BatonError:  # the replica is gone, and its prefills with it
            return

    def _end_keeping(self, replica: str) -> None:
        if (keeping := self._keeping.pop(replica, None)) is not None:
            keeping.cancel()

    def withdraw(self, replica: str) -> None:
        self._end_keeping(replica)
        task = spawn_detached(self._withdraw(replica), name="withdraw-probe")
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    async def _withdraw(self, replica: str) -> None:
        try:
            await self.end_probe(replica)
        except BatonError:  # the replica is gone, and its turns with it
            return

    async def end_probe(self, replica: str) -> TransportEvidence | None:
        self._end_keeping(replica)
        evidence: TransportEvidence | None = await self._call("end_probe", replica, self._decode_replica)
        return evidence

    async def _call(self, method: str, replica: str, *arguments: Any) -> Any:
        """Raises what the method raised if it is a BatonError, and PrefillFailed for anything else.

        There is no deadline: callers who wait for the result have theirs, and Serve ends a replica that does not
        answer, and with it the calls that nobody waits for.
        """
        homes = (home for home, ready in self._ready.items() if ready.find(replica) is not None)
        if (home := next(homes, None)) is None:
            raise PrefillFailed(f"{method}: the replica is gone")
        try:
            return await getattr(self._handles[home], method).remote(*arguments, replica_id=replica)
        except RayTaskError as error:  # its text is the traceback over there
            if isinstance(error.cause, BatonError):
                raise error.cause from error
            raise PrefillFailed(f"{method}: {error.cause!r}") from error
        except (RayError, RayServeException) as error:
            raise PrefillFailed(f"{method}: {type(error).__name__}") from error
