"""A replica of any pool: it has an engine, starts and stops it, and publishes its state.

A replica's *home* is its deployment, and its *role* what it does now (deployments/roles.py).  It has a half for each:
prefill.py computes prompts for others, decode.py decodes from them.  Both can be called whatever its role is, since a
frontend may not have heard yet that it has changed.  Only while it decodes it keeps links to prefill replicas.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from typing import Any

import msgspec
import ray
from ray import ObjectRef, serve
from ray.serve.handle import DeploymentHandle

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
from app.messages import (
    EngineStats,
    GenerateRequest,
    KvFormat,
    Link,
    ReplicaInfo,
    ReplicaLoad,
    Role,
    TransportEvidence,
)
from app.models.source import local_path
from app.pace import Pace
from app.ports import reserve_port
from app.recent_load import RecentLoad
from deployments.detached import spawn_detached
from deployments.guard import be_guarded
from deployments.process import adopt_serve_logging, freeze_heap, keep_serve_logging, without_collections
from deployments.replica.decode import DecodeHalf
from deployments.replica.link_record import LinkRecord
from deployments.replica.links import LinkKeeper
from deployments.replica.metrics import WorkerMetrics
from deployments.replica.prefill import PrefillHalf
from deployments.replica.prefill_peers import RayPrefillPeers
from deployments.replica.publisher import Publisher
from deployments.replica.sequences import Sequences
from deployments.roles import POLL_S, TOLD_POLL_S, RoleWatch

logger = logging.getLogger("baton.worker")

HEALTH_POLL_S = 0.2
"""How often a replica looks whether its engine lives.  Serve asks less often, and acts on the third answer only."""

MEASUREMENT_TIMEOUT_S = 120.0
"""The longest time that an engine's measurement may take, what it compiles at first use included."""


