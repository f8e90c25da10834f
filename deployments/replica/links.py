"""The links of a decode replica: whether KV gets to it from each prefill replica, by what and how fast.

1. When a prefill replica appears, it is *probed*: three small prompts are prefilled there and decoded here, as requests
   are.  The first makes the connection (NIXL's handshake, UCX's wire-up, CUDA IPC's mappings), the second measures the
   latency and the third, a longer one, the speed.
2. What the transfer library says meanwhile is about this pair, because probes take turns on either side.  From it the
   engine judges whether KV takes the way that ``transfer.required_transport`` asks for.
3. The result is a `Link`.  Frontends get all links, and route no request over one that has a problem or is not there.
4. A pair whose KV does not fit together (app/engines/kv_format.py) has a problem too: the first descriptor tells.
5. A link that failed is probed again, each time after a longer pause.  If a prefill replica goes, so does its link.

When a decode replica starts, it waits a while for the first prefill replica, and probes those that are there.  If
none of them can be reached by the required transport, the replica does not become ready.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Set
from typing import Protocol

import msgspec

from app.background import BackgroundTasks
from app.engines.base import Engine, EngineInfo, EngineSpec
from app.engines.kv_format import mismatch
from app.engines.probe_request import probe_request
from app.errors import BatonError, ConfigError, EngineDead, PrefillFailed
from app.messages import (
    EngineStats,
    GenerateRequest,
    KvFormat,
    Link,
    PrefillReport,
    TokenDelta,
    TransferDescriptor,
    TransportEvidence,
)

logger = logging.getLogger("baton.links")

SHORT_TOKENS = 32
LONG_TOKENS = 2048
WAIT_FOR_PREFILL_S = 60.0
"""How long a decode replica that starts waits for the first prefill replica: most start at the same time."""
WAIT_IF_NEEDED_S = 600.0
"""The same for an engine that serves nothing without prefill, and so loses nothing by waiting."""
FIRST_RETRY_S = 2.0
LONGEST_RETRY_S = 120.0
"""The pauses before a link that failed is probed again: each is twice the last one, up to this."""
TURN_WAIT_S = 150.0
"""How long a turn may be awaited.  A prefill replica that works gives up a little earlier."""
STATS_TIMEOUT_S = 2.0
"""How long after a sequence's end its transfer may be missing from the engine's stats."""
STATS_POLL_S = 0.02
ADVICE = (
    "set it to a transport that is there, or to `any`, or make the required one work (devices in the pods, drivers, "
    "UCX_* variables): see Troubleshooting in docs/operations.md"
)


class PrefillPeers(Protocol):
    """The prefill replicas, as a decode replica calls them."""

    def follow(self, on_change: Callable[[], object]) -> None:
        """Call `on_change`, on the event loop, whenever `ready` has changed."""

    def ready(self) -> Set[str]:
        """Return the replicas that are ready."""

    async def begin_probe(self, replica: str) -> None:
        """Wait until no other decode replica probes `replica`.  Raises PrefillFailed if that takes too long."""

    def withdraw(self, replica: str) -> None:
        """Give up a turn that has begun or is awaited; returns at once."""

    async def prefill(self, request: GenerateRequest, replica: str) -> TransferDescriptor:
        """Prefill a probe.  Raises a BatonError."""

    def abandon(self, request_id: str, replica: str) -> None:
        """Have `replica` free the KV of a probe that nobody will fetch; returns at once."""

    async def end_probe(self, replica: str) -> TransportEvidence | None:
        """Return what `replica` says about the way of the KV that moved since `begin_probe`, if it can tell."""


class _Known(msgspec.Struct, frozen=True):
    """What is known of one prefill replica."""

    link: Link
    falls_short: bool
    """Whether the probe's KV came, but not by the required transport."""
    num_failures: int
    """Probes that failed since the last one that did not."""
    retry_at: float


