"""Prometheus metrics of what this frontend's routers know.  They are read when somebody scrapes them, so that a replica
that is gone leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from app.frontend.waking import Waker
from app.routing.ejection import End
from app.routing.quarantine import Quarantine
from app.routing.retry_budget import RetryBudget
from app.routing.router import Router
from app.routing.slowness import slowness


class RoutingMetrics(Collector):
    """What `routers` and `quarantines` know, by the models' names, and the budget of all of them."""

    def __init__(
        self,
        routers: Mapping[str, Router],
        quarantines: Mapping[str, Quarantine],
        budget: RetryBudget,
        wakers: Mapping[str, Waker],
    ) -> None:
        """`wakers` has those of the models that may sleep."""
        self._routers = routers
        self._wakers = wakers
        self._quarantines = quarantines
        self._budget = budget

    def collect(self) -> Iterator[Metric]:
        """Yield each metric.  This runs in the thread of the scrape, beside the event loop."""
        slow = GaugeMetricFamily(
            "baton_replica_slowness",
            "How many times as long a replica takes as the median of its pool's others (app/routing/slowness.py).",
            labels=["model", "role", "replica"],
        )
        reached = GaugeMetricFamily(
            "baton_replicas",
            "Replicas that are reached, by the role that each has now.",
            labels=["model", "role"],
        )
        switched = CounterMetricFamily(
            "baton_role_switches", "Replicas that came to a role from another one.", labels=["model", "role"]
        )
        asleep = GaugeMetricFamily(
            "baton_model_asleep", "1 while no replica of a model that may sleep is reached.", labels=["model"]
        )
        waking = GaugeMetricFamily(
            "baton_waking_requests", "Requests that wait for their model to wake.", labels=["model"]
        )
        ejections = CounterMetricFamily(
            "baton_ejections", "Replicas of a pool, or pairs, that were left out of routing.", labels=["model", "end"]
        )
        quarantines = CounterMetricFamily(
            "baton_quarantines", "Prompts that were refused from then on, as engines died of them.", labels=["model"]
        )
        refused = CounterMetricFamily("baton_retries_refused", "Retries for which the frontend had no budget.")
        for model, router in self._routers.items():
            for role, pool in router.pools.items():
                reached.add_metric([model, role], len(pool.replicas))
                switched.add_metric([model, role], router.by_role.num_switched[role])
                for replica, ratio in slowness(dict(pool.replicas)).items():
                    slow.add_metric([model, role, replica], ratio)
            waker = self._wakers.get(model)
            is_asleep = waker is not None and not any(pool.replicas for pool in router.pools.values())
            asleep.add_metric([model], is_asleep)
            waking.add_metric([model], waker.num_waiting if waker is not None else 0)
            ends: tuple[End, ...] = (*router.pools, "pair")
            for end in ends:
                ejections.add_metric([model, end], router.ejections.counts[end])
            quarantines.add_metric([model], self._quarantines[model].num_quarantines)
        refused.add_metric([], self._budget.num_refused)
        yield from (reached, switched, asleep, waking, slow, ejections, quarantines, refused)