class Worker:
    """A Serve replica around an engine."""

    home: Role
    role: Role
    create_engine = staticmethod(create_engine)

    async def __init__(self, config: BatonConfig, device: str) -> None:  # type: ignore[misc]  # Serve awaits it
        adopt_serve_logging()
        context = serve.get_replica_context()
        self._config = config
        self._model = config.models[0]
        self._application = context.app_name
        self._replica_id = context.replica_id.unique_id
        self.role = self._recorded_role = self.home
        self._node_ip = ray.util.get_node_ip_address()
        self._meter = LoadMeter()
        self._transfer_s = 0.0
        transfer = config.transfer
        self._port = reserve_port(transfer.port_min, transfer.port_max) if transfer else None
        pool = self._model.pool(self.home)
        assert pool is not None
        self._drain_s = pool.drain_s
        spec = self._spec(pool, device)
        self._background = BackgroundTasks(f"replica_id={self._replica_id}", self._leave)
        self._death: EngineDead | None = None
        self._engine: Engine = self.create_engine(pool.engine, spec)
        try:
            with keep_serve_logging(), without_collections():
                self._info: EngineInfo = await self._engine.start()
            self._pace = self._engine.prompt_queue.pace = await self._measure_pace(spec)
            self._make_halves(spec)
            if self.role == "decode":
                await self._decodes.start()
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
        self._sequences.on_change = self._server.on_backlog = self._prefills.on_change = self._publisher.poll_soon
        self._sequences.transport_from = self._decodes.transport_from
        self._decodes.follow(self._server)
        self._metrics = WorkerMetrics(self._engine, self.num_requests, self._model.name, spec, self._background)
        if self._model.transfers_kv(self.home):
            self._record = LinkRecord(self._application, self._replica_id, self._background)
            self._decodes.on_links = self._publish_links
            self._decodes.tell_links()
        self._channel_address = await self._server.start(self._node_ip)
        self._background.need("engine-health", self._watch_health)
        self._background.keep("guard", be_guarded)
        if self._can_switch:
            self._background.keep("follow-role", self._follow_role)
        freeze_heap()
        logger.info("role=%s replica_id=%s engine=%s device=%s ready", self.role, self._replica_id, self._info, device)

    def _spec(self, pool: PoolConfig, device: str) -> EngineSpec:
        model, transfer = self._model, self._config.transfer
        return EngineSpec(
            role=self.home,
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
        if not self._model.runs_whole_sequences(self.home):
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
        return kv_format(self._model, self.home, self._info)

    def _make_halves(self, spec: EngineSpec) -> None:
        self._roles = RoleWatch(self._application, self._model.name, self._replica_id)
        self._prefills = PrefillHalf(self._replica_id, self._engine, self._info, self.kv_format)
        make_keeper = functools.partial(self._make_keeper, spec) if self._takes_kv else None
        self._decodes = DecodeHalf(self._config, self._engine, self._info, self.kv_format, make_keeper)

    @property
    def _takes_kv(self) -> bool:
        return self._model.transfers_kv(self.home) and (self.home == "decode" or self._can_switch)

    @property
    def _can_switch(self) -> bool:
        return self._model.can_switch_roles and self._model.transfers_kv(self.home)

    def _make_keeper(self, spec: EngineSpec) -> LinkKeeper:
        homes: tuple[Role, ...] = ("prefill", "decode") if self._can_switch else ("prefill",)
        handles = {home: DeploymentHandle(self._model.deployment_name(home), self._application) for home in homes}
        peers = RayPrefillPeers(handles, self._replica_id, self._roles)
        return LinkKeeper(spec, self._engine, peers, self._background)

    def _publish_links(self, links: list[Link]) -> None:
        self._server.publish_links(links)
        self._metrics.set_links(links)
        self._record.write(links)

    async def _follow_role(self) -> None:
        """Take the role that is assigned to this replica, now and whenever it changes.

        If the assignment cannot be read, this fails and is started again, and the role stays.
        """
        while True:
            await self._roles.read()
            role = self._roles.role_of(self._replica_id, self.home)
            if role != self.role:
                await self._switch(role)
            if self.role != self._recorded_role:
                await (self._roles.forget() if self.role == self.home else self._roles.tell(self.role))
                self._recorded_role = self.role
            await self._roles.wait(TOLD_POLL_S if self._model.gpus is None else POLL_S)

    async def _switch(self, role: Role) -> None:
        """Change the role.  What runs goes on, and what is on its way is served too."""
        began, before, self.role = time.monotonic(), self.role, role
        self._server.publish_role(role)
        if role == "decode":
            self._decodes.begin()
        else:
            await self._decodes.end()
        self._publisher.poll_soon()
        logger.info(
            "role=%s home=%s replica_id=%s was %s, switched_s=%.3f with %d requests",
            *(role, self.home, self._replica_id, before, time.monotonic() - began, self.num_requests()[0]),
        )

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
        if call.has_handoff and not self._takes_kv:
            raise InvalidRequest(f"a {self.home} replica takes no KV from others")
        descriptor, reason = await self._decodes.receive(channel, call)
        await self._sequences.run(channel, call, descriptor, reason)

    def num_requests(self) -> tuple[int, int]:
        """Return how many requests have not ended, including waiting ones, and how many of them decode."""
        return len(self._prefills) + self._server.num_sequences(), self._sequences.phases["decoding"]

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
        if self.role == "prefill":
            load = self._prefills.computable(load, stats)
        phases, backlog = self._sequences.phases, self._server.backlog()
        queued_tokens = load.queued_tokens + backlog.queued_tokens
        of_decode = {"waiting": 0.0, "kv_use": 0.0}
        if self.role != "prefill":
            of_decode = self._decodes.levels(phases, load, stats)
        return {
            "queued_tokens": queued_tokens,
            "busy": float(queued_tokens > 0),
            "prefilling": phases["prefilling"] + len(self._prefills),
            "waiting": phases["waiting"] + backlog.sequences + of_decode["waiting"],
            "decoding": phases["decoding"],
            "kv_use": of_decode["kv_use"],
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
            role=self.home,
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
        return msgspec.structs.replace(await self._engine.stats(), num_probes=self._decodes.num_probes)

    async def look_at_roles(self, *, replica_id: str) -> None:
        """Be told that the assignment of roles has changed (deployments/roles.py)."""
        self.check_is_me(replica_id)
        self._roles.look()

    async def prefill(self, request: GenerateRequest, *, replica_id: str) -> bytes:
        """As `PrefillHalf.prefill`."""
        self.check_is_me(replica_id)
        return await self._prefills.prefill(request)

    async def abandon(self, request_id: str, *, replica_id: str) -> None:
        """As `PrefillHalf.abandon`."""
        self.check_is_me(replica_id)
        await self._prefills.abandon(request_id)

    async def begin_probe(self, decode_replica: str, *, replica_id: str) -> None:
        """As `PrefillHalf.begin_probe`."""
        self.check_is_me(replica_id)
        await self._prefills.begin_probe(decode_replica)

    async def keep_probe(self, decode_replica: str, *, replica_id: str) -> None:
        """As `PrefillHalf.keep_probe`."""
        self.check_is_me(replica_id)
        self._prefills.keep_probe(decode_replica)

    async def end_probe(self, decode_replica: str, *, replica_id: str) -> TransportEvidence | None:
        """As `PrefillHalf.end_probe`."""
        self.check_is_me(replica_id)
        return await self._prefills.end_probe(decode_replica)

    async def attach(self, channel_id: str, number: int, refs: list[ObjectRef], *, replica_id: str) -> None:
        """As `DecodeHalf.attach`."""
        self.check_is_me(replica_id)
        self._decodes.attach(channel_id, number, refs)

    async def check_health(self) -> None:
        """Raise EngineDead if the engine, or what this replica needs beside it, is dead."""
        if self._death is not None:
            raise self._death
        await self._engine.check_health()

    async def drain(self) -> None:
        """Wait until nobody needs this replica any more."""
        await self._server.drain(self._drain_s)
        if self._prefills.has_served:
            await self._prefills.drain()

    async def __del__(self) -> None:
        """Drain and stop.  Serve calls this once no frontend chooses this replica any more.

        If it takes longer than graceful_shutdown_timeout_s, Serve kills the replica.  After this its guard gets no more
        signs of life, so it has to exit soon.
        """
        if hasattr(self, "_record"):
            await self._background.stop("links", "follow-role")
            await self._record.remove()
            await self._roles.forget()
        if hasattr(self, "_channel_address"):
            await self.drain()
            await self._background.stop()
            await self._server.stop(has_drained=True)
        if hasattr(self, "_engine"):
            await self._engine.stop()


class PrefillWorker(Worker):
    """A replica of the prefill deployment."""

    home = "prefill"


class DecodeWorker(Worker):
    """A replica of the decode deployment, or the only engine of a model without a prefill pool."""

    home = "decode"


class AggregatedWorker(Worker):
    """A replica of an aggregated deployment, which serves whole requests beside the prefill and decode pools."""

    home = "aggregated"
