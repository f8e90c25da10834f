"""A sequence that runs.  It counts as load on its replicas, and the router learns from the time that it took."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from app.messages import GenerateRequest, PrefillReport
from app.observers import observing, tell
from app.routing.decision import Candidate, Decision
from app.routing.state import RouterState
from app.routing.times import PromptTimes


class InFlight:
    """One running sequence.  Call `first_token` when that token has come, and `end` in any case."""

    def __init__(self, state: RouterState, request: GenerateRequest, decision: Decision) -> None:
        self._state = state
        self._request = request
        self._decision = decision
        self.num_tokens = len(request.prompt_token_ids)
        self.began_at = state.clock()
        # A replica may have gone since the decision; whoever calls it finds out.
        self._prefill = state.by_role.find(decision.prefill.replica) if decision.prefill else None
        serving = state.by_role.find(decision.serving.replica)
        self._computing = self._prefill if decision.prefill else serving
        self._queue_s = self._computing.queue_s if self._computing else 0.0
        self._until_first = ExitStack()
        self._until_end = ExitStack()
        self._count_prompt((decision.prefill or decision.serving).cached_tokens)
        self.move(decision.serving)

    def _count_prompt(self, cached_tokens: int) -> None:
        decision, computing = self._decision, self._computing
        if computing is not None:
            compute_s = computing.pace.compute_s(self.num_tokens, cached_tokens)
            self._until_first.enter_context(computing.queued_tokens.counting(self.num_tokens - cached_tokens))
            self._until_first.enter_context(computing.compute_s.counting(compute_s))
        if self._prefill is not None:
            self._until_first.enter_context(self._prefill.sequences.counting(1))
        if decision.prefill is not None:
            tell(self._state.by_role.assume, decision.prefill.replica, self._request)

    def move(self, serving: Candidate) -> None:
        """Count the sequence on this replica, and no longer on the one that was to decode it before."""
        self._until_end.close()
        self.serving = serving
        prefill = self._decision.prefill.replica if self._decision.prefill else None
        self._until_end.enter_context(self._state.ejections.trying(prefill, serving.replica))
        self._serving = self._state.by_role.find(serving.replica)
        tell(self._state.by_role.assume, serving.replica, self._request)
        if (state := self._serving) is None:
            return
        self._until_end.enter_context(state.sequences.counting(1))
        self._until_end.enter_context(state.kv_tokens.counting(self.num_tokens))
        num_blocks = state.num_blocks(self.num_tokens - serving.cached_tokens)
        self._until_end.enter_context(state.used_blocks.counting(num_blocks))
        if self._decision.serving_role == "prefill":  # there `sequences` counts prompts for others as well
            self._until_end.enter_context(state.decoding.counting(1))

    def choose_again(self, choose: Callable[[], Candidate]) -> None:
        """Have another replica of its pool decode the sequence if `choose` returns one.

        While `choose` looks at the replicas, the sequence counts on none of them.
        """
        self._until_end.close()
        self.move(choose())

    def first_token(self, report: PrefillReport | None, ttft_s: float) -> None:
        """Take note that the first token came `ttft_s` seconds after the sequence was sent.

        `report` says how the prompt was prefilled.
        """
        self._until_first.close()
        if self._serving is not None and self._decision.serving_role != "prefill":
            self._until_end.enter_context(self._serving.decoding.counting(1))
        if report is not None and report.kind == self._decision.kind:
            self._learn(report, ttft_s)
        # Otherwise decode fell back on a prefill of its own, and the time tells nothing of a local or remote prefill.

    @observing
    def _learn(self, report: PrefillReport, ttft_s: float) -> None:
        computing, predictor = self._computing, self._state.predictor
        if computing is None:
            return
        cached = report.cached_tokens if report.prefill_cached_tokens is None else report.prefill_cached_tokens
        expected = PromptTimes(self._queue_s, computing.pace.prompt_s(self.num_tokens, cached))
        if self._decision.kind == "local":
            predictor.learn_local(expected, ttft_s)
            return
        if self._prefill is not None and report.prefill_s is not None:
            self._prefill.prompt_slowness.learn(expected.total_s, report.prefill_s)
        num_moved = report.transferred_tokens or self.num_tokens - self.serving.cached_tokens
        waited_for_kv = report.transferred_tokens is not None
        slowness = predictor.learn_remote(expected, ttft_s, report.prefill_s, num_moved, waited_for_kv=waited_for_kv)
        if waited_for_kv:
            self._learn_topology(slowness)

    @observing
    def pulled(self, num_moved: int, transfer_s: float) -> None:
        """Take note that the KV of `num_moved` tokens took `transfer_s` after the first token, which did not wait."""
        self._learn_topology(self._state.predictor.learn_pull(num_moved, transfer_s))

    def _learn_topology(self, slowness: float | None) -> None:
        if slowness is not None and self._prefill is not None and self._serving is not None:
            self._state.topology.learn(self._prefill.info.node_ip, self._serving.info.node_ip, slowness)

    def end(self) -> None:
        """Stop counting the sequence, however it ended."""
        self._until_first.close()
        self._until_end.close()
