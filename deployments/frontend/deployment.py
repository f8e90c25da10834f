"""The frontend deployment: HTTP in, calls on the pools out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from itertools import chain
from typing import Any

from prometheus_client import REGISTRY
from ray import serve
from starlette.types import ASGIApp

from app.background import BackgroundTasks
from app.config import BatonConfig
from app.frontend.health import overall_status
from app.frontend.metrics import MetricsServer
from app.frontend.openai_server import build_server
from app.frontend.routing_metrics import RoutingMetrics
from app.frontend.tenant_metrics import TenantMetrics
from app.frontend.usage_records import UsageRecords
from app.messages import Role
from app.tenant_usage import Accounts
from app.tenants import KeyRing
from deployments.frontend.served_model import ServedModel
from deployments.guard import be_guarded
from deployments.ledger import share_limits
from deployments.process import adopt_serve_logging, freeze_heap, without_collections
from deployments.serve_hooks import AsgiIngress

logger = logging.getLogger("baton.frontend")


@serve.ingress()
class Frontend(AsgiIngress):
    """The API servers of all models.  Any number of replicas serve the same pools, without talking to each other."""

    _metrics: MetricsServer | None = None
    _usage: UsageRecords | None = None
    _background: BackgroundTasks | None = None

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: BatonConfig, pools: list[Mapping[Role, Any]], ledger: Any | None
    ) -> None:
        """`pools` holds the handles of each model's pools, in the order of `config.models`; `ledger` that of the
        ledger (ledger.py), if there are keys."""
        adopt_serve_logging()
        self._models = [
            ServedModel(model, handles, config.limits) for model, handles in zip(config.models, pools, strict=True)
        ]
        self._name = serve.get_replica_context().replica_id.unique_id
        orchestrators = [model.orchestrator for model in self._models]
        keys = KeyRing(config.security.keys) if config.security.keys is not None else None
        accounts = Accounts()
        with without_collections():
            self._app = await build_server(config, orchestrators, self._health, self._stats, keys, accounts)
        routers = {model.name: model.router for model in self._models}
        quarantines = {model.name: model.orchestrator.quarantine for model in self._models}
        wakers = {model.name: waker for model in self._models if (waker := model.orchestrator.waker) is not None}
        REGISTRY.register(RoutingMetrics(routers, quarantines, orchestrators[0].retry_budget, wakers))
        if config.security.usage_records is not None:
            self._usage = UsageRecords(config.security.usage_records, self._name)
        if config.frontend.metrics_port is not None:
            self._metrics = MetricsServer(config.frontend.metrics_port)
            logger.info("metrics at port %d", self._metrics.port)
        self._background = BackgroundTasks("frontend", logger.error)
        self._background.keep("guard", be_guarded)
        REGISTRY.register(TenantMetrics(keys, accounts))
        if keys is not None:
            self._background.keep("keys", keys.follow)
            self._background.keep("tenants", partial(share_limits, ledger, self._name, keys, accounts, self._kv_sizes))
        freeze_heap()

    def asgi_app(self) -> ASGIApp:
        return self._app

    def _kv_sizes(self) -> dict[str, int]:
        return {model.name: model.kv_size() for model in self._models}

    def _health(self) -> dict[str, Any]:
        models = [model.health() for model in self._models]
        return {
            "status": overall_status(model["state"] for model in models),
            "models": models,
            "endpoints": [endpoint for model in self._models for endpoint in model.endpoints()],
        }

    async def _stats(self) -> dict[str, Any]:
        """Return what replicas say of themselves, and beside that what this frontend alone knows."""
        answers = await asyncio.gather(*(model.stats() for model in self._models))
        return {
            "replicas": list(chain.from_iterable(answers)),
            "learnt": {model.name: model.router.predictor.ratios() for model in self._models},
            "waiting": {model.name: model.describe_line() for model in self._models},
            "frontend": {
                "replica_id": self._name,
                "scope": "this frontend only, as are `view`, `learnt` and `waiting`; others have seen other requests",
                "retry_budget": self._models[0].orchestrator.retry_budget.describe(),
                "failures": {model.name: model.describe_failures() for model in self._models},
            },
        }

    async def __del__(self) -> None:
        """Close what writes and serves.  Serve calls this when all requests of the replica have ended.

        After this its guard gets no more signs of life, so it has to exit soon.
        """
        if self._background is not None:
            await self._background.stop()
        if self._usage is not None:
            await asyncio.to_thread(self._usage.close)
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
