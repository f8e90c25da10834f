"""Plans from the load of a deployment's replicas how many there are to be, and says why.

1. Each demand looks at one thing that can run short, and says how many replicas it takes to keep that under its target.
   All demands are sums over replicas, so the same load asks for the same number however many replicas carry it.
2. The largest demand counts.
3. `settle` gives up replicas only if the rest would be well under every target, and only if all have reported.

Serve does the rest by the user's AutoscalingConfig: means over `look_back_period_s`, delays, factors, bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from app.autoscaling.load import Load, total

MAX_BUSY, MIN_BUSY = 0.8, 0.5
"""The largest share of the time in which a replica is to compute prompts.  If prompts come at random, a prompt waits on
average its own time * busy / (1 - busy) (M/M/1), which is four times its own with 0.8.  Long prompts leave less of
their target for waiting, so their share is smaller, but half of a replica is to be used whatever the target is."""
MAX_KV_USE = 0.85
"""The largest share of the KV memory that is to be taken.  At 100 % an engine preempts sequences, whose KV is then
computed a second time, and running sequences grow by a token each step."""
MIN_BATCH = 8
"""Fewer sequences than this on each replica do not make steps shorter: reading the weights takes 4.65 ms of the 4.8
ms that a step of 8 short sequences takes (app/engines/sim/profiles/h200-llama-8b.yaml)."""
FADE_S = 300.0
"""After this many seconds a replica is believed to be half as fast as it was seen to be.  A memory is needed because
short prompts, and sequences without a slot, make it look slow, and more replicas than needed cost more than one that is
added a little later."""
SPARE = 0.85
"""Replicas are given up only if the others would be below this share of every target."""


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """What a pool is to achieve."""

    ttft_s: float
    itl_s: float
    sequences: float | None = None
    """The number of sequences on each replica, if the user has set `target_ongoing_requests`."""
    is_for_prompts: bool
    """Whether the pool is there to compute prompts.  A decode pool beside a prefill pool computes prompts which
    frontends prefer not to send there.  It grows for them only if the TTFT suffers, as more prefill takes them away."""
    is_for_decoding: bool = True
    """Whether the pool is there to decode.  A prefill pool decodes only the sequences that found no room on decode.
    While there is no decode replica, sequences wait for it too, and as long as they do it is planned as if it was."""


class SeenCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica of a pool was seen to do; a field is 0 if it was never seen."""

    tokens_per_s: float = 0.0
    """Prompt tokens per second that it computes while any wait."""
    prompt_tokens: float = 0.0
    """The tokens of a typical prompt that have to be computed."""
    slots: float = 0.0
    """Sequences that decode at once on it."""

    @property
    def prompt_s(self) -> float:
        """The seconds that a typical prompt takes by itself."""
        return self.prompt_tokens / self.tokens_per_s if self.tokens_per_s else 0.0


