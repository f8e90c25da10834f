"""What the deployments of all pools share: each replica has an engine, starts and stops it, and publishes its state."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from typing import Any

import msgspec
import ray
from ray import serve

from app.autoscaling.load import LoadMeter
from app.background import BackgroundTasks
from app.channel.protocol import Submit
from app.channel.server import ChannelServer, FrontendChannel
from app.config import BatonConfig, PoolConfig
from app.engines.base import Engine, EngineInfo, EngineSpec
from app.engines.kv_format import kv_format
from app.engines.pace_measurement import measure_pace
from app.engines.registry import create_engine
from app.errors import EngineDead, InvalidRequest, ReplicaLost
from app.messages import EngineStats, KvFormat, ReplicaInfo, ReplicaLoad, Role
from app.models.source import local_path
from app.pace import Pace
from app.ports import reserve_port
from app.recent_load import RecentLoad
from deployments.detached import spawn_detached
from deployments.guard import be_guarded
from deployments.process import adopt_serve_logging, freeze_heap, keep_serve_logging
from deployments.replica.metrics import WorkerMetrics
from deployments.replica.publisher import Publisher
from deployments.replica.sequences import Sequences

logger = logging.getLogger("baton.worker")

HEALTH_POLL_S = 0.2
"""How often a replica looks whether its engine lives.  Serve asks less often, and acts on the third answer only."""

MEASUREMENT_TIMEOUT_S = 120.0
"""The longest time that an engine's measurement may take, what it compiles at first use included."""


