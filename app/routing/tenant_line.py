"""Those of one tenant and class that wait, and in which order they try."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import chain, islice

import msgspec

from app.errors import BatonError
from app.messages import GenerateRequest
from app.routing.decision import Decision, RoutingHints
from app.routing.fair_order import Flow
from app.routing.in_flight import InFlight

NUM_TRIED = 2
"""How many tenants in front try each time, and of each how many of those in front.  The second may take what the first
cannot."""
LATE_TURN = 8
"""One in so many turns is for a request that is late already."""
MOSTLY = 0.5
"""If late ones had less than this share of the turns, those who come now mostly go before them."""
RATE_WINDOW_S = 10.0
PRIOR_S = 0.5
"""The share of late ones is over the turns that had so many seconds of work, and at first it is taken that this many
seconds of it were of late ones.  The same numbers are for the speed of the line (app/routing/waiting_line.py)."""

OnTurn = Callable[[Decision, InFlight], object]


class Ticket(msgspec.Struct, eq=False):
    """One request that waits."""

    request: GenerateRequest
    hints: RoutingHints
    lost: Collection[str]
    arrived_at: float
    on_turn: OnTurn
    on_error: Callable[[BatonError], object]
    alone_s: float
    """The predicted seconds to its first token once it is its turn."""
    rank: int
    """Its place among `WaitingLine.orders`."""
    flow: TenantLine
    tokens: float
    """What it takes of its tenant's part if nothing of its prompt is cached."""
    was_preempted: bool = False
    """Whether it has tokens already, and gave way to a higher class."""
    may_preempt_at: float = 0.0
    """When it is worth asking again whether others can give way to it."""
    is_late: bool = False
    has_left: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def cost(self) -> float:
        return self.tokens / self.hints.weight


class TenantLine(Flow):
    """Those of one tenant and class."""

    def __init__(self, tenant: str, num_turns: int) -> None:
        """`num_turns` are how many the whole line has had."""
        super().__init__(tenant)
        self.num_turns = num_turns
        self.work_s = 0.0
        """The sum of `Ticket.alone_s`."""
        self.preempted: deque[Ticket] = deque()
        self.num_preempted = 0
        """Those of `preempted` that have not left."""
        self.in_time: deque[Ticket] = deque()
        self.late: deque[Ticket] = deque()
        self.late_s = 0.0
        """The part of `work_s` that is of those who are late."""
        self._served_s = self._late_served_s = PRIOR_S

    def forget_late(self) -> None:
        """Take it again that late ones have all turns: nobody waits any more."""
        self._served_s = self._late_served_s = PRIOR_S

    @property
    def late_share(self) -> float:
        """The share that late ones had in the work that was served while some waited; all of it at first."""
        return max(1 / LATE_TURN, self._late_served_s / self._served_s)

    @property
    def passes_late(self) -> bool:
        """Whether those who come now mostly go before the late ones."""
        return self.late_share < MOSTLY

    def count_turn(self, ticket: Ticket) -> None:
        """Take note that one of them has its turn.  Those that were preempted take it from nobody who is late."""
        if ticket.was_preempted:
            return
        self.num_turns += 1
        if self.late:
            kept = math.exp(-ticket.alone_s / RATE_WINDOW_S)
            self._served_s = self._served_s * kept + ticket.alone_s
            self._late_served_s = self._late_served_s * kept + ticket.alone_s * ticket.is_late

    def tickets(self) -> Iterator[Ticket]:
        return (ticket for ticket in chain(self.preempted, self.in_time, self.late) if not ticket.has_left)

    def front(self) -> list[Ticket]:
        """Return those that are to try, in this order.  The first one that is late has not left."""
        front = list(islice((ticket for ticket in self.in_time if not ticket.has_left), NUM_TRIED))
        if self.late:
            front.insert(0 if self.num_turns % LATE_TURN == LATE_TURN - 1 else len(front), self.late[0])
        return [*islice((ticket for ticket in self.preempted if not ticket.has_left), NUM_TRIED), *front]

    @property
    def num_refusable(self) -> int:
        return self.num_waiting - self.num_preempted

    def last(self) -> Ticket:
        """Return the one that has the last turn of those that can be refused, of which there must be one."""
        for tickets in (self.late, self.in_time):
            while tickets and tickets[-1].has_left:
                tickets.pop()
        return (self.late or self.in_time)[-1]
