"""The benchmarks: the targets and the amount of load of each."""

from __future__ import annotations

from pathlib import Path

import msgspec

from benchmarks.peers import control_plane, targets
from benchmarks.peers.targets import Plan, Planner, Setup


class Suite(msgspec.Struct, frozen=True):
    """A set of targets that can be compared with each other."""

    targets: dict[str, Planner]
    requests: int
    """The least number per load."""
    requests_per_stream: int
    """The least number.  With fewer, most of a load would be its ends, where not all streams are busy."""
    token_ms: float = 0.0
    """The pace of engines that compute nothing (see Setup)."""


SUITES = {
    "engine": Suite(targets.TARGETS, requests=24, requests_per_stream=4),
    # These are some hundred times as fast, and small costs need many requests.
    "control-plane": Suite(control_plane.TARGETS, requests=200, requests_per_stream=16),
    # The pace of a large model.  Each token is an event of its own; at full speed this is so with only some targets.
    "paced": Suite(control_plane.TARGETS, requests=24, requests_per_stream=8, token_ms=20.0),
}


def plan_target(name: str, setup: Setup, folder: Path) -> Plan:
    """Return the plan for a target of any suite.  Configuration files go into `folder`.  Raises NotMeasurable."""
    planners = {name: planner for suite in SUITES.values() for name, planner in suite.targets.items()}
    return planners[name](setup, folder)
