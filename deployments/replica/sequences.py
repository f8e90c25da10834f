"""The sequences that run on a replica, whatever its role: each comes on a channel, and its tokens go back there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from app.autoscaling.load import LoadMeter
from app.channel.protocol import Submit
from app.channel.server import FrontendChannel
from app.engines.base import Engine
from app.messages import PrefillReport, TokenDelta, TransferDescriptor
from app.recent_load import RecentLoad

Phase = Literal["prefilling", "promised", "waiting", "decoding"]
"""How far a sequence is.  *prefilling*: its prompt is being computed here.  *promised*: its descriptor is here, but
another replica is still computing its prompt (SGLang).  *waiting*: its prompt was computed on another replica, and it
waits for a slot or for its KV, even if prefill sampled its first token.  *decoding*: it gets a token with each step."""


class Sequences:
    """Runs sequences on the engine, and counts them by phase."""

    def __init__(self, engine: Engine, meter: LoadMeter, recent: RecentLoad) -> None:
        self.phases: Counter[Phase] = Counter()
        self.generated_tokens = 0
        """All tokens so far, without the first of each sequence."""
        self.running_tokens = 0
        """Those of them that belong to sequences which run."""
        self.prompt_tokens = 0
        """The prompts' tokens of the sequences which run."""
        self.on_change: Callable[[], object] = lambda: None
        """Called when a sequence has come to another phase."""
        self.transport_from: Callable[[str], str] = lambda prefill_replica: ""
        """Returns what carries KV from a prefill replica; "" if that is not known."""
        self._engine = engine
        self._meter = meter
        self._recent = recent

    async def run(
        self, channel: FrontendChannel, call: Submit, descriptor: TransferDescriptor | None, reason: str
    ) -> None:
        """Run a sequence to its end, with the KV of `descriptor`, or without one because of `reason`.

        Raises what `Engine.generate` raises.
        """
        phase = _first_phase(descriptor)
        began_at = time.time()
        first_at: float | None = None
        num_tokens = 0

        def emit(delta: TokenDelta) -> None:
            nonlocal phase, first_at, num_tokens
            if (report := delta.report) is not None:
                delta = msgspec.structs.replace(delta, report=self._complete(report, reason, descriptor, began_at))
            if first_at is None:
                first_at = time.monotonic()
            else:
                num_new = len(delta.token_ids)
                num_tokens += num_new
                self.generated_tokens += num_new
                self.running_tokens += num_new
            if phase != "decoding" and (report is None or report.is_complete):
                if phase in ("waiting", "promised"):
                    self._meter.count(started=1)
                self.phases[phase] -= 1
                phase = "decoding"
                self.phases[phase] += 1
                self.on_change()
            channel.put(call.number, delta)

        self.phases[phase] += 1
        self.prompt_tokens += len(call.request.prompt_token_ids)
        self.on_change()
        try:
            await self._engine.generate(call.request, descriptor, emit)
        finally:
            self.phases[phase] -= 1
            self.running_tokens -= num_tokens
            self.prompt_tokens -= len(call.request.prompt_token_ids)
        if first_at is not None:
            self._recent.on_sequence_end(time.monotonic() - first_at, num_tokens + 1)

    def _complete(
        self, report: PrefillReport, reason: str, descriptor: TransferDescriptor | None, began_at: float
    ) -> PrefillReport:
        """Add to `report` what the engine cannot know.

        That is why the prompt was prefilled here, how long prefill took, the hop's phases, and what a probe found to
        carry KV from that prefill replica.  `began_at` is when the engine got the sequence, in Unix time.
        """
        changed: dict[str, Any] = {"reason": reason} if reason else {}
        if report.transferred_tokens and (transport := self.transport_from(report.prefill_replica or "")):
            changed["transport"] = transport
        if descriptor is not None and report.kind == "remote":
            of_engine = report.phases
            if report.is_complete and not of_engine and descriptor.prefill_s is None:
                of_engine = {"engine": time.time() - began_at}
            changed["phases"] = {**descriptor.phases, "delivery": began_at - descriptor.ready_at, **of_engine}
            if descriptor.prefill_s is not None:
                changed |= {"prefill_s": descriptor.prefill_s, "prefill_cached_tokens": descriptor.cached_tokens}
        return msgspec.structs.replace(report, **changed)


def _first_phase(descriptor: TransferDescriptor | None) -> Phase:
    if descriptor is None:
        return "prefilling"
    return "promised" if descriptor.prefill_s is None else "waiting"