class Replicas(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of a deployment: how many it aims at, how many run, and how many of these have reported."""

    target: int
    running: int
    reporting: int


class Demand(msgspec.Struct, frozen=True):
    """How many replicas one thing that can run short asks for, and why."""

    replicas: float
    reason: str


class Plan(msgspec.Struct, frozen=True):
    """How many replicas there are to be; Serve rounds up, and applies its bounds and delays."""

    replicas: float
    reason: str
    signals: dict[str, float]


NOTHING = Demand(0.0, "nothing to do")


def plan_frontend(requests: float, target_requests: float, replicas: Replicas) -> Plan:
    """Plan the frontends by the requests that they hold."""
    reason = f"{_count(requests, 'request')} in flight, {target_requests:g} per replica are the target"
    demand = Demand(requests / target_requests, reason) if requests else NOTHING
    return settle(demand, replicas, {"requests": requests})


def plan_pool(loads: Sequence[Load], capacity: SeenCapacity, targets: Targets, replicas: Replicas) -> Plan:
    """Plan one pool of engines by the loads of its replicas that have reported."""
    demands = (own_demand(loads, capacity, targets, replicas.running), guest_demand(loads, targets))
    demand = max(demands, key=lambda demand: demand.replicas)
    return settle(demand, replicas, pool_signals(loads, capacity, replicas.running))


def own_demand(loads: Sequence[Load], capacity: SeenCapacity, targets: Targets, running: int) -> Demand:
    """Ask for what the pool is there for: the largest of all demands but that of guests."""
    load = total(loads)
    demands = (
        ttft_demand(load, capacity, targets, running),
        busy_demand(load, capacity, targets, running),
        slot_demand(loads, capacity),
        kv_demand(load, running),
        itl_demand(loads, targets),
        sequence_demand(load, targets),
    )
    return max(demands, key=lambda demand: demand.replicas)


def pool_signals(loads: Sequence[Load], capacity: SeenCapacity, running: int) -> dict[str, float]:
    """Return what the demands are made of, for people."""
    load = total(loads)
    return {
        "queued_tokens": load.queued_tokens,
        "busy": load.busy,
        "tokens_per_s": capacity.tokens_per_s,
        "predicted_ttft_s": predict_ttft_s(load, capacity, running),
        "prefilling": load.prefilling,
        "waiting": load.waiting,
        "decoding": load.decoding,
        "itl_s": _ratio(load.decoding, load.generated_tokens),
        "kv_use": load.kv_use,
    }


def measure(loads: Sequence[Load], before: SeenCapacity, targets: Targets, passed_s: float) -> SeenCapacity:
    """Return what a replica can do, by what they did now or, if that shows more, by what was known `passed_s` ago."""
    load = total(loads)
    known = msgspec.structs.replace(before, tokens_per_s=before.tokens_per_s * 0.5 ** (passed_s / FADE_S))
    if load.computed_tokens and load.prompts and load.busy:
        known = msgspec.structs.replace(
            known,
            tokens_per_s=max(load.computed_tokens / load.busy, known.tokens_per_s),
            prompt_tokens=load.computed_tokens / load.prompts,
        )
    if not (targets.is_for_decoding or load.waiting):  # what waits there are prompts, not sequences for a slot
        return msgspec.structs.replace(known, slots=0.0)
    seen = max((one.decoding for one in loads), default=0.0)  # not the mean: a new replica fills up only
    in_line = count_in_line(loads, known)
    is_full = in_line >= 1 and in_line > targets.ttft_s * (load.prompts + load.started)  # Little's law
    if seen >= 1 and is_full:  # one that is full decodes all the time: with less, something else is what they wait for
        return msgspec.structs.replace(known, slots=seen)
    return msgspec.structs.replace(known, slots=max(seen, known.slots) if known.slots else 0.0)


def count_in_line(loads: Sequence[Load], capacity: SeenCapacity) -> float:
    """Return how many sequences wait for a slot: those that neither transfers nor earlier prompts explain."""
    return sum(
        max(0.0, load.prefilling - load.prompts * predict_ttft_s(load, capacity, 1))  # Little's law
        + max(0.0, load.waiting - load.transferring)
        for load in loads
    )


def predict_ttft_s(load: Load, capacity: SeenCapacity, running: int) -> float:
    """Return the seconds that a typical prompt which arrives now waits for everything before it, and takes itself."""
    return _ratio(load.queued_tokens, capacity.tokens_per_s * max(running, 1)) + capacity.prompt_s


def ttft_demand(load: Load, capacity: SeenCapacity, targets: Targets, running: int) -> Demand:
    """Ask for enough replicas to compute what waits within the time that a typical prompt leaves of the target.

    That time is taken to be at least the prompt's own, so this never asks for more replicas than prompts wait.
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
    """Ask for enough replicas that a prompt which arrives finds few others before it."""
    if not (targets.is_for_prompts and load.busy):
        return NOTHING
    most = min(MAX_BUSY, max(MIN_BUSY, 1 - capacity.prompt_s / targets.ttft_s))
    return Demand(
        load.busy / most,
        f"prompts are computed {load.busy / max(running, 1):.0%} of the time against {most:.0%}",
    )


def slot_demand(loads: Sequence[Load], capacity: SeenCapacity) -> Demand:
    """Ask for enough replicas that all sequences decode at once, once a replica's slots are known."""
    if not capacity.slots:
        return NOTHING
    decoding, in_line = sum(load.decoding for load in loads), count_in_line(loads, capacity)
    return Demand(
        min((decoding + in_line) / capacity.slots, float(math.ceil(decoding + in_line))),
        f"{_count(decoding, 'sequence')} decode and {in_line:.0f} wait for a slot, a replica has {capacity.slots:.0f}",
    )


def guest_demand(loads: Sequence[Load], targets: Targets) -> Demand:
    """Ask for the replicas of a prefill pool on which sequences decode, as long as they do."""
    decoding = sum(load.decoding for load in loads)
    if targets.is_for_decoding or not decoding:
        return NOTHING
    return Demand(
        sum(min(1.0, load.decoding) for load in loads),
        f"{_count(decoding, 'sequence')} that found no room on decode run here",
    )


def kv_demand(load: Load, running: int) -> Demand:
    """Ask for enough replicas that their KV memory has room."""
    if not load.kv_use:
        return NOTHING
    return Demand(
        min(load.kv_use / MAX_KV_USE, float(math.ceil(load.sequences))),  # at most a replica for each
        f"{load.kv_use / max(running, 1):.0%} of the KV memory is taken against {MAX_KV_USE:.0%}, "
        f"by {_count(load.sequences, 'sequence')}",
    )


def itl_demand(loads: Sequence[Load], targets: Targets) -> Demand:
    """Ask for enough replicas that the ITL meets its target if it is in proportion to the number of sequences.

    It shrinks less than in proportion, so the next plans ask for more, up to what is enough and never beyond.
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
    """Ask for as many replicas as the user's own target says."""
    if targets.sequences is None or not load.sequences:
        return NOTHING
    return Demand(
        load.sequences / targets.sequences,
        f"{_count(load.sequences, 'sequence')}, {targets.sequences:g} per replica are the target",
    )


def settle(demand: Demand, replicas: Replicas, signals: dict[str, float]) -> Plan:
    """Plan for the demand, unless that would give up replicas too soon."""
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
