"""Tells how near two nodes are: by how long transfers between them took, or else by whether they are the same node."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

MAX_PAIRS = 4096
"""How many pairs of nodes are remembered; the one without a transfer for the longest time is forgotten first."""
SMOOTHING = 0.2
"""The share that the newest transfer has in a pair's average."""
OTHER_NODE = 0.5
"""The nearness of another node before anything was measured; the same node has 1."""


class Topology:
    """How near nodes are, learnt from transfers."""

    def __init__(self) -> None:
        self._slowness: OrderedDict[tuple[str, str], float] = OrderedDict()

    def learn(self, prefill_node: str, decode_node: str, slowness: float) -> None:
        """Learn from one handover: `slowness` is its time divided by what one of its length takes on average."""
        pair = prefill_node, decode_node
        before = self._slowness.pop(pair, slowness)
        self._slowness[pair] = before + SMOOTHING * (slowness - before)
        if len(self._slowness) > MAX_PAIRS:
            self._slowness.popitem(last=False)

    def slowness(self, prefill_node: str, decode_node: str) -> float:
        """Return how many times as long as on average handovers between two nodes take; 1 if none was seen."""
        return self._slowness.get((prefill_node, decode_node), 1.0)

    def nearness(self, prefill_node: str, decode_nodes: Collection[str]) -> dict[str, float]:
        """Return a number in (0, 1] for each of `decode_nodes`: 1 where handovers take no longer than on average."""
        found = {}
        for node in decode_nodes:
            slowness = self._slowness.get((prefill_node, node))
            if slowness is None:
                found[node] = 1.0 if node == prefill_node else OTHER_NODE
            else:
                found[node] = 1 / max(1.0, slowness)
        return found
