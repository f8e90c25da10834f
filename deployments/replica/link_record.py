"""The links of each decode replica, where `baton status` finds them: in Ray's internal KV."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from app.background import BackgroundTasks
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

    def __init__(self, application: str, decode_replica: str, background: BackgroundTasks) -> None:
        self._key = _key(application, decode_replica)
        self._newest: Sequence[Link] = ()
        self._written: Sequence[Link] = self._newest
        self._changed = asyncio.Event()
        self._background = background
        self._thread = ThreadPoolExecutor(1)  # one, so that nothing is written after it was removed
        background.keep("record-links", self._follow)

    def write(self, links: Sequence[Link]) -> None:
        """Write `links` soon; the call to Ray's GCS is not made on the event loop."""
        self._newest = links
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            while self._written is not (newest := self._newest):
                await self._call(put_internal_kv, self._key, msgspec.json.encode(newest).decode())
                self._written = newest
            self._changed.clear()
            await self._changed.wait()

    async def remove(self) -> None:
        """Remove what was written.  Nothing may be written any more."""
        await self._background.stop("record-links")
        await self._call(delete_internal_kv, self._key)

    async def _call(self, function: Callable[..., None], *arguments: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