class LinkKeeper:
    """Probes the prefill replicas, and keeps what it found."""

    def __init__(self, spec: EngineSpec, engine: Engine, peers: PrefillPeers, background: BackgroundTasks) -> None:
        self.on_change: Callable[[list[Link]], object] = lambda links: None
        self.num_probes = 0
        """How often KV of a probe has arrived."""
        self._spec = spec
        self._engine = engine
        self._peers = peers
        self._known: dict[str, _Known] = {}
        self._usable_until: dict[str, float] = {}
        """Replicas that have gone and whose links were usable; monotonic times."""
        self._long_tokens = SHORT_TOKENS
        self._kv_format: KvFormat
        self._changed = asyncio.Event()
        self._background = background

    def links(self) -> list[Link]:
        return [known.link for known in self._known.values()]

    def is_usable(self, prefill_replica: str) -> bool:
        """Whether KV may be taken from there.

        It may for a while from a replica that has gone: it drains until decode has taken what it computed.
        """
        known = self._known.get(prefill_replica)
        if known is None:
            return self._usable_until.get(prefill_replica, 0.0) > time.monotonic()
        return not known.link.problem

    async def start(self, info: EngineInfo, kv_format: KvFormat, *, can_prefill: bool) -> None:
        """Probe the prefill replicas that are there or come soon, and begin to follow the pool.

        `info` is that of this replica's engine, `kv_format` says what KV it can use, and `can_prefill` whether it can
        serve without them.  Raises ConfigError if KV comes by the required transport from no prefill replica, but by
        another from each.
        """
        self._prepare(info, kv_format)
        await self._wait_for_change(WAIT_FOR_PREFILL_S if can_prefill else WAIT_IF_NEEDED_S)
        await self._probe_due()
        if self._known and all(known.falls_short for known in self._known.values()):
            found = "; ".join(f"from prefill replica {link.prefill_replica}: {link.problem}" for link in self.links())
            raise ConfigError(
                "transfer.required_transport",
                f"{self._spec.required_transport} is required, but decode replica {self._spec.replica_id} gets no KV "
                f"by it ({found}): {ADVICE}",
            )
        if not self._known:
            logger.warning("no prefill replica is ready yet; each is probed when it comes")
        self._background.keep("links", self._follow)

    def begin(self, info: EngineInfo, kv_format: KvFormat) -> None:
        """Begin to probe and to follow the pool, in a replica that serves already."""
        self._prepare(info, kv_format)
        self._background.keep("links", self._follow)

    async def stop(self) -> None:
        """Probe no more.  What is known stays, for the handoffs that are on their way."""
        await self._background.stop("links")

    def _prepare(self, info: EngineInfo, kv_format: KvFormat) -> None:
        self._kv_format = kv_format
        longest = min(info.max_model_len // 2, info.num_blocks * info.block_size_tokens // 4)
        self._long_tokens = max(SHORT_TOKENS, min(LONG_TOKENS, longest))
        self._peers.follow(self._changed.set)

    async def _wait_for_change(self, timeout_s: float | None) -> None:
        """Wait until there are other prefill replicas than those that are known, at most `timeout_s` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._peers.ready() == self._known.keys():
                    self._changed.clear()  # Serve also tells of a pool that is still empty
                    await self._changed.wait()
        except TimeoutError:
            return

    async def _follow(self) -> None:
        while True:
            await self._probe_due()
            retries = [known.retry_at for known in self._known.values() if known.link.problem]
            await self._wait_for_change(max(0.0, min(retries) - time.monotonic()) if retries else None)

    async def _probe_due(self) -> None:
        """Forget the replicas that have gone, and probe those that are new or failed a while ago, one by one."""
        for gone in self._known.keys() - self._peers.ready():
            if not self._known.pop(gone).link.problem:
                self._usable_until[gone] = (
                    time.monotonic() + self._spec.transfer_timeout_s + self._spec.transfer_lease_s
                )
            self.on_change(self.links())
        now = time.monotonic()
        self._usable_until = {replica: until for replica, until in self._usable_until.items() if until > now}
        for replica in sorted(self._peers.ready()):
            known = self._known.get(replica)
            if known is None or (known.link.problem and known.retry_at <= time.monotonic()):
                self._known[replica] = await self._probe(replica, known.num_failures if known else 0)
                self.on_change(self.links())

    async def _probe(self, replica: str, num_failures: int) -> _Known:
        began, falls_short = time.monotonic(), False
        try:
            link = await self._probe_link(replica)
            falls_short = bool(link.problem)
        except EngineDead:
            await self._engine.check_health()  # raises if it is this replica's own
            link = Link(replica, problem="the probe failed: its engine is dead")
        except (BatonError, TimeoutError) as error:
            link = Link(replica, problem=f"the probe failed: {str(error) or type(error).__name__}")
        except Exception as error:
            logger.exception("a probe of %s failed", replica)  # the others must be probed nevertheless
            link = Link(replica, problem=f"the probe failed: {error!r}")
        logger.log(
            logging.WARNING if link.problem else logging.INFO,
            "link decode_replica=%s probed_s=%.2f %s",
            self._spec.replica_id,
            time.monotonic() - began,
            link,
        )
        pause_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(num_failures, 16))
        return _Known(link, falls_short, num_failures + 1 if link.problem else 0, time.monotonic() + pause_s)

    async def _probe_link(self, replica: str) -> Link:
        """Probe one pair.  Raises a BatonError or TimeoutError if no KV came."""
        watch = self._engine.transport_watch
        try:
            async with asyncio.timeout(TURN_WAIT_S):
                await self._peers.begin_probe(replica)
            async with asyncio.timeout(self._spec.transfer_timeout_s):
                mark = await watch.mark()
                await self._move(replica, SHORT_TOKENS)
                short, probe_s = await self._move(replica, SHORT_TOKENS)
                long, _ = await self._move(replica, self._long_tokens)
                told_there = await self._peers.end_probe(replica)
        except BaseException:
            self._peers.withdraw(replica)
            raise
        evidence = await watch.since(mark) or told_there
        if evidence is None:
            is_free = self._spec.required_transport == "any"
            evidence = TransportEvidence("", "" if is_free else "no engine tells how KV moves")
        return Link(
            replica,
            evidence.transport,
            bytes_per_s=long.transferred_bytes / long.transfer_s if long.transfer_s else None,
            latency_s=short.transfer_s / short.num_transfers if short.transfer_s else None,
            probe_s=probe_s,
            problem=evidence.problem,
        )

    async def _move(self, replica: str, num_tokens: int) -> tuple[EngineStats, float]:
        """Have a prompt prefilled on `replica`, and take its KV.

        Returns by how much the engine's counts of transfers grew, and the seconds that it took.
        """
        request = probe_request("probe", num_tokens, max_tokens=2)  # one would need no KV
        reports: list[PrefillReport] = []

        def take(delta: TokenDelta) -> None:
            if delta.report is not None:
                reports.append(delta.report)

        before, began = await self._engine.stats(), time.monotonic()
        try:
            descriptor = await self._peers.prefill(request, replica)
            if problem := mismatch(descriptor.kv_format, self._kv_format):
                raise PrefillFailed(problem)
            await self._engine.generate(request, descriptor, take)
        except BaseException:
            self._peers.abandon(request.request_id, replica)
            raise
        took_s = time.monotonic() - began
        if reports[-1].kind != "remote" or not reports[-1].is_complete:
            raise PrefillFailed(f"no KV came ({reports[-1].reason})")
        self.num_probes += 1
        return await self._counted_since(before), took_s

    async def _counted_since(self, before: EngineStats) -> EngineStats:
        """Return what the engine has counted of a transfer that has ended.  It may count it some steps later."""
        give_up_at = time.monotonic() + STATS_TIMEOUT_S
        while (now := await self._engine.stats()).num_transfers == before.num_transfers:
            if time.monotonic() > give_up_at:
                break
            await asyncio.sleep(STATS_POLL_S)
        return EngineStats(
            num_transfers=now.num_transfers - before.num_transfers,
            transferred_bytes=now.transferred_bytes - before.transferred_bytes,
            transfer_s=now.transfer_s - before.transfer_s,
        )