class Worker:
    """A Serve replica around an engine."""

    role: Role
    create_engine = staticmethod(create_engine)

    async def __init__(self, config: BatonConfig, device: str) -> None:  # type: ignore[misc]  # Serve awaits it
        adopt_serve_logging()
        context = serve.get_replica_context()
        self._config = config
        self._model = config.models[0]
        self._application = context.app_name
        self._replica_id = context.replica_id.unique_id
        self._node_ip = ray.util.get_node_ip_address()
        self._meter = LoadMeter()
        self._transfer_s = 0.0
        transfer = config.transfer
        self._port = reserve_port(transfer.port_min, transfer.port_max) if transfer else None
        pool = self._model.pool(self.role)
        assert pool is not None
        self._drain_s = pool.drain_s
        spec = self._spec(pool, device)
        self._background = BackgroundTasks(f"replica_id={self._replica_id}", self._leave)
        self._death: EngineDead | None = None
        self._engine: Engine = self.create_engine(pool.engine, spec)
        try:
            with keep_serve_logging():
                self._info: EngineInfo = await self._engine.start()
            self._pace = self._engine.prompt_queue.pace = await self._measure_pace(spec)
            await self._connect(spec)
        except BaseException:
            await self._background.stop()
            await self._engine.stop()
            raise
        self._recent = RecentLoad(self._pace)
        self._sequences = Sequences(self._engine, self._meter, self._recent)
        self._server = ChannelServer(self._replica_id, self._serve)
        self._publisher = Publisher(
            self._replica_id, self._engine, self._info, self._server, self._observe, self._background
        )
        self._sequences.on_change = self._server.on_backlog = self._publisher.poll_soon
        self._metrics = WorkerMetrics(self._engine, self.num_requests, self._model.name, spec, self._background)
        self._channel_address = await self._server.start(self._node_ip)
        self._background.need("engine-health", self._watch_health)
        self._background.keep("guard", be_guarded)
        freeze_heap()
        logger.info("role=%s replica_id=%s engine=%s device=%s ready", self.role, self._replica_id, self._info, device)

    def _spec(self, pool: PoolConfig, device: str) -> EngineSpec:
        model, transfer = self._model, self._config.transfer
        return EngineSpec(
            role=self.role,
            is_disaggregated=model.is_disaggregated,
            replica_id=self._replica_id,
            model_path=local_path(model.source),
            device="cuda" if device == "cuda" else "cpu",
            tensor_parallel_size=pool.tensor_parallel_size,
            engine_args=model.merged_engine_args(pool),
            kv_host=self._node_ip,
            kv_port=self._port.number if self._port else 0,
            transfer_backends=transfer.backends if transfer else [],
            required_transport=transfer.required_transport if transfer else "any",
            transfer_lease_s=transfer.lease_s if transfer else 0,
            transfer_checksum_rate=transfer.checksum_rate if transfer else 0.0,
            transfer_timeout_s=self._config.limits.prefill_timeout_s,
        )

    async def _measure_pace(self, spec: EngineSpec) -> Pace | None:
        """Return how fast the engine computes; None if it runs no whole sequences, or if something goes wrong.

        Raises EngineDead.
        """
        if not self._model.runs_whole_sequences(self.role):
            return None
        began = time.monotonic()
        try:
            async with asyncio.timeout(MEASUREMENT_TIMEOUT_S):
                pace = await measure_pace(self._engine, self._info, spec.device)
        except Exception:
            await self._engine.check_health()
            logger.warning("replica_id=%s nobody knows its pace", self._replica_id, exc_info=True)
            return None
        logger.info("replica_id=%s measured_s=%.2f %s", self._replica_id, time.monotonic() - began, pace)
        return pace

    @functools.cached_property
    def kv_format(self) -> KvFormat:
        """What this replica's KV is like."""
        return kv_format(self._model, self.role, self._info)

    async def _connect(self, spec: EngineSpec) -> None:
        """Make this replica's connections to others.  The engine runs, but nobody knows of this replica yet."""

    async def _watch_health(self) -> None:
        """Watch until the engine is dead.  Raises EngineDead then."""
        while True:
            await self._engine.check_health()
            await asyncio.sleep(HEALTH_POLL_S)

    def _leave(self, death: EngineDead) -> None:
        """Let no frontend choose this replica any more, long before Serve replaces it.

        The channels close after everything that their sequences still say, and nobody can connect again.
        """
        if self._death is None:
            self._death = death
            self._leaving = spawn_detached(self._server.stop(death=str(death)), name="leave")

    async def _serve(self, channel: FrontendChannel, call: Submit) -> None:
        self._publisher.poll_soon()
        try:
            await self._run(channel, call)
        finally:
            self._publisher.poll_soon()

    async def _run(self, channel: FrontendChannel, call: Submit) -> None:
        """Run one sequence that came on a channel, to its end.  Raises a BatonError."""
        if call.has_handoff:
            raise InvalidRequest(f"a {self.role} replica takes no KV from others")
        await self._sequences.run(channel, call, None, call.local_reason)

    def num_requests(self) -> tuple[int, int]:
        """Return how many requests have not ended, including waiting ones, and how many of them decode."""
        return self._server.num_sequences(), self._sequences.phases["decoding"]

    def _observe(self, stats: EngineStats) -> ReplicaLoad:
        """Return the present load, `stats` being the latest, and take note of it for autoscaling.

        What is told of the recent past is rounded, so that it is not sent again for each of its small changes.
        """
        queue = self._engine.prompt_queue
        sequences, decoding = self.num_requests()
        self._recent.update(
            is_prefilling=queue.queued_tokens > 0,
            decoding=decoding,
            kv_tokens=self._sequences.prompt_tokens + self._sequences.running_tokens,
            num_tokens=self._sequences.generated_tokens,
        )
        load = ReplicaLoad(
            sequences=sequences,
            queued_tokens=queue.queued_tokens,
            used_blocks=stats.num_used_blocks,
            decoding=decoding,
            queued_s=queue.queued_s,
            prefill_share=round(self._recent.prefill_share, 2),
            slowness=round(self._recent.slowness, 2),
            window_s=round(self._recent.window_s, 1),
            growth_tokens=self._recent.growth_tokens(decoding, self._sequences.running_tokens) // 4096 * 4096,
            output_tokens=round(self._recent.output_tokens),
            kv_tokens=self._sequences.prompt_tokens + self._sequences.running_tokens // 4096 * 4096,
        )
        self._transfer_s = stats.transfer_s
        self._meter.set_levels(**self.levels(load, stats))
        return load

    def levels(self, load: ReplicaLoad, stats: EngineStats) -> dict[str, float]:
        """Return the present values of those fields of `Load` (app/autoscaling/load.py) that are not counts.

        This replica's share of what waits in the frontends counts as if it waited here.
        """
        phases, backlog = self._sequences.phases, self._server.backlog()
        queued_tokens = load.queued_tokens + backlog.queued_tokens
        return {
            "queued_tokens": queued_tokens,
            "busy": float(queued_tokens > 0),
            "prefilling": phases["prefilling"],
            "waiting": phases["waiting"] + backlog.sequences,
            "decoding": phases["decoding"],
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the numbers for deployments/autoscaling.py.  Serve calls this regularly."""
        return {
            **self._meter.read(),
            "prompts": self._engine.prompt_queue.computed_prompts,
            "computed_tokens": self._engine.prompt_queue.computed_tokens,
            "transferring": self._transfer_s,
            "generated_tokens": self._sequences.generated_tokens,
        }

    def record_replica_metadata(self) -> dict[str, Any]:
        """Return what frontends need to know.  Serve calls this once, when the replica is ready, and tells them."""
        info = ReplicaInfo(
            replica_id=self._replica_id,
            role=self.role,
            model=self._model.name,
            engine=self._info.engine,
            engine_version=self._info.version,
            node_ip=self._node_ip,
            pid=os.getpid(),
            num_blocks=self._info.num_blocks,
            block_size_tokens=self._info.block_size_tokens,
            max_model_len=self._info.max_model_len,
            kv_address=f"{self._node_ip}:{self._port.number}" if self._port else "",
            prefix_cache=self._info.prefix_cache,
            max_sequences=self._info.max_sequences,
            pace=self._pace,
        )
        return {"info": msgspec.to_builtins(info), "channel": self._channel_address}

    def check_is_me(self, replica_id: str) -> None:
        """Refuse a call that was meant for another replica.  Raises ReplicaLost."""
        if replica_id != self._replica_id:
            raise ReplicaLost(replica_id, f"the call reached {self._replica_id}")

    async def stats(self, *, replica_id: str) -> EngineStats:
        self.check_is_me(replica_id)
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Raise EngineDead if the engine, or what this replica needs beside it, is dead."""
        if self._death is not None:
            raise self._death
        await self._engine.check_health()

    async def drain(self) -> None:
        """Wait until nobody needs this replica any more."""
        await self._server.drain(self._drain_s)

    async def __del__(self) -> None:
        """Drain and stop.  Serve calls this once no frontend chooses this replica any more.

        If it takes longer than graceful_shutdown_timeout_s, Serve kills the replica.  After this its guard gets no more
        signs of life, so it has to exit soon.
        """
        if hasattr(self, "_channel_address"):
            await self.drain()
            await self._background.stop()
            await self._server.stop(has_drained=True)
        if hasattr(self, "_engine"):
            await self._engine.stop()
