"""Where a Ray cluster that Baton starts listens."""

from __future__ import annotations

import pytest

from deployments.cluster import LOOPBACK, ray_environment


def test_a_cluster_that_is_started_here_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert LOOPBACK.items() <= ray_environment().items()


def test_a_cluster_that_ray_address_names_keeps_the_addresses_of_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    assert not LOOPBACK.keys() & ray_environment().keys()
