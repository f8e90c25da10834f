"""Decides which replicas serve a sequence and where its prompt is prefilled, without Ray and without I/O.

1. Hash the prompt's blocks and look up how much of the prompt each replica has cached (app/routing/prefix_index.py).
2. In each pool that could take part, leave out replicas that cannot (gone, ejected, without a usable link) and
   score the rest (app/routing/scores.py).
3. Predict for each way to serve it (app/routing/survey.py) when its tokens would come (app/routing/times.py), and
   whether the replicas have room within the model's `slo` (app/routing/capacity.py).
4. Choose a way (app/routing/placement.py), or wait in the frontend (app/routing/waiting_line.py).
5. While the sequence runs, its work counts as load (app/routing/in_flight.py).  The predictor learns from its time.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from app.messages import GenerateRequest
from app.routing.decision import Candidate, Decision, RoutingHints, Wait
from app.routing.in_flight import InFlight
from app.routing.placement import Prospect, place
from app.routing.state import RouterState
from app.routing.survey import Survey

NO_HINTS = RoutingHints()


class Router(RouterState):
    """The router of one model in one frontend."""

    def decide(
        self,
        request: GenerateRequest,
        hints: RoutingHints = NO_HINTS,
        lost: Collection[str] = (),
        *,
        waited_s: float = 0.0,
        waiting_tokens: int = 0,
        overtakes: bool = False,
    ) -> Decision | Wait:
        """Choose, without sending anything.  `lost` are replicas that this request must not try again.

        It has waited for `waited_s` seconds in this frontend, where other prompts of `waiting_tokens` tokens wait too.
        `overtakes` says that prefill engines which know an order compute its prompt before others that wait there.

        Raises NoReplica, and InvalidRequest for a local prefill that no replica is capable of.
        """
        begin = time.perf_counter()
        survey = Survey(self, request, hints, lost, overtakes=overtakes)
        only = survey.only_way()
        if only is not None:
            ways = [only[0]]
            choice = None if only[0].lacks else only
        else:
            ways = survey.ways()
            prospect = Prospect(len(request.prompt_token_ids), waited_s, waiting_tokens)
            choice = place(self.config.placement, self.slo, prospect, ways)
        if choice is None:
            quickest = min(ways, key=lambda way: way.alone_s)
            # A local way that lacks budget says nothing of what is short: more prefill or more decode would help it.
            short = next((way.lacks for way in ways if way.kind == "remote" and way.lacks), quickest.lacks)
            return Wait(quickest.alone_s, short or "prefill")
        way, reason = choice
        chosen = {way.serving.replica, way.prefill.replica if way.prefill else ""}
        return Decision(
            way=way,
            reason=reason,
            ways=ways if hints.explain else [],
            others=survey.others(chosen) if hints.explain else {},
            decided_in_s=time.perf_counter() - begin,
            waited_s=waited_s,
        )

    def receiver(
        self, request: GenerateRequest, hints: RoutingHints, lost: Collection[str], decision: Decision
    ) -> Candidate:
        """Return which replica is to decode a sequence whose remote prefill is nearly done.

        It is the one that was chosen before unless another one has become better, as things change meanwhile.  The
        sequence must not count on any decode replica meanwhile.
        """
        assert decision.prefill is not None
        best = Survey(self, request, hints, lost).receiver_of(decision.prefill.replica, decision.serving.replica)
        return best or decision.serving

    def begin(self, request: GenerateRequest, decision: Decision) -> InFlight:
        """Count a sequence that is sent to the replicas of `decision`."""
        return InFlight(self, request, decision)
