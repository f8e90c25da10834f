"""The requests of one frontend for which no replica has room.  They are nobody's yet, so any replica can relieve them.

1. A request that finds room is served at once if nobody of its class or a higher one waits.
2. Otherwise it waits.  Whenever a replica has told something, those in front try again: first those that have been
   served before and lost their replica, then the highest class (`SERVICE_CLASSES`) of which somebody waits.  Lower
   ones do not even get what that one leaves, or else small requests would take the room before a large one finds it.
3. Within a class tenants have turns so that each gets tokens by its weight (app/routing/fair_order.py).
4. Of one tenant those go first that arrived first.  Who can no longer be in time (`slo.ttft_ms`) lets those pass that
   still can.  If all were served in order, a load that is a little too much would make every one of them late.  One in
   LATE_TURN turns is for the late ones, so that each is served.
5. Who would wait longer than ``limits.max_ttft_ms`` is refused, as soon as that is predicted.  Those behind it do not
   count: a lower class never makes a higher one too late.  Whom one that goes before makes too late is refused.  Where
   late ones have had few turns, who would be late waits among them from the beginning, or is refused at once.
6. If decode has no room for one in front, sequences of the lowest class give way to it (app/routing/preemption.py).
   They wait in their class before all others of their tenant, and are never refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from random import uniform

from app.errors import BatonError, Overloaded
from app.messages import GenerateRequest
from app.routing.decision import SERVICE_CLASSES, Decision, Lack, RoutingHints, Wait
from app.routing.fair_order import FairOrder
from app.routing.preemption import PREEMPTED, Preemption, Running
from app.routing.router import Router
from app.routing.tenant_line import NUM_TRIED, PRIOR_S, RATE_WINDOW_S, OnTurn, TenantLine, Ticket

SOONEST_LOOK_S, LATEST_LOOK_S = 0.001, 0.009
"""How long news of replicas are collected before the line is looked at; each time it is drawn between the two.  All
frontends get the same news at the same moment, and what one sends the others know some 1 ms later.  Without the draw
they would all send to the same replica."""
HEARTBEAT_S = 0.05
"""How often the line is looked at without news: what is a good choice changes while a request waits."""
IN_TIME = 0.9
"""Who is predicted to get the first token later than in this share of `slo.ttft_ms` counts as late.  Clients count the
way to the frontend and back as well, and a prediction is off by a few per cent."""
LATE_FILL = 0.5
"""How much of ``limits.max_ttft_ms`` those may wait who are late from the beginning.  The rest is for those who turn
out to be late: they have waited already, and would be refused after that."""
CREDIT = 4
"""How many of its requests in a row a tenant that has used less than its part may have before others.  Beside a flood
the 95th percentile of its TTFT was 16 to 18 % shorter than without (docs/benchmarks/2026-11-29-tenants.md)."""
LEVELS_OF_CLASS = 16
"""Of these levels each class has so many in an engine's queue (`WaitingLine.level`)."""
LONGEST_RETRY_S = 60.0


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
        self._certain_s = IN_TIME * self._ttft_s
        """By when a first token has to be predicted where late ones are passed: earlier once more, else half of a line
        of that length would miss its time by a little."""
        self._later = later
        self._clock = router.clock
        self.orders = [FairOrder(self._new_flow) for _ in ("again", *SERVICE_CLASSES)]
        """Those that have been served before, and the classes, the highest first."""
        self._work_s = 0.0
        self._num_turns = 0
        self._will_look = self._will_beat = False
        self._served_s = self._passed_s = 0.0
        self._rated_at = self._sorted_at = self._clock()
        self.preemption = Preemption(router)
        router.on_change(self.on_news)

    def join(
        self,
        request: GenerateRequest,
        hints: RoutingHints,
        lost: Collection[str],
        arrived_at: float,
        on_turn: OnTurn,
        on_error: Callable[[BatonError], object],
        *,
        was_served: bool = False,
        was_preempted: bool = False,
    ) -> Ticket | None:
        """Call `on_turn` once it is the request's turn, which may be at once; then this returns None.

        `on_turn` gets the decision; from then on the sequence counts as in flight.  `on_error` is called instead if
        the request is refused while it waits.  If it was served before, and lost its replica, it goes before all others
        and takes nothing of its tenant's part again.  If it was preempted, it takes nothing again either, and goes
        before the others of its tenant and class.  Raises Overloaded if it is refused at once, and whatever
        `Router.decide` raises.
        """
        waited_s = self._clock() - arrived_at
        rank = 0 if was_served else 1 + SERVICE_CLASSES.index(hints.service_class)
        choice = self._router.decide(request, hints, lost, waited_s=waited_s, waiting_tokens=self.queued_tokens)
        if isinstance(choice, Wait):
            alone_s, lacks = choice.alone_s, choice.lacks
        elif self.num_waiting and any(order.num_waiting for order in self.orders[: rank + 1]):
            alone_s, lacks = choice.way.alone_s, self.lacks
        else:
            if self.num_waiting:
                self._rate(choice.way.alone_s)
            on_turn(choice, self._router.begin(request, choice))
            return None
        if not self.num_waiting:
            self._rated_at = self._clock()
        tokens = len(request.prompt_token_ids) + self._expected_output(request)
        flow = self.orders[rank].flow("" if was_served else hints.tenant, CREDIT * tokens / hints.weight)
        ticket = Ticket(request, hints, lost, arrived_at, on_turn, on_error, alone_s, rank, flow, tokens, was_preempted)
        self._admit(ticket)
        self.lacks = self.lacks or lacks
        self.on_news()
        self._beat()
        return ticket

    def level(self, hints: RoutingHints, *, is_again: bool = False) -> int:
        """Return the priority of a prompt in a prefill engine's queue: less goes first.

        It goes by the class, and is the higher the more of its tenant wait, if others do too and it `is_again` not one
        that was served before.  So it goes before those that this frontend or another one has sent from a long line.
        """
        rank = SERVICE_CLASSES.index(hints.service_class)
        order = self.orders[1 + rank]
        flow = order.flows.get(hints.tenant) if len(order.flows) > 1 and not is_again else None
        backlog = flow.num_waiting.bit_length() if flow is not None else 0
        return (rank - SERVICE_CLASSES.index("default")) * LEVELS_OF_CLASS + min(backlog, LEVELS_OF_CLASS - 1)

    def _new_flow(self, tenant: str) -> TenantLine:
        return TenantLine(tenant, self._num_turns)

    def _expected_output(self, request: GenerateRequest) -> float:
        """Return how many tokens a request is expected to get: what is usual now, or what it allows if that is less.

        What it allows alone says little, as most clients leave it at what the model can do.  Each counts as much as a
        token of the prompt: tenants are billed and limited in tokens, and how much more work one is than the other
        depends on the model, the batch and the length of the prompt.
        """
        told = [state.load.output_tokens for state in self._router.pools["decode"].replicas.values()]
        usual = sum(told) / len(told) if told else 0.0
        allowed = request.sampling.get("max_tokens")
        return usual if allowed is None else min(usual, allowed)

    def _admit(self, ticket: Ticket) -> None:
        """Let a request wait.  Raises Overloaded if its turn is predicted to be too late."""
        has_time_for_all = self._excess_s(ticket, self.predicted_wait_s()) <= 0
        if not has_time_for_all and (excess_s := self._excess_s(ticket, self._turn_in_s(ticket))) > 0:
            raise Overloaded(min(LONGEST_RETRY_S, excess_s))
        flow = ticket.flow
        if ticket.was_preempted:
            flow.preempted.append(ticket)
        elif ticket.rank and flow.passes_late and (lateness_s := self._lateness_s(ticket)) > 0:
            self._admit_late(ticket, lateness_s)
        else:
            flow.in_time.append(ticket)
        self._count(ticket, 1)
        if not has_time_for_all:
            self._make_room(ticket)

    def _lateness_s(self, ticket: Ticket) -> float:
        """Return by how much a request that joins is predicted to miss the time within which it is surely not late."""
        return self._clock() - ticket.arrived_at + self._turn_in_s(ticket) + ticket.alone_s - self._certain_s

    def _admit_late(self, ticket: Ticket, lateness_s: float) -> None:
        """Let a request wait among those who are late, as it will be.

        Raises Overloaded if it would wait longer than allowed there.  It may come again when it would be in time, or
        when there is time for it among the late, whichever is sooner.
        """
        wait_s = self._late_turn_in_s(ticket)
        if (excess_s := self._excess_s(ticket, wait_s) + (1 - LATE_FILL) * self._max_ttft_s) > 0:
            raise Overloaded(min(LONGEST_RETRY_S, lateness_s, excess_s))
        self._append_late(ticket)

    def _append_late(self, ticket: Ticket) -> None:
        ticket.is_late = True
        ticket.flow.late_s += ticket.alone_s
        ticket.flow.late.append(ticket)

    def _make_room(self, newcomer: Ticket) -> None:
        """Refuse those who will be too late now that another one goes before them, from the end of each class on."""
        for order in self.orders[newcomer.rank :]:
            while (flow := order.last()) is not None and (last := flow.last()) is not newcomer:
                is_passed = last.is_late and flow.passes_late
                wait_s = self._late_turn_in_s(last) if is_passed else self._turn_in_s(last, is_counted=True)
                if not self._refuse(last, wait_s):
                    break

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

    def tickets(self) -> Iterator[Ticket]:
        """Return all that wait."""
        return (ticket for order in self.orders for flow in order.flows.values() for ticket in flow.tickets())

    def _count(self, ticket: Ticket, number: int) -> None:
        self.num_waiting += number
        self.queued_tokens += number * ticket.num_tokens
        self._work_s = max(0.0, self._work_s + number * ticket.alone_s)
        ticket.flow.work_s = max(0.0, ticket.flow.work_s + number * ticket.alone_s)
        ticket.flow.num_preempted += number * ticket.was_preempted
        if ticket.is_late and number < 0:
            ticket.flow.late_s = max(0.0, ticket.flow.late_s - ticket.alone_s)
        if ticket.flow.num_waiting + number == 0:
            ticket.flow.forget_late()
        self.orders[ticket.rank].count(ticket.flow, number, ticket.cost)
        if not self.num_waiting:
            self.lacks = ""

    def _look(self) -> None:
        self._will_look = False
        self._rate(0.0)
        if (now := self._clock()) - self._sorted_at >= HEARTBEAT_S:  # who is not in front is refused in time too
            self._sorted_at = now
            for flow in [flow for order in self.orders for flow in order.flows.values()]:
                self._sort_out(flow)
        while self.num_waiting and self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Serve one of those in front.  Returns whether one was served, refused or let others pass."""
        again, *classes = self.orders
        highest = next((order for order in classes if order.num_waiting), None)
        is_first = True
        for flow in again.first(1) + (highest.first(NUM_TRIED) if highest is not None else []):
            self._sort_out(flow)
            if not flow.num_waiting:
                return True
            for ticket in flow.front():
                if self._try(ticket, is_first=is_first):
                    return True
                is_first = False
        return False

    def _sort_out(self, flow: TenantLine) -> None:
        """Forget those in front who have left, take those who cannot be in time to the others of that kind, and refuse
        those who are too late altogether.
        """
        now, in_time, late = self._clock(), flow.in_time, flow.late
        while flow.preempted and flow.preempted[0].has_left:
            flow.preempted.popleft()
        while in_time:
            first = in_time[0]
            if not first.has_left and now - first.arrived_at + first.alone_s <= self._ttft_s:
                break
            in_time.popleft()
            if not first.has_left:
                self._let_others_pass(first)
        while late and (late[0].has_left or self._refuse(late[0], 0.0)):
            late.popleft()

    def _let_others_pass(self, ticket: Ticket) -> None:
        """Take one that cannot be in time to the others of that kind, or refuse it."""
        wait_s = self._late_turn_in_s(ticket) if ticket.flow.passes_late else self._turn_in_s(ticket)
        if not self._refuse(ticket, wait_s):
            self._append_late(ticket)

    def _refuse(self, ticket: Ticket, wait_s: float) -> bool:
        """Refuse a request that will be too late even for `max_ttft_ms` if its turn is in `wait_s` seconds."""
        excess_s = self._excess_s(ticket, wait_s)
        if excess_s <= 0:
            return False
        self.leave(ticket)
        ticket.on_error(Overloaded(min(LONGEST_RETRY_S, excess_s)))
        return True

    def _try(self, ticket: Ticket, *, is_first: bool) -> bool:
        waited_s = self._clock() - ticket.arrived_at
        try:
            # Who is first, and waits alone of its tenant, is not kept out of an engine whose queue it will pass.
            overtakes = is_first and ticket.flow.num_waiting == 1 < self.num_waiting
            choice, victims = self._choose(ticket, waited_s, overtakes=overtakes)
        except BatonError as error:
            self.leave(ticket)
            ticket.on_error(error)
            return True
        if isinstance(choice, Wait):
            if is_first:
                self.lacks = choice.lacks
            return False
        if not (ticket.is_late or ticket.was_preempted) and waited_s + choice.predicted_ttft_s > self._ttft_s:
            ticket.flow.in_time.remove(ticket)
            self._let_others_pass(ticket)
            return True
        self.preemption.preempt(victims)
        charged = 0.0 if ticket.was_preempted else max(0.0, ticket.tokens - choice.expected_cached_tokens)
        self.orders[ticket.rank].charge(ticket.flow, charged / ticket.hints.weight)
        self.leave(ticket)
        self._num_turns += 1
        ticket.flow.count_turn(ticket)
        self._rate(ticket.alone_s)
        ticket.on_turn(choice, self._router.begin(ticket.request, choice))
        return True

    def _choose(self, ticket: Ticket, waited_s: float, *, overtakes: bool) -> tuple[Decision | Wait, Sequence[Running]]:
        """Return the router's decision, and who is to give way for it."""
        others = self.queued_tokens - ticket.num_tokens
        decide = partial(
            self._router.decide,
            ticket.request,
            ticket.hints,
            ticket.lost,
            waited_s=waited_s,
            waiting_tokens=others,
            overtakes=overtakes,
        )
        choice, now = decide(), self._clock()
        may_preempt = ticket.hints.service_class != PREEMPTED and ticket.may_preempt_at <= now
        if not (isinstance(choice, Wait) and choice.lacks == "decode" and may_preempt):
            return choice, ()
        if not (candidates := self.preemption.candidates()):
            return choice, ()
        ticket.may_preempt_at = now + HEARTBEAT_S
        return self.preemption.plan(candidates, ticket.num_tokens, decide) or (choice, ())

    def _rate(self, served_s: float) -> None:
        """Take note that work of `served_s` seconds was served, and of the time that has passed meanwhile."""
        now = self._clock()
        passed_s, self._rated_at = now - self._rated_at, now
        kept = math.exp(-passed_s / RATE_WINDOW_S)
        self._served_s = self._served_s * kept + served_s
        self._passed_s = self._passed_s * kept + passed_s

    def predicted_wait_s(self) -> float:
        """Predict how long a request that joins now waits for its turn, if that is after all others'."""
        return self._work_s / speed if (speed := self._speed()) else 0.0

    def _turn_in_s(self, ticket: Ticket, *, is_counted: bool = False) -> float:
        """Predict how long a request waits for its turn as the last one of its tenant that is in time.

        `is_counted` says that it is that already, so that its own work is not before it.
        """
        order, flow = self.orders[ticket.rank], ticket.flow
        work_s = sum(order.share_before(flow, other) * other.work_s for other in order.flows.values())
        work_s += self._higher_work_s(ticket)
        work_s -= ticket.alone_s if is_counted else 0.0
        if flow.passes_late:
            work_s -= flow.late_s
        return work_s / speed if (speed := self._speed()) else 0.0

    def _late_turn_in_s(self, ticket: Ticket) -> float:
        """Predict how long a request waits for its turn as the last one of its tenant that is late, if the others pass.

        Of other tenants of its class it is taken that they have as much weight.
        """
        flow = ticket.flow
        num_sharing = sum(other.num_waiting > 0 for other in self.orders[ticket.rank].flows.values())
        work_s = num_sharing * flow.late_s / flow.late_share + self._higher_work_s(ticket)
        return work_s / speed if (speed := self._speed()) else 0.0

    def _higher_work_s(self, ticket: Ticket) -> float:
        """Return the work of all whose class goes before that of a request."""
        return sum(other.work_s for higher in self.orders[: ticket.rank] for other in higher.flows.values())

    def _speed(self) -> float:
        """Return how many seconds of work the line has served in each second in which somebody waited.

        It is the mean over RATE_WINDOW_S such seconds.  At first it is taken that each replica computes prompts all the
        time, and that counts as much as PRIOR_S seconds.
        """
        pools = self._router.pools
        most = len(pools["prefill" if "prefill" in pools else "decode"].replicas)
        return (self._served_s + most * PRIOR_S) / (self._passed_s + PRIOR_S)

    def _excess_s(self, ticket: Ticket, wait_s: float) -> float:
        """Return by how much a request will be later than `max_ttft_ms` allows if its turn is in `wait_s` seconds."""
        if ticket.was_preempted:
            return -math.inf
        waited_s = self._clock() - ticket.arrived_at
        return waited_s + wait_s + ticket.alone_s - self._max_ttft_s
