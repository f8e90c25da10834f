"""How near two nodes are to each other: by how long transfers between them took, else by whether they are the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

MAX_PAIRS = 4096
"""Pairs of nodes that are remembered; the one that had no transfer for longest goes first."""
SMOOTHING = 0.2
"""The share of the newest transfer in a pair's average."""
OTHER_NODE = 0.5
"""The nearness of another node before anything was measured: the same node has 1."""


class Topology:
    """Learns from transfers."""

    def __init__(self) -> None:
        self._slowness: OrderedDict[tuple[str, str], float] = OrderedDict()

    def learn(self, prefill_node: str, decode_node: str, slowness: float) -> None:
        """`slowness` is how long a handover took, divided by what one of its length takes on average."""
        pair = prefill_node, decode_node
        before = self._slowness.pop(pair, slowness)
        self._slowness[pair] = before + SMOOTHING * (slowness - before)
        if len(self._slowness) > MAX_PAIRS:
            self._slowness.popitem(last=False)

    def nearness(self, prefill_node: str, decode_nodes: Collection[str]) -> dict[str, float]:
        """Of each of `decode_nodes`, in (0, 1]: 1 where handovers take no longer than on average."""
        found = {}
        for node in decode_nodes:
            slowness = self._slowness.get((prefill_node, node))
            if slowness is None:
                found[node] = 1.0 if node == prefill_node else OTHER_NODE
            else:
                found[node] = 1 / max(1.0, slowness)
        return found
