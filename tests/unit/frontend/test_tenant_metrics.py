"""What Prometheus is told of each tenant."""

from __future__ import annotations

from app.frontend.tenant_metrics import TenantMetrics
from app.tenant_usage import Accounts
from app.tenants import LOCAL, Tenant
from tests.unit.test_tenant_usage import Sequence


def test_what_a_tenant_holds_is_told_by_model() -> None:
    accounts = Accounts()
    account = accounts.of(Tenant(name="a"))
    account.begin(Sequence(most_tokens=30))
    account.begin(Sequence(most_tokens=12, model="n"))
    accounts.of(LOCAL).begin(Sequence(most_tokens=5))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in TenantMetrics(None, accounts).collect()
        for sample in metric.samples
    }
    assert samples["baton_tenant_sequences", "a"] == 2
    held = {key[1:]: value for key, value in samples.items() if key[0] == "baton_tenant_kv_tokens"}
    assert held == {("a", "m"): 30, ("a", "n"): 12}, "and of nobody without a key"
