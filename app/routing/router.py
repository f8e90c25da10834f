"""Decides which replicas serve a sequence and where its prompt is prefilled, without Ray and without I/O.

1. Hash the prompt's blocks and look up how much of the prompt each replica has cached (app/routing/prefix_index.py).
2. In each pool that could take part, leave out replicas that cannot (gone, lately failed, full, without a usable link)
   and score the rest (app/routing/scores.py).
3. Predict the TTFT of a local and of a remote prefill (app/routing/ttft.py) and choose (app/routing/placement.py).
4. While the sequence runs, its work counts as load (app/routing/in_flight.py).  The predictor learns from its time.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from app.messages import GenerateRequest, Role
from app.routing.decision import Decision, RoutingHints
from app.routing.in_flight import InFlight
from app.routing.state import RouterState
from app.routing.survey import Survey

NO_HINTS = RoutingHints()


class Router(RouterState):
    """The router of one model in one frontend."""

    def decide(self, request: GenerateRequest, hints: RoutingHints = NO_HINTS, lost: Collection[str] = ()) -> Decision:
        """Choose, without sending anything.  `lost` are replicas that this request must not try again.

        Raises NoReplica, Overloaded, and InvalidRequest for a local prefill that no replica is capable of.
        """
        begin = time.perf_counter()
        survey = Survey(self, request, hints, lost)
        predicted = survey.predict()
        kind, reason = survey.place(predicted)
        role: Role = "decode"
        prefill = None
        if kind == "remote":
            prefill = survey.demand("prefill")
            serving = survey.receiver(prefill)
        else:
            role = survey.local_role or role
            serving = survey.demand(role)
        return Decision(
            kind=kind,
            reason=reason,
            serving=serving.candidate(),
            serving_role=role,
            prefill=prefill.candidate() if prefill else None,
            predicted=predicted,
            others=survey.others({serving.replica, prefill.replica if prefill else ""}) if hints.explain else {},
            decided_in_s=time.perf_counter() - begin,
        )

    def begin(self, request: GenerateRequest, decision: Decision) -> InFlight:
        """Count a sequence that is sent to the replicas of `decision`."""
        return InFlight(self.pools, self.predictor, self.topology, request, decision)
