"""What tenants have used, for Prometheus: metrics by tenant, of which there are as many as the file of keys names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from app.tenant_usage import Accounts
from app.tenants import RATES, KeyRing


class TenantMetrics(Collector):
    """Those of one frontend."""

    def __init__(self, keys: KeyRing | None, accounts: Accounts) -> None:
        self._keys = keys
        self._accounts = accounts

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the metrics.  This runs in the thread of the scrape, beside the event loop."""
        accounts = {tenant: account for tenant, account in self._accounts.all().items() if tenant}
        for kind in RATES:
            what = kind.replace("_", " ")
            counted = CounterMetricFamily(
                f"baton_tenant_{kind}", f"The {what} of a tenant, of sequences that have ended.", labels=["tenant"]
            )
            for tenant, account in accounts.items():
                counted.add_metric([tenant], account.ended[kind])
            yield counted
        running = GaugeMetricFamily("baton_tenant_sequences", "Sequences of a tenant that run.", labels=["tenant"])
        refused = CounterMetricFamily(
            "baton_tenant_limit_reached", "Requests and sequences that a limit refused.", labels=["tenant", "limit"]
        )
        held = GaugeMetricFamily(
            "baton_tenant_kv_tokens",
            "Tokens that a tenant's running sequences may have at their ends, prompts included; kv_share bounds them.",
            labels=["tenant", "model"],
        )
        for tenant, account in accounts.items():
            for model, number in account.kv_tokens().items():
                held.add_metric([tenant, model], number)
            running.add_metric([tenant], account.num_running)
            for limit, number in list(account.refusals.items()):
                refused.add_metric([tenant, limit], number)
        yield running
        yield held
        yield refused
        yield GaugeMetricFamily(
            "baton_keys_current",
            "1 if the file of keys could be read at the last look; if not, those of before are valid.",
            value=float(self._keys is None or self._keys.is_current),
        )
