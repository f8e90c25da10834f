"""Which roles the replicas of a model have: the *assignment*, in Ray's internal KV.

A replica's *home* is its deployment, and its role is what it does now.  Whoever decides (``baton scale --switch``, or
autoscaling within ``gpus``) writes the assignment, which names the replicas whose role is not that of their home.  Each
replica reads it when it is told to look, and now and then, takes its role, and writes beside it which one it has
told the frontends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from app.messages import Role
from deployments.serve_hooks import delete_internal_kv, get_internal_kv, put_internal_kv

POLL_S = 0.25
"""How often a replica reads the assignment where autoscaling writes it, which tells nobody: one get of Ray's GCS, which
takes half a millisecond of it at rest and as much of the replica."""
TOLD_POLL_S = 1.0
"""The same where only ``baton scale --switch`` writes it.  That tells the replicas to look, and this is for one that it
does not reach."""

Roles = dict[str, Role]
"""The roles of replicas, by their ids."""


def _assignment_key(application: str, model: str) -> str:
    return f"baton:roles:{application}:{model}"


def _told_key(application: str, replica: str) -> str:
    return f"baton:role:{application}:{replica}"


def read_roles(application: str, model: str) -> Roles:
    """Return the assignment; it is empty if every replica has the role of its home."""
    value = get_internal_kv(_assignment_key(application, model))
    return msgspec.json.decode(value, type=Roles) if value else {}


def write_roles(application: str, model: str, roles: Mapping[str, Role]) -> None:
    """Replace the assignment."""
    put_internal_kv(_assignment_key(application, model), msgspec.json.encode(roles).decode())


def told_role(application: str, replica: str) -> Role | None:
    """Return the role that a replica has told the frontends last; None if it is that of its home."""
    value = get_internal_kv(_told_key(application, replica))
    return msgspec.json.decode(value, type=Role) if value else None


def forget_told(application: str, replica: str) -> None:
    """Remove what a replica that is gone for good has told."""
    delete_internal_kv(_told_key(application, replica))


class RoleWatch:
    """The assignment as one replica knows it."""

    def __init__(self, application: str, model: str, replica: str) -> None:
        self.on_change: dict[str, Callable[[], object]] = {}
        """Called when the assignment has changed, by who wants to know."""
        self._application = application
        self._model = model
        self._told_key = _told_key(application, replica)
        self._roles: Roles = {}
        self._thread = ThreadPoolExecutor(1)  # one, so that nothing is written after it was removed
        self._is_told = asyncio.Event()

    def role_of(self, replica: str, home: Role) -> Role:
        return self._roles.get(replica, home)

    def look(self) -> None:
        """Be told that the assignment has changed."""
        self._is_told.set()

    async def wait(self, timeout_s: float) -> None:
        """Wait until this is told to look, at most `timeout_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_told.wait()
        self._is_told.clear()

    async def read(self) -> None:
        """Read the assignment.  However long Ray's GCS takes to answer, nothing waits for it but the next change."""
        loop = asyncio.get_running_loop()
        roles = await loop.run_in_executor(self._thread, read_roles, self._application, self._model)
        if roles != self._roles:
            self._roles = roles
            for call in self.on_change.values():
                call()

    async def tell(self, role: Role) -> None:
        """Write which role, another one than the home's, the frontends have been told."""
        value = msgspec.json.encode(role).decode()
        await asyncio.get_running_loop().run_in_executor(self._thread, put_internal_kv, self._told_key, value)

    async def forget(self) -> None:
        """Remove what `tell` wrote: the replica has its home's role again, or is going."""
        await asyncio.get_running_loop().run_in_executor(self._thread, delete_internal_kv, self._told_key)
