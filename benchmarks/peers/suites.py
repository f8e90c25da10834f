"""The benchmarks: which targets, and how much load."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.peers import control_plane, targets
from benchmarks.peers.targets import Plan, Planner, Setup


class Suite(msgspec.Struct, frozen=True):
    """A set of targets that compare with each other."""

    targets: dict[str, Planner]
    requests: int
    """Per load, at least."""
    requests_per_stream: int
    """At least; with few, most of a load would be its ends, where not all streams are busy."""
    token_ms: float = 0.0
    """Of engines that compute nothing (Setup)."""


SUITES = {
    "engine": Suite(targets.TARGETS, requests=24, requests_per_stream=4),
    # Some hundred times as fast, and small costs need many requests.
    "control-plane": Suite(control_plane.TARGETS, requests=200, requests_per_stream=16),
    # The pace of a large model: each token is an event of its own, which at full speed only some targets make it.
    "paced": Suite(control_plane.TARGETS, requests=24, requests_per_stream=8, token_ms=20.0),
}


def plan_target(name: str, setup: Setup, folder: Path) -> Plan:
    """The plan for a target of any suite; configuration files go into `folder`.  Raises NotMeasurable."""
    planners = {name: planner for suite in SUITES.values() for name, planner in suite.targets.items()}
    return planners[name](setup, folder)
