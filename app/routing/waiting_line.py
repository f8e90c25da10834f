"""The requests of one frontend for which no replica has room.  They are nobody's yet, so any replica can relieve them.

1. A request that finds room is served at once; the line costs it one comparison.
2. Otherwise it waits.  Whenever a replica has told something, those in front try again, in the order of their arrival.
3. Who can no longer be in time (`slo.ttft_ms`) lets those pass that still can.  If all were served in order, a load
   that is a little too much would make every one of them late.  One in LATE_TURN turns is for the late ones, so that
   each is served.
4. Who would wait longer than ``limits.max_ttft_ms`` is refused, as soon as that is predicted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection
from itertools import islice
from random import uniform

import msgspec

from app.errors import BatonError, Overloaded
from app.messages import GenerateRequest
from app.routing.decision import Decision, Lack, RoutingHints, Wait
from app.routing.in_flight import InFlight
from app.routing.router import Router

SOONEST_LOOK_S, LATEST_LOOK_S = 0.001, 0.009
"""How long news of replicas are collected before the line is looked at; each time it is drawn between the two.  All
frontends get the same news at the same moment, and what one sends the others know some 1 ms later.  Without the draw
they would all send to the same replica."""
HEARTBEAT_S = 0.05
"""How often the line is looked at without news: what is a good choice changes while a request waits."""
IN_TIME = 0.9
"""Who is predicted to get the first token later than in this share of `slo.ttft_ms` counts as late.  Clients count the
way to the frontend and back as well, and a prediction is off by a few per cent."""
NUM_TRIED = 2
"""How many of those in front try, each time.  The second may take what the first cannot."""
LATE_TURN = 8
"""One in so many turns is for a request that is late already."""
RATE_WINDOW_S = 10.0
PRIOR_S = 0.5
"""The speed of the line is its mean over RATE_WINDOW_S seconds in which somebody waited.  At first it is taken that
each replica computes prompts all the time, and that counts as much as PRIOR_S seconds."""
LONGEST_RETRY_S = 60.0

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
    is_late: bool = False
    has_left: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


class WaitingLine:
    """The line of one model in one frontend."""

    def __init__(self, router: Router, max_ttft_s: float, later: Callable[[float, Callable[[], None]], object]) -> None:
        """`later` calls a function after some seconds of the router's clock."""
        self.lacks: Lack = ""
        """What the first in line waits for: that a replica has room for prompts, or for sequences."""
        self.queued_tokens = 0
        """The prompt tokens of those that wait."""
        self.num_waiting = 0
        self.on_backlog: Callable[[], object] = lambda: None
        """Called every HEARTBEAT_S seconds while somebody waits, and when nobody does any more."""
        self._router = router
        self._max_ttft_s = max_ttft_s
        self._ttft_s = IN_TIME * router.slo.ttft_ms / 1e3
        self._later = later
        self._clock = router.clock
        self._in_time: deque[Ticket] = deque()
        self._late: deque[Ticket] = deque()
        self._work_s = 0.0
        self._num_turns = 0
        self._will_look = self._will_beat = False
        self._served_s = self._passed_s = 0.0
        self._rated_at = self._clock()
        router.on_change(self.on_news)

    def join(
        self,
        request: GenerateRequest,
        hints: RoutingHints,
        lost: Collection[str],
        arrived_at: float,
        on_turn: OnTurn,
        on_error: Callable[[BatonError], object],
    ) -> Ticket | None:
        """Call `on_turn` once it is the request's turn, which may be at once; then this returns None.

        `on_turn` gets the decision; from then on the sequence counts as in flight.  `on_error` is called instead if
        the request is refused while it waits.  Raises Overloaded if it is refused at once, and whatever
        `Router.decide` raises.
        """
        waited_s = self._clock() - arrived_at
        choice = self._router.decide(request, hints, lost, waited_s=waited_s, waiting_tokens=self.queued_tokens)
        if isinstance(choice, Wait):
            alone_s, lacks = choice.alone_s, choice.lacks
        elif self.num_waiting:
            alone_s, lacks = choice.way.alone_s, self.lacks
        else:
            on_turn(choice, self._router.begin(request, choice))
            return None
        if not self.num_waiting:
            self._rated_at = self._clock()
        ticket = Ticket(request, hints, lost, arrived_at, on_turn, on_error, alone_s)
        if (excess_s := self._excess_s(ticket, self.predicted_wait_s())) > 0:
            raise Overloaded(min(LONGEST_RETRY_S, excess_s))
        self.lacks = self.lacks or lacks
        self._in_time.append(ticket)
        self._count(ticket, 1)
        self.on_news()
        self._beat()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up waiting."""
        if not ticket.has_left:
            ticket.has_left = True
            self._count(ticket, -1)

    def on_news(self) -> None:
        """Look at the line soon, as something has changed."""
        if self.num_waiting and not self._will_look:
            self._will_look = True
            self._later(uniform(SOONEST_LOOK_S, LATEST_LOOK_S), self._look)

    def _beat(self) -> None:
        if not self._will_beat:
            self._will_beat = True
            self._later(HEARTBEAT_S, self._on_beat)

    def _on_beat(self) -> None:
        self._will_beat = False
        self.on_backlog()
        if self.num_waiting:
            self.on_news()
            self._beat()

    def _count(self, ticket: Ticket, number: int) -> None:
        self.num_waiting += number
        self.queued_tokens += number * ticket.num_tokens
        self._work_s = max(0.0, self._work_s + number * ticket.alone_s)
        if not self.num_waiting:
            self.lacks = ""

    def _look(self) -> None:
        self._will_look = False
        self._rate(0.0)
        while self.num_waiting and self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Serve one of those in front.  Returns whether one was served, refused or let others pass."""
        self._sort_out()
        front = list(islice((ticket for ticket in self._in_time if not ticket.has_left), NUM_TRIED))
        late = self._late[0] if self._late else None
        if late is not None:
            front.insert(0 if self._num_turns % LATE_TURN == LATE_TURN - 1 else len(front), late)
        return any(self._try(ticket, is_first=index == 0) for index, ticket in enumerate(front))

    def _sort_out(self) -> None:
        """Forget those in front who have left, take those who cannot be in time to the others of that kind, and refuse
        those who are too late altogether.
        """
        now = self._clock()
        while self._in_time:
            first = self._in_time[0]
            if not first.has_left and now - first.arrived_at + first.alone_s <= self._ttft_s:
                break
            self._in_time.popleft()
            if not first.has_left:
                self._let_others_pass(first)
        while self._late and (self._late[0].has_left or self._refuse(self._late[0], 0.0)):
            self._late.popleft()

    def _let_others_pass(self, ticket: Ticket) -> None:
        """Take one that cannot be in time to the others of that kind, or refuse it."""
        if not self._refuse(ticket, self.predicted_wait_s()):
            ticket.is_late = True
            self._late.append(ticket)

    def _refuse(self, ticket: Ticket, wait_s: float) -> bool:
        """Refuse a request that will be too late even for `max_ttft_ms` if its turn is in `wait_s` seconds."""
        excess_s = self._excess_s(ticket, wait_s)
        if excess_s <= 0:
            return False
        self.leave(ticket)
        ticket.on_error(Overloaded(min(LONGEST_RETRY_S, excess_s)))
        return True

    def _try(self, ticket: Ticket, *, is_first: bool) -> bool:
        waited_s, others = self._clock() - ticket.arrived_at, self.queued_tokens - ticket.num_tokens
        try:
            choice = self._router.decide(
                ticket.request, ticket.hints, ticket.lost, waited_s=waited_s, waiting_tokens=others
            )
        except BatonError as error:
            self.leave(ticket)
            ticket.on_error(error)
            return True
        if isinstance(choice, Wait):
            if is_first:
                self.lacks = choice.lacks
            return False
        if not ticket.is_late and waited_s + choice.predicted_ttft_s > self._ttft_s:
            self._in_time.remove(ticket)
            self._let_others_pass(ticket)
            return True
        self.leave(ticket)
        self._num_turns += 1
        self._rate(ticket.alone_s)
        ticket.on_turn(choice, self._router.begin(ticket.request, choice))
        return True

    def _rate(self, served_s: float) -> None:
        """Take note that work of `served_s` seconds was served, and of the time that has passed meanwhile."""
        now = self._clock()
        passed_s, self._rated_at = now - self._rated_at, now
        kept = math.exp(-passed_s / RATE_WINDOW_S)
        self._served_s = self._served_s * kept + served_s
        self._passed_s = self._passed_s * kept + passed_s

    def predicted_wait_s(self) -> float:
        """Predict how long a request that joins now waits for its turn, if it is not let pass."""
        pools = self._router.pools
        most = len(pools["prefill" if "prefill" in pools else "decode"].replicas)
        speed = (self._served_s + most * PRIOR_S) / (self._passed_s + PRIOR_S)
        return self._work_s / speed if speed else 0.0

    def _excess_s(self, ticket: Ticket, wait_s: float) -> float:
        """Return by how much a request will be later than `max_ttft_ms` allows if its turn is in `wait_s` seconds."""
        waited_s = self._clock() - ticket.arrived_at
        return waited_s + wait_s + ticket.alone_s - self._max_ttft_s
