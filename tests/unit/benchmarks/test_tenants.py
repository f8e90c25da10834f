"""What `python -m benchmarks.tenants` makes of its replies."""

from __future__ import annotations

from pathlib import Path

import yaml

from app.tenants import digest, parse_tenants
from benchmarks.tenants import KEYS, SETTLED_S, Phase, Reply, percentiles_ms
from tests.conftest import REPOSITORY


def test_the_configuration_has_the_tenants_that_ask() -> None:
    config = yaml.safe_load((REPOSITORY / "cluster/local/sim-tenants.yaml").read_text())
    (application,) = config["applications"]
    found = parse_tenants((REPOSITORY / Path(application["args"]["security"]["keys"])).read_text())
    hashes = {tenant.name: tenant.keys for tenant in found}
    for name, key in KEYS.items():
        assert hashes[name] == [digest(key.encode()).hex()]
    assert config["http_options"]["host"] == "127.0.0.1", "everybody knows the keys"


def test_only_what_came_after_the_beginning_counts() -> None:
    early, late = SETTLED_S - 1, SETTLED_S + 1
    replies = [
        Reply("quiet", 200, early, 0.1, 0.2),
        Reply("quiet", 200, late, 0.1, 0.2),
        Reply("flood", 200, late, 0.1, 99.0),
        Reply("flood", 429, late, 0.01, 0.01),
        Reply("flood", 429, early, 0.01, 0.01),
    ]
    phase = Phase("p", SETTLED_S + 10, {"quiet": 1, "flood": 9}, replies)
    assert phase.served("quiet") == [replies[1]]
    assert phase.refused() == [replies[3]]
    assert phase.goodput == 0.1, "what ended after the phase is none of it"


def test_percentiles() -> None:
    assert percentiles_ms([0.001] * 99 + [1.0])[:2] == [1.0, 1.0]
