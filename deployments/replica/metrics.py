"""The metrics of a replica.  Ray exports them to Prometheus on every node, and puts ``ray_`` before each name."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from ray.serve.metrics import Gauge

from app.background import BackgroundTasks
from app.engines.base import Engine, EngineSpec
from app.messages import EngineStats, Link

PERIOD_S = 5.0
"""Half the period in which Ray collects the gauges of a process."""

QUEUED_TOKENS = ("baton_queued_prompt_tokens", "Prompt tokens that wait to be computed.")
SEQUENCES = ("baton_replica_sequences", "Sequences that the replica has not finished, waiting ones included.")
DECODING = ("baton_decoding_sequences", "Those of them that decode.")
OF_ENGINE = {
    "num_waiting": ("baton_waiting_sequences", "Sequences that the engine has not scheduled yet."),
    "num_blocks": ("baton_kv_blocks", "KV blocks of the engine."),
    "num_used_blocks": ("baton_kv_blocks_used", "KV blocks that sequences or handoffs hold."),
    "num_transfers": ("baton_kv_transfers_total", "KV transfers."),
    "num_failed_transfers": ("baton_kv_transfer_failures_total", "KV transfers and handshakes that failed."),
    "transferred_bytes": ("baton_kv_transferred_bytes_total", "Bytes of KV that moved."),
    "transfer_s": ("baton_kv_transfer_seconds_total", "Seconds that transfers took, added up over them."),
    "num_expired_handoffs": ("baton_expired_handoffs_total", "Handoffs whose lease ran out before decode pulled them."),
    "num_checksum_matches": (
        "baton_kv_checksum_matches_total",
        "KV transfers that decode found to be right.",
    ),
    "num_checksum_mismatches": ("baton_kv_checksum_mismatches_total", "KV that was not what prefill computed."),
    "num_checksums_skipped": ("baton_kv_checksums_skipped_total", "Chosen KV transfers that could not be compared."),
}
"""The gauges, by the field of `EngineStats`.  Those ending in ``_total`` only grow.  They are not counters of Ray, for
two reasons.  Ray's counters begin with their first event, so Prometheus does not see that event as an increase.  And a
node exports them for ever after the replica is gone."""
TRANSPORT = ("baton_kv_transport", "1 for what KV moved by last, beside what transfer.required_transport asks for.")
OF_LINK: dict[str, tuple[str, str]] = {
    "usable": ("baton_link_usable", "1 if KV may move from a prefill replica, 0 if a probe of the pair failed."),
    "bytes_per_s": ("baton_link_bytes_per_second", "Speed of the transfer of a long probe."),
    "latency_s": ("baton_link_latency_seconds", "Time of the transfer of a short probe."),
}
"""Gauges of each pair of a decode and a prefill replica."""


class WorkerMetrics:
    """Exports the metrics of one replica every `PERIOD_S`, even while it is idle."""

    def __init__(
        self,
        engine: Engine,
        count: Callable[[], tuple[int, int]],
        model: str,
        spec: EngineSpec,
        background: BackgroundTasks,
    ) -> None:
        """`count` is `Worker.num_requests`."""
        self._engine = engine
        self._count = count
        self._required_transport = spec.required_transport
        self._transport = ""

        tags_of_all = {"model": model, "role": spec.role}

        def gauge(about: tuple[str, str], *tags: str) -> Gauge:
            made = Gauge(*about, tag_keys=(*tags_of_all, *tags))
            made.set_default_tags(dict(tags_of_all))  # a copy, as Serve adds application, deployment and replica to it
            return made

        self._queued_tokens, self._sequences, self._decoding = map(gauge, (QUEUED_TOKENS, SEQUENCES, DECODING))
        self._of_engine = {field: gauge(about) for field, about in OF_ENGINE.items()}
        self._kv_transport = gauge(TRANSPORT, "transport", "required")
        self._of_link = {name: gauge(about, "prefill_replica", "transport") for name, about in OF_LINK.items()}
        self._links: dict[tuple[str, str], Link] = {}
        background.keep("worker-metrics", self._follow)

    async def _follow(self) -> None:
        while True:
            self._export(await self._engine.stats())
            await asyncio.sleep(PERIOD_S)

    def _export(self, stats: EngineStats) -> None:
        sequences, decoding = self._count()
        self._queued_tokens.set(self._engine.prompt_queue.queued_tokens)
        self._sequences.set(sequences)
        self._decoding.set(decoding)
        for field, gauge in self._of_engine.items():
            gauge.set(getattr(stats, field))
        self._export_links()
        if stats.transport != self._transport:
            self._set_transport(0)
            self._transport = stats.transport
        self._set_transport(1)

    def _set_transport(self, value: int) -> None:
        self._kv_transport.set(value, {"transport": self._transport, "required": self._required_transport})

    def set_links(self, links: Sequence[Link]) -> None:
        """Export these links, and no longer any other."""
        before, self._links = self._links, {(link.prefill_replica, link.transport): link for link in links}
        for prefill_replica, transport in before.keys() - self._links.keys():
            for gauge in self._of_link.values():  # a gauge cannot be taken back, but no rule or graph heeds NaN
                gauge.set(math.nan, {"prefill_replica": prefill_replica, "transport": transport})
        self._export_links()

    def _export_links(self) -> None:
        for link in self._links.values():
            values = {"usable": float(not link.problem), "bytes_per_s": link.bytes_per_s, "latency_s": link.latency_s}
            for name, value in values.items():
                tags = {"prefill_replica": link.prefill_replica, "transport": link.transport}
                self._of_link[name].set(math.nan if value is None else value, tags)
