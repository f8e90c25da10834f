"""A sequence that runs.  It counts as load on its replicas, and the router learns from the time that it took."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from app.messages import GenerateRequest, PrefillReport, Role
from app.routing.decision import Decision
from app.routing.pool_state import PoolState
from app.routing.topology import Topology
from app.routing.ttft import HandoverWork, PromptWork, TtftPredictor


class InFlight:
    """One running sequence.  Call `first_token` when that token has come, and `end` in any case."""

    def __init__(
        self,
        pools: Mapping[Role, PoolState],
        predictor: TtftPredictor,
        topology: Topology,
        request: GenerateRequest,
        decision: Decision,
    ) -> None:
        self._predictor = predictor
        self._topology = topology
        self._decision = decision
        self._num_tokens = len(request.prompt_token_ids)
        # A replica may have gone since the decision; whoever calls it finds out.
        self._serving = pools[decision.serving_role].replicas.get(decision.serving.replica)
        self._prefill = pools["prefill"].replicas.get(decision.prefill.replica) if decision.prefill else None
        self._num_decoding = self._serving.decoding.value if self._serving else 0
        self._until_first = ExitStack()
        self._until_end = ExitStack()
        self._count()
        pools[decision.serving_role].assume(decision.serving.replica, request)
        if decision.prefill is not None:
            pools["prefill"].assume(decision.prefill.replica, request)

    def _count(self) -> None:
        serving, prefill, decision = self._serving, self._prefill, self._decision
        uncached = self._num_tokens - (decision.prefill or decision.serving).cached_tokens
        if prefill is not None:
            self._until_first.enter_context(prefill.sequences.counting(1))
        if (prefills := prefill if decision.prefill else serving) is not None:
            self._until_first.enter_context(prefills.queued_tokens.counting(uncached))
        if serving is not None:
            num_blocks = serving.num_blocks(self._num_tokens - decision.serving.cached_tokens)
            self._until_end.enter_context(serving.sequences.counting(1))
            self._until_end.enter_context(serving.used_blocks.counting(num_blocks))

    def first_token(self, report: PrefillReport | None, ttft_s: float) -> None:
        """Take note that the first token came `ttft_s` seconds after the sequence was sent.

        `report` says how the prompt was prefilled.
        """
        self._until_first.close()
        if self._serving is not None:
            self._until_end.enter_context(self._serving.decoding.counting(1))
        if report is not None and report.kind == self._decision.kind:
            self._learn(report, ttft_s)
        # Otherwise decode fell back on a prefill of its own, and the time tells nothing of a local or remote prefill.

    def _learn(self, report: PrefillReport, ttft_s: float) -> None:
        decision = self._decision
        cached = report.cached_tokens if report.prefill_cached_tokens is None else report.prefill_cached_tokens
        queued = (decision.prefill or decision.serving).queued_tokens
        work = PromptWork(self._num_tokens, cached, queued, self._num_decoding)
        if decision.kind == "local":
            self._predictor.learn_local(work, ttft_s)
            return
        waiting = decision.serving.queued_tokens
        moved = report.transferred_tokens
        if moved is None:  # the first token did not wait for the KV, and so the fit is to learn that it costs nothing
            moved = self._num_tokens - decision.serving.cached_tokens
        handover = HandoverWork.after(work, moved, self._num_decoding, waiting)
        slowness = self._predictor.learn_remote(work, handover, ttft_s, report.prefill_s)
        if slowness is not None and self._prefill is not None and self._serving is not None:
            self._topology.learn(self._prefill.info.node_ip, self._serving.info.node_ip, slowness)

    def end(self) -> None:
        """Stop counting the sequence, however it ended."""
        self._until_first.close()
        self._until_end.close()
