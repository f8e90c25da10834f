"""From what a deployment's replicas capacity to how many there shall be, and why.

1. Each demand looks at one thing that can run short and says how many replicas it takes to keep it under its target.
   All are sums over replicas, so that a load asks for as much on whatever number of them it runs.
2. The largest demand counts.
3. `settle` gives up replicas only if the rest would be well under every target, and not on the word of some.

Serve does the rest by the user's AutoscalingConfig: means over `look_back_period_s`, delays, factors, bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from app.autoscaling.load import Load, total

MAX_BUSY, MIN_BUSY = 0.8, 0.5
"""The share of the time that a replica shall at most compute prompts.  A prompt waits on average
own time * busy / (1 - busy) where prompts come at random (M/M/1), so with 0.8 four times its own; long prompts leave
less of their target for waiting, but half of a replica is to be used whatever the target is."""
MAX_KV_USE = 0.85
"""The share of the KV memory that shall at most be taken: at 100 % an engine preempts sequences, which computes their
KV a second time, and what runs grows by a token each step."""
MIN_BATCH = 8
"""Fewer sequences on each replica do not make steps shorter: reading the weights takes 4.9 ms of the 5.0 ms that a step
of 8 short sequences takes (app/engines/sim/profiles/h200-llama-8b.yaml)."""
FADE_S = 300.0
"""After so long a replica is believed half as fast as it was seen to be: short prompts, and sequences without a place,
make it look slow, and more replicas than are needed cost more than one that is added a little later."""
SPARE = 0.85
"""Replicas are given up only if the rest would be below this share of every target."""


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool is to keep."""

    ttft_s: float
    itl_s: float
    sequences: float | None = None
    """On each replica, if the user has set `target_ongoing_requests`."""
    is_for_prompts: bool
    """Whether prompts are computed here first of all.  A decode pool beside a prefill pool computes what its frontends
    rather do not send there; it grows for that only where the TTFT suffers, as more of prefill takes it away again."""


class SeenCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica of a pool was seen to do; 0 if it never was."""

    tokens_per_s: float = 0.0
    """Prompt tokens that it computes while it has any."""
    prompt_tokens: float = 0.0
    """Of a typical prompt, those that have to be computed."""
    slots: float = 0.0
    """Sequences that decode at once on it."""

    @property
    def prompt_s(self) -> float:
        """What a typical prompt takes by itself."""
        return self.prompt_tokens / self.tokens_per_s if self.tokens_per_s else 0.0


class Replicas(msgspec.Struct, frozen=True, kw_only=True):
    """Those of a deployment: to how many it is on the way, how many run, and how many of them have reported."""

    target: int
    running: int
    reporting: int


class Demand(msgspec.Struct, frozen=True):
    """So many replicas, and why."""

    replicas: float
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """How many replicas there shall be: Serve rounds up, and applies its bounds and delays."""

    replicas: float
    reason: str
    signals: dict[str, float]


NOTHING = Demand(0.0, "nothing to do")


def plan_frontend(requests: float, target_requests: float, replicas: Replicas) -> Plan:
    """The frontends, by the requests that they hold."""
    reason = f"{_count(requests, 'request')} in flight, {target_requests:g} per replica are the target"
    demand = Demand(requests / target_requests, reason) if requests else NOTHING
    return settle(demand, replicas, {"requests": requests})


def plan_pool(loads: Sequence[Load], capacity: SeenCapacity, targets: Targets, replicas: Replicas) -> Plan:
    """One pool of engines, by the loads of its replicas that reported."""
    load = total(loads)
    demands = (
        ttft_demand(load, capacity, targets, replicas.running),
        busy_demand(load, capacity, targets, replicas.running),
        slot_demand(loads, capacity),
        kv_demand(load, replicas.running),
        itl_demand(loads, targets),
        sequence_demand(load, targets),
    )
    signals = {
        "queued_tokens": load.queued_tokens,
        "busy": load.busy,
        "tokens_per_s": capacity.tokens_per_s,
        "predicted_ttft_s": predict_ttft_s(load, capacity, replicas.running),
        "prefilling": load.prefilling,
        "waiting": load.waiting,
        "decoding": load.decoding,
        "itl_s": _ratio(load.decoding, load.generated_tokens),
        "kv_use": load.kv_use,
    }
    return settle(max(demands, key=lambda demand: demand.replicas), replicas, signals)


def measure(loads: Sequence[Load], before: SeenCapacity, targets: Targets, passed_s: float) -> SeenCapacity:
    """What a replica can do, by what they did, and by what was known `passed_s` ago where that shows more."""
    load = total(loads)
    known = msgspec.structs.replace(before, tokens_per_s=before.tokens_per_s * 0.5 ** (passed_s / FADE_S))
    if load.computed_tokens and load.prompts and load.busy:
        known = msgspec.structs.replace(
            known,
            tokens_per_s=max(load.computed_tokens / load.busy, known.tokens_per_s),
            prompt_tokens=load.computed_tokens / load.prompts,
        )
    seen = max((one.decoding for one in loads), default=0.0)  # not the mean: a new replica fills up only
    in_line = count_in_line(loads, known)
    is_full = in_line >= 1 and in_line > targets.ttft_s * (load.prompts + load.started)  # Little's law
    if seen and is_full:
        return msgspec.structs.replace(known, slots=seen)
    return msgspec.structs.replace(known, slots=max(seen, known.slots) if known.slots else 0.0)


def count_in_line(loads: Sequence[Load], capacity: SeenCapacity) -> float:
    """How many sequences wait for a slot: those that neither transfers nor the prompts before them explain."""
    return sum(
        max(0.0, load.prefilling - load.prompts * predict_ttft_s(load, capacity, 1))  # Little's law
        + max(0.0, load.waiting - load.transferring)
        for load in loads
    )


def predict_ttft_s(load: Load, capacity: SeenCapacity, running: int) -> float:
    """What a typical prompt waits that arrives now: for all that is before it, and for itself."""
    return _ratio(load.queued_tokens, capacity.tokens_per_s * max(running, 1)) + capacity.prompt_s


def ttft_demand(load: Load, capacity: SeenCapacity, targets: Targets, running: int) -> Demand:
    """So many that what waits is computed within what the typical prompt itself leaves of the target.

    At least that prompt's own time is left, so that nobody asks for more replicas than prompts wait.
    """
    if not (load.queued_tokens and capacity.tokens_per_s):
        return NOTHING
    work_s = load.queued_tokens / capacity.tokens_per_s
    room_s = max(targets.ttft_s - capacity.prompt_s, capacity.prompt_s)
    return Demand(
        work_s / room_s,
        f"predicted TTFT {predict_ttft_s(load, capacity, running):.1f} s against {targets.ttft_s:.1f} s: "
        f"{load.queued_tokens:.0f} tokens wait, {capacity.tokens_per_s:.0f} tokens/s per replica",
    )


def busy_demand(load: Load, capacity: SeenCapacity, targets: Targets, running: int) -> Demand:
    """So many that a prompt that arrives finds few others before it."""
    if not (targets.is_for_prompts and load.busy):
        return NOTHING
    most = min(MAX_BUSY, max(MIN_BUSY, 1 - capacity.prompt_s / targets.ttft_s))
    return Demand(
        load.busy / most,
        f"prompts are computed {load.busy / max(running, 1):.0%} of the time against {most:.0%}",
    )


def slot_demand(loads: Sequence[Load], capacity: SeenCapacity) -> Demand:
    """So many that all sequences decode at once, once it was seen how many a replica has slots for."""
    if not capacity.slots:
        return NOTHING
    decoding, in_line = sum(load.decoding for load in loads), count_in_line(loads, capacity)
    return Demand(
        min((decoding + in_line) / capacity.slots, float(math.ceil(decoding + in_line))),
        f"{_count(decoding, 'sequence')} decode and {in_line:.0f} wait for a slot, a replica has {capacity.slots:.0f}",
    )


def kv_demand(load: Load, running: int) -> Demand:
    """So many that their KV memory has room."""
    if not load.kv_use:
        return NOTHING
    return Demand(
        min(load.kv_use / MAX_KV_USE, float(math.ceil(load.sequences))),  # a replica for each
        f"{load.kv_use / max(running, 1):.0%} of the KV memory is taken against {MAX_KV_USE:.0%}, "
        f"by {_count(load.sequences, 'sequence')}",
    )


def itl_demand(loads: Sequence[Load], targets: Targets) -> Demand:
    """So many that the ITL is at its target if it goes with the number of sequences.

    It goes with it less than that, so that the next plans ask for more, up to what is enough and never beyond.
    """
    decoding = sum(load.decoding for load in loads)
    generated = sum(load.generated_tokens for load in loads)
    asked = sum(
        min(1.0, load.decoding) * load.decoding / load.generated_tokens / targets.itl_s
        for load in loads
        if load.generated_tokens
    )
    if not asked:
        return NOTHING
    return Demand(
        min(asked, max(1.0, decoding / MIN_BATCH)),
        f"ITL {decoding / generated * 1000:.0f} ms against {targets.itl_s * 1000:.0f} ms "
        f"with {_count(decoding, 'sequence')}",
    )


def sequence_demand(load: Load, targets: Targets) -> Demand:
    """So many as the user has said."""
    if targets.sequences is None or not load.sequences:
        return NOTHING
    return Demand(
        load.sequences / targets.sequences,
        f"{_count(load.sequences, 'sequence')}, {targets.sequences:g} per replica are the target",
    )


def settle(demand: Demand, replicas: Replicas, signals: dict[str, float]) -> Plan:
    """The demand, unless it would give up replicas too soon."""
    if demand.replicas > replicas.target:
        return Plan(demand.replicas, demand.reason, signals)
    if replicas.reporting < replicas.running or not replicas.running:
        unknown = f"{replicas.reporting} of {replicas.running} replicas have reported"
        return Plan(float(replicas.target), f"{demand.reason}; none is given up: {unknown}", signals)
    enough = min(demand.replicas / SPARE, float(replicas.target))
    is_kept = math.ceil(demand.replicas) < replicas.target == math.ceil(enough)
    reason = f"{demand.reason}; one less would be too near to that" if is_kept else demand.reason
    return Plan(enough, reason, signals)


def _ratio(value: float, by: float) -> float:
    return value / by if by else 0.0


def _count(number: float, what: str) -> str:
    rounded = f"{number:.0f}"
    return f"{rounded} {what}" if rounded == "1" else f"{rounded} {what}s"
