"""Which tenant's turn it is, so that all who want more than they get receive tokens in proportion to their weights.

This is start-time fair queueing: P. Goyal, H. M. Vin, H. Cheng, "Start-time Fair Queuing: A Scheduling Algorithm for
Integrated Services Packet Switching Networks", SIGCOMM 1996.  Tenants are its flows.  A request's *cost* is its tokens
by the weight of its tenant.  What a request costs is needed only once it is served, and no rate of service at all.

1. Each flow has a *start*: the virtual time of its next request.  The flow with the earliest start is served.
2. That moves its start by the request's cost.  The virtual time of all is the start of what was served last.
3. A flow that had nothing waiting starts at most a *credit* before that time, so idle time earns little.  It does not
   start before its own start either, so that leaving the line and coming back earns nothing.  The credit is not in the
   paper: with it who uses less than its part has it also when its requests come in small groups, and over a long time
   it gets no more, as the credit is only what it left to others before.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar


class Flow:
    """What waits of one tenant."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.starts_at = 0.0
        """The virtual time of its next request, in tokens of a tenant of weight 1."""
        self.credit = 0.0
        """The most that it was ever allowed to start before the others."""
        self.is_queued = False
        """Whether the order has it in its heap."""
        self.num_waiting = 0
        self.waiting_cost = 0.0
        """What those that wait are expected to cost."""

    @property
    def num_refusable(self) -> int:
        """How many of those that wait can be refused."""
        return self.num_waiting

    @property
    def ends_at(self) -> float:
        """The virtual time at which another request would start that joined now."""
        return self.starts_at + self.waiting_cost


AnyFlow = TypeVar("AnyFlow", bound=Flow)


class FairOrder(Generic[AnyFlow]):
    """The order of those flows from which something waits."""

    def __init__(self, new_flow: Callable[[str], AnyFlow]) -> None:
        """`new_flow` makes the flow of a tenant."""
        self.num_waiting = 0
        self.flows: dict[str, AnyFlow] = {}
        """By tenant; also those of which nothing waits, as long as what they have got counts."""
        self._new_flow = new_flow
        self._heap: list[tuple[float, int, AnyFlow]] = []
        """Those of which something waits, and some others, by their start.  It may have become later since."""
        self._numbers = count()
        self._now = 0.0

    def flow(self, tenant: str, credit: float = 0.0) -> AnyFlow:
        """Return the flow of a tenant of whom another request is to wait, which has this credit."""
        if not self.num_waiting:  # Nobody lacks anything, so nobody has got too much.
            self.flows.clear()
            self._heap.clear()
            self._now = 0.0
        if (flow := self.flows.get(tenant)) is None:
            self._forget()
            flow = self.flows[tenant] = self._new_flow(tenant)
        if not flow.num_waiting:
            flow.starts_at = max(flow.starts_at, self._now - credit)
            flow.credit = max(flow.credit, credit)
        if not flow.is_queued:
            flow.is_queued = True
            heappush(self._heap, (flow.starts_at, next(self._numbers), flow))
        return flow

    def _forget(self) -> None:
        """Forget the flows that have nothing waiting, and would not start later for what they have got."""
        self.flows = {
            tenant: flow
            for tenant, flow in self.flows.items()
            if flow.num_waiting or flow.starts_at > self._now - flow.credit
        }

    def count(self, flow: AnyFlow, number: int, cost: float) -> None:
        """Count one request that waits, or does not any more (`number` is -1)."""
        self.num_waiting += number
        flow.num_waiting += number
        flow.waiting_cost = flow.waiting_cost + number * cost if flow.num_waiting else 0.0  # no rounding errors add up

    def first(self, number: int) -> list[AnyFlow]:
        """Return the first `number` flows, or all if there are fewer, of which something waits."""
        found: list[tuple[float, int, AnyFlow]] = []
        while self._heap and len(found) < number:
            starts_at, rank, flow = self._heap[0]
            if starts_at < flow.starts_at:
                heapreplace(self._heap, (flow.starts_at, rank, flow))
                continue
            heappop(self._heap)
            if flow.num_waiting:
                found.append((starts_at, rank, flow))
            else:
                flow.is_queued = False
        for entry in found:
            heappush(self._heap, entry)
        return [flow for _, _, flow in found]

    def charge(self, flow: AnyFlow, cost: float) -> None:
        """Take note that a request of this cost is served."""
        self._now = max(self._now, flow.starts_at)
        flow.starts_at += cost

    def share_before(self, flow: AnyFlow, other: AnyFlow) -> float:
        """Return the share of what waits in `other` whose turn is before that of one that joins `flow` now."""
        if other is flow:
            return 1.0
        if not other.waiting_cost:
            return 0.0
        return min(1.0, max(0.0, (flow.ends_at - other.starts_at) / other.waiting_cost))

    def last(self) -> AnyFlow | None:
        """Return the flow of which a request that can be refused has the last turn; None if there is none."""
        refusable = (flow for flow in self.flows.values() if flow.num_refusable)
        return max(refusable, key=lambda flow: flow.ends_at, default=None)
