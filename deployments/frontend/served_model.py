"""One model as a frontend serves it: its pools, the router that chooses between their replicas, and their state."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app.channel.protocol import Backlog
from app.config import LimitsConfig, ModelConfig
from app.errors import BatonError
from app.frontend.health import model_state
from app.frontend.orchestrator import Orchestrator
from app.frontend.waking import Waker
from app.messages import Role
from app.routing.decision import SERVICE_CLASSES
from app.routing.router import Router
from app.routing.slowness import slowness
from deployments.autoscaling import wish_key
from deployments.frontend.pools import RayReplicas
from deployments.ready_replicas import ready_replicas_of
from deployments.serve_hooks import deployment_id_of, put_internal_kv

STATS_TIMEOUT_S = 2.0
"""How long a replica may take to answer for /stats, which says of the others what it knows."""
MAX_TOLD_TENANTS = 20


class ServedModel:
    """`handles` are the Serve handles of the model's pools."""

    def __init__(self, model: ModelConfig, handles: Mapping[Role, Any], limits: LimitsConfig) -> None:
        self.name = model.name
        self._model = model
        self._handles = handles
        self.router = Router(
            model.routing,
            model.slo,
            has_prefill="prefill" in handles,
            has_aggregated="aggregated" in handles,
            can_decode_prefill=model.can_decode_prefill,
            can_prefill_decode=model.can_prefill_decode,
        )
        self._replicas = RayReplicas(handles, self.router.by_role)
        prefill = self._replicas if "prefill" in handles else None
        application = handles["decode"].app_name
        waker = (
            Waker(model.name, partial(_wish, application, model.name), limits.max_wake_s) if model.may_sleep else None
        )
        self.orchestrator = Orchestrator(
            self.router,
            prefill,
            self._replicas,
            limits,
            aggregated=self._replicas if "aggregated" in handles else None,
            on_prefill=prefill,
            hands_over_early=model.hands_over_early,
            can_resume_counting=model.can_resume_counting,
            waker=waker,
        )
        self.orchestrator.line.on_backlog = self._tell_backlog
        self._ready = {role: ready_replicas_of(deployment_id_of(handle)) for role, handle in handles.items()}

    def health(self) -> dict[str, Any]:
        """Return what /health says about the model.  /v1/models uses it too.

        Of each pool it says how many replicas are ready, according to Serve, how many this frontend can reach, and why
        it cannot reach the others.
        """
        reachable = {role: len(pool.replicas) for role, pool in self.router.pools.items()}
        if self._model.is_disaggregated and reachable["decode"] and not self.router.has_usable_link():
            reachable["prefill"] = 0  # for requests it is as if there were none
        return {
            "name": self._model.name,
            "engine": self._model.engine,
            "mode": "disaggregated" if self._model.is_disaggregated else "aggregated",
            "local_prefill": self.router.local_role() is not None,
            "state": model_state(self._model, reachable),
            "pools": {role: self._describe_pool(role, reachable[role]) for role in self._ready},
        }

    def _describe_pool(self, role: Role, num_reachable: int) -> dict[str, Any]:
        """Describe the pool of a role.  Those that are there from another deployment are `switched`."""
        roles = {replica: (self._role(replica, home), home) for home in self._ready for replica in self._ids(home)}
        switched = [replica for replica, (now, home) in roles.items() if role == now != home]
        num_ready = sum(role == now for now, _ in roles.values())
        described: dict[str, Any] = {"ready": num_ready, "reachable": num_reachable}
        if switched:
            described["switched"] = switched
        if reasons := self._replicas.unreachable(role):
            described["unreachable"] = dict(reasons)
        return described

    def _ids(self, home: Role) -> list[str]:
        return self._ready[home].ids()

    def _role(self, replica: str, home: Role) -> Role:
        return self.router.by_role.role_of(replica, home)

    def endpoints(self) -> list[dict[str, Any]]:
        """Return what each ready replica recorded about itself, and how slow it is beside others of its pool.

        `home` is the role of its deployment, and `role` what it does now.
        """
        slow = self._slowness()
        return [
            {
                "status": "ready",
                **metadata["info"],
                "role": self._role(replica, home),
                "home": home,
                "slowness": slow.get(replica),
            }
            for home, pool in self._ready.items()
            for replica, metadata in pool.metadata().items()
        ]

    def _slowness(self) -> dict[str, float]:
        known = [slowness(pool.replicas) for pool in self.router.pools.values()]
        return {replica: round(ratio, 2) for ratios in known for replica, ratio in ratios.items()}

    def describe_failures(self) -> dict[str, Any]:
        """Return what this frontend leaves out of routing and refuses, for what it has seen itself."""
        ejections, quarantine = self.router.ejections, self.orchestrator.quarantine
        return {
            "left_out": ejections.describe(),
            "ejections_so_far": dict(ejections.counts),
            "quarantined_prompts": quarantine.num_quarantined,
            "quarantines_so_far": quarantine.num_quarantines,
        }

    def kv_size(self) -> int:
        """Return the tokens that fit into the KV memory of all replicas that decode."""
        return sum(pool.kv_size for role, pool in self.router.pools.items() if role != "prefill")

    async def stats(self) -> list[dict[str, Any]]:
        """Ask every ready replica for its present stats, and return them beside this frontend's pool state."""
        slow = self._slowness()
        asked = [self._ask(home, replica, slow.get(replica)) for home in self._ready for replica in self._ids(home)]
        return await asyncio.gather(*asked)

    async def _ask(self, home: Role, replica: str, slowness: float | None) -> dict[str, Any]:
        view = self._describe_state(replica)
        about = {
            "model": self._model.name,
            "role": self._role(replica, home),
            "home": home,
            "replica_id": replica,
            "view": None if view is None else {**view, "slowness": slowness},
        }
        if (reason := self._replicas.unreachable(home).get(replica)) is not None:
            about["unreachable"] = reason
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                stats = await self._handles[home].stats.remote(replica_id=replica)
        except TimeoutError:
            return {**about, "error": "no answer"}
        except (BatonError, RayError, RayServeException) as error:
            return {**about, "error": type(error).__name__}
        return {**about, **msgspec.to_builtins(stats)}

    def _tell_backlog(self) -> None:
        """Tell the pool that the first in line waits for, so that autoscaling sees what waits here.

        Without a decode replica that is prefill also for those who wait for room to decode, if it can serve them.
        """
        line, router = self.orchestrator.line, self.router
        is_prefills = line.lacks == "prefill" or (router.can_prefill_decode and not router.pools["decode"].replicas)
        short = "prefill" if is_prefills and "prefill" in self._handles else "decode"
        backlog = Backlog(line.queued_tokens, 0) if line.lacks == "prefill" else Backlog(0, line.num_waiting)
        for role in self._handles.keys() & {"decode", "prefill"}:
            self._replicas.tell_backlog(role, backlog if role == short else Backlog())

    def describe_line(self) -> dict[str, Any]:
        """Return who waits in this frontend, and for what; `waking` are requests that wait for the model to wake.

        `by_tenant` names those tenants of which most requests wait, MAX_TOLD_TENANTS at most.
        """
        line, waker = self.orchestrator.line, self.orchestrator.waker
        hints = [ticket.hints for ticket in line.tickets()]
        by_class, by_tenant = Counter(h.service_class for h in hints), Counter(h.tenant for h in hints if h.tenant)
        return {
            "requests": line.num_waiting,
            "by_class": {name: by_class[name] for name in SERVICE_CLASSES},
            "by_tenant": dict(by_tenant.most_common(MAX_TOLD_TENANTS)),
            "queued_tokens": line.queued_tokens,
            "lacks": line.lacks or None,
            "waking": waker.num_waiting if waker is not None else 0,
        }

    def _describe_state(self, replica: str) -> dict[str, int] | None:
        """What this frontend believes of a replica; None if it has no connection to it."""
        if (state := self.router.by_role.find(replica)) is None:
            return None
        gauges = {"sequences": state.sequences, "queued_tokens": state.queued_tokens, "used_blocks": state.used_blocks}
        return {
            **{name: gauge.value for name, gauge in gauges.items()},
            **{f"own_{name}": gauge.own for name, gauge in gauges.items()},
            "cached_blocks": self.router.index.num_blocks(replica),
        }


async def _wish(application: str, model: str) -> None:
    """Tell the pools' scaling policies that a model is wanted.  Ray's GCS is not called on the event loop."""
    await asyncio.to_thread(put_internal_kv, wish_key(application, model), uuid.uuid4().hex)
