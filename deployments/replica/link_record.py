"""The links of each decode replica, where `baton status` finds them: in Ray's internal KV."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from app.messages import Link
from deployments.serve_hooks import delete_internal_kv, get_internal_kv, put_internal_kv


def _key(application: str, decode_replica: str) -> str:
    return f"baton:links:{application}:{decode_replica}"


def read_links(application: str, decode_replica: str) -> list[Link]:
    """Return the links of a decode replica; none if it has published none."""
    value = get_internal_kv(_key(application, decode_replica))
    return msgspec.json.decode(value, type=list[Link]) if value else []


class LinkRecord:
    """Writes the links of one decode replica."""

    def __init__(self, application: str, decode_replica: str) -> None:
        self._key = _key(application, decode_replica)
        self._newest: Sequence[Link] = ()
        self._task: asyncio.Task[None] | None = None

    def write(self, links: Sequence[Link]) -> None:
        """Write `links` soon; the call to Ray's GCS is not made on the event loop."""
        self._newest = links
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write(), name="record-links")

    async def _write(self) -> None:
        written = None
        while written is not self._newest:
            written = self._newest
            await asyncio.to_thread(put_internal_kv, self._key, msgspec.json.encode(written).decode())

    async def remove(self) -> None:
        """Remove what was written.  Nothing may be written any more."""
        if self._task is not None:
            await asyncio.wait([self._task])
            await asyncio.to_thread(delete_internal_kv, self._key)
