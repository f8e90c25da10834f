"""The loads, fleets and limits of ``python -m benchmarks.routing goodput``.

Half of them are held out: no constant of the router is chosen by what they show, and they are drawn with other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from app.bench.workload import (
    PREFIX_PIECES,
    Lengths,
    LogNormal,
    Request,
    at_speed,
    draw_length,
    fitting,
    read_trace,
)
from app.config import SloConfig
from benchmarks.routing.fleet import spread_out
from benchmarks.routing.replica import MAX_MODEL_LEN

SEEDS_APART = 1000
"""How far the seeds of held-out scenarios are from those of the others."""
BY_TCP = 0.45e9
"""Bytes of KV per second by TCP within one machine (docs/benchmarks/2026-11-29-gpu.md)."""
LONGEST_DRAWN = 32_000
"""Drawn lengths are cut there, in tokens."""


class Kind(msgspec.Struct, frozen=True):
    """Requests of one kind."""

    prompt: Lengths
    """In tokens, a shared prefix not included."""
    output: Lengths
    share: float = 1.0
    """Of all requests of a phase."""
    prefix_tokens: int = 0
    num_prefixes: int = 1
    """How many prefixes there are, each begun with equally often."""


class Phase(msgspec.Struct, frozen=True):
    """A time of constant load."""

    duration_s: float
    rate: float
    """Requests per second."""
    kinds: tuple[Kind, ...]


class Trace(msgspec.Struct, frozen=True):
    """The beginning of a trace in Mooncake's format."""

    file: str
    speed: float
    num_requests: int


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What is served, by how many replicas, and within which times."""

    name: str
    load: tuple[Phase, ...] | Trace
    num_prefill: int = 1
    num_decode: int = 1
    slo: SloConfig
    is_held_out: bool = False
    num_frontends: int = 1
    burstiness: float = 1.0
    """The shape of the gamma-distributed gaps between requests; 1 is a Poisson process, and less is more bursty."""
    first_use_s: float = 0.0
    pace_error: float = 1.0
    link_bytes_per_s: float | None = None
    """How fast KV moves; by default as the profile says."""
    measured: dict[str, float] = {}
    """The goodput of fixed ways on two H200s, in requests/s over the time until the last answer."""

    @property
    def changes_s(self) -> list[float]:
        """The moments at which the load changes; none for a trace."""
        moments = [0.0]
        for phase in self.load if isinstance(self.load, tuple) else ():
            moments.append(moments[-1] + phase.duration_s)
        return moments[1:-1]

    def shortened(self, factor: float) -> Scenario:
        """Return the scenario with each phase `factor` times as long."""
        if isinstance(self.load, Trace):
            load: tuple[Phase, ...] | Trace = msgspec.structs.replace(
                self.load, num_requests=math.ceil(factor * self.load.num_requests)
            )
        else:
            load = tuple(msgspec.structs.replace(phase, duration_s=factor * phase.duration_s) for phase in self.load)
        return msgspec.structs.replace(self, load=load)

    def requests(self, seed: int, traces: Path | None) -> list[Request]:
        """Draw the requests, or read them from the folder `traces`."""
        if isinstance(self.load, Trace):
            assert traces is not None
            recorded = read_trace(traces / self.load.file, self.load.num_requests)
            return at_speed(fitting(spread_out(recorded), MAX_MODEL_LEN), self.load.speed)
        return _draw(self.load, self.burstiness, Random(seed + SEEDS_APART * self.is_held_out))


def _draw(phases: Sequence[Phase], burstiness: float, random: Random) -> list[Request]:
    requests: list[Request] = []
    begin_s = at_s = 0.0
    for phase in phases:
        end_s = begin_s + phase.duration_s
        at_s = max(at_s, begin_s)
        while (at_s := at_s + random.gammavariate(burstiness, 1 / (burstiness * phase.rate))) < end_s:
            (kind,) = random.choices(phase.kinds, [kind.share for kind in phase.kinds])
            requests.append(_draw_request(at_s, len(requests), kind, random))
        begin_s = at_s = end_s
    return requests


def _draw_request(at_s: float, number: int, kind: Kind, random: Random) -> Request:
    pieces = [(number * LONGEST_DRAWN, min(LONGEST_DRAWN, draw_length(kind.prompt, random)))]
    if kind.prefix_tokens:
        pieces.insert(0, (PREFIX_PIECES + random.randrange(kind.num_prefixes), kind.prefix_tokens))
    return Request(at_s, pieces, min(LONGEST_DRAWN, draw_length(kind.output, random)))


def steady(duration_s: float, rate: float, *kinds: Kind) -> tuple[Phase, ...]:
    """Return a constant load."""
    return (Phase(duration_s, rate, kinds),)


def steps(duration_s: float, rates: Sequence[float], *kinds: Kind) -> tuple[Phase, ...]:
    """Return a load that changes its rate every `duration_s`."""
    return tuple(Phase(duration_s, rate, kinds) for rate in rates)


def waves(num: int, period_s: float, least: float, most: float, *kinds: Kind) -> tuple[Phase, ...]:
    """Return a load whose rate follows `num` periods of a sine, in phases of a tenth of a period."""
    middle, height = (least + most) / 2, (most - least) / 2
    return tuple(
        Phase(period_s / 10, middle - height * math.cos(math.tau * (n + 0.5) / 10), kinds) for n in range(10 * num)
    )


TIGHT = SloConfig(ttft_ms=1000, itl_ms=10)
LONG = SloConfig(ttft_ms=2000, itl_ms=10)
LOOSE = SloConfig(ttft_ms=4000, itl_ms=20)

MEDIUM_PROMPTS = Kind(4096, 128)
LONG_PROMPTS = Kind(8192, 256)
CHAT = Kind(LogNormal(1500, 0.8), LogNormal(200, 0.6))
HEAVY_TAILS = Kind(LogNormal(2000, 1.6), LogNormal(200, 1.4))
SHORT_AND_LONG = (Kind(100, 100, 0.9), Kind(30_000, 100, 0.1))

MEASURED = tuple(
    Scenario(
        name=f"{name} at {rate}/s",
        load=steady(70, rate, kind),
        slo=slo,
        is_held_out=is_held_out,
        first_use_s=first_use_s,
        measured={"aggregated": aggregated, "remote": remote},
    )
    for name, kind, slo, rate, is_held_out, first_use_s, aggregated, remote in (
        ("4096+128", MEDIUM_PROMPTS, TIGHT, 6, True, 2.4, 5.57, 5.51),
        ("4096+128", MEDIUM_PROMPTS, TIGHT, 10, False, 0.0, 4.29, 8.32),
        ("4096+128", MEDIUM_PROMPTS, TIGHT, 14, False, 0.0, 0.71, 1.93),
        ("8192+256", LONG_PROMPTS, LONG, 3, False, 2.4, 2.45, 2.57),
        ("8192+256", LONG_PROMPTS, LONG, 5, True, 0.0, 1.47, 1.88),
        ("8192+256", LONG_PROMPTS, LONG, 7, True, 0.0, 0.00, 1.03),
    )
)
"""What was measured on two H200s, whose first request took 2.4 s.  That each length was new to the engines at its first
rate is a guess: nothing else explains why less than all was in time there."""

COLD = tuple(
    Scenario(
        name=f"cold, {name} at {rate}/s",
        load=steady(40, rate, kind),
        slo=TIGHT,
        first_use_s=2.0,
        is_held_out=is_held_out,
    )
    for name, kind, rate, is_held_out in (
        ("4096+128", MEDIUM_PROMPTS, 4, False),
        ("4096+128", MEDIUM_PROMPTS, 8, True),
        ("4096+128", MEDIUM_PROMPTS, 12, False),
        ("chat", CHAT, 8, True),
        ("chat", CHAT, 20, False),
    )
)

CHANGING = (
    Scenario(name="steps, 4096+128 at 3, 11, 3/s", load=steps(30, (3, 11, 3), MEDIUM_PROMPTS), slo=TIGHT),
    Scenario(
        name="steps, chat at 10, 45, 20/s",
        load=steps(25, (10, 45, 20), CHAT),
        num_prefill=2,
        num_decode=2,
        slo=TIGHT,
        is_held_out=True,
        num_frontends=4,
    ),
    Scenario(
        name="steps, long prompts to long outputs",
        load=(Phase(30, 7, (Kind(8192, 32),)), Phase(30, 7, (Kind(512, 800),)), Phase(30, 7, (Kind(8192, 32),))),
        num_prefill=2,
        num_decode=2,
        slo=LONG,
        num_frontends=4,
    ),
    Scenario(
        name="steps, long outputs to long prompts",
        load=(Phase(30, 5, (Kind(300, 600),)), Phase(30, 4, (Kind(6000, 64),)), Phase(30, 5, (Kind(300, 600),))),
        slo=LONG,
        is_held_out=True,
    ),
    Scenario(name="waves, chat at 5 to 25/s", load=waves(3, 20, 5, 25, CHAT), slo=TIGHT),
    Scenario(
        name="waves, 4096+128 at 8 to 48/s",
        load=waves(2, 20, 8, 48, MEDIUM_PROMPTS),
        num_prefill=4,
        num_decode=4,
        slo=TIGHT,
        is_held_out=True,
        num_frontends=4,
    ),
    Scenario(
        name="bursts, chat at 35/s",
        load=steady(40, 35, CHAT),
        burstiness=0.1,
        num_prefill=2,
        num_decode=2,
        slo=TIGHT,
        num_frontends=4,
    ),
    Scenario(
        name="bursts, 4096+128 at 8/s",
        load=steady(60, 8, MEDIUM_PROMPTS),
        burstiness=0.2,
        slo=TIGHT,
        is_held_out=True,
    ),
)

SIZES = tuple(
    Scenario(
        name=f"{num_prefill}P{num_decode}D, {name} at {rate}/s",
        load=steady(duration_s, rate, kind),
        num_prefill=num_prefill,
        num_decode=num_decode,
        slo=TIGHT,
        is_held_out=is_held_out,
        num_frontends=num_frontends,
    )
    for num_prefill, num_decode, name, kind, rate, duration_s, num_frontends, is_held_out in (
        (1, 1, "chat", CHAT, 14, 60, 1, True),
        (1, 1, "chat", CHAT, 20, 60, 4, False),
        (1, 1, "2048+512", Kind(2048, 512), 14, 60, 1, False),
        (1, 3, "2048+512", Kind(2048, 512), 26, 40, 4, False),
        (1, 3, "4096+128", MEDIUM_PROMPTS, 20, 40, 4, True),
        (2, 2, "4096+128", MEDIUM_PROMPTS, 14, 40, 4, True),
        (2, 2, "4096+128", MEDIUM_PROMPTS, 24, 40, 4, False),
        (4, 4, "8192+256", LONG_PROMPTS, 20, 40, 4, False),
        (4, 4, "chat", CHAT, 80, 25, 4, True),
        (8, 8, "4096+128", MEDIUM_PROMPTS, 95, 20, 4, False),
        (8, 8, "8192+256", LONG_PROMPTS, 50, 20, 4, True),
    )
)

SLOW_LINKS = tuple(
    Scenario(
        name=f"slow link, {name} at {rate}/s",
        load=steady(240, rate, kind),  # long, as its first requests cannot know
        slo=slo,
        link_bytes_per_s=BY_TCP,
        is_held_out=is_held_out,
    )
    for name, kind, slo, rate, is_held_out in (
        ("4096+128", MEDIUM_PROMPTS, TIGHT, 3, False),
        ("8192+256", LONG_PROMPTS, LONG, 2, True),
        ("chat", CHAT, TIGHT, 8, True),
    )
)

LENGTHS = (
    Scenario(
        name="heavy tails at 10/s",
        load=steady(60, 10, HEAVY_TAILS),
        num_prefill=2,
        num_decode=2,
        slo=LONG,
        num_frontends=4,
    ),
    Scenario(
        name="heavy tails at 40/s",
        load=steady(30, 40, HEAVY_TAILS),
        num_prefill=4,
        num_decode=4,
        slo=LONG,
        is_held_out=True,
        num_frontends=4,
    ),
    Scenario(name="100 and 30,000 tokens at 4/s", load=steady(60, 4, *SHORT_AND_LONG), slo=LOOSE, is_held_out=True),
    Scenario(
        name="100 and 30,000 tokens at 17/s",
        load=steady(60, 17, *SHORT_AND_LONG),
        num_prefill=2,
        num_decode=2,
        slo=LOOSE,
        num_frontends=4,
    ),
    Scenario(name="2048+1 at 25/s", load=steady(40, 25, Kind(2048, 1)), slo=TIGHT),
    Scenario(name="2048+16 at 22/s", load=steady(40, 22, Kind(2048, 16)), slo=TIGHT, is_held_out=True),
    Scenario(name="1024+500 at 21/s", load=steady(60, 21, Kind(1024, 500)), slo=TIGHT, is_held_out=True),
    Scenario(name="500+2000 at 6/s", load=steady(60, 6, Kind(500, 2000)), slo=TIGHT),
)

PREFIXES = tuple(
    Scenario(
        name=f"{share:.0%} prefix hits at {rate}/s",
        load=steady(40, rate, Kind(4096 - prefix_tokens, 128, prefix_tokens=prefix_tokens, num_prefixes=20)),
        num_prefill=2,
        num_decode=2,
        slo=TIGHT,
        is_held_out=is_held_out,
        num_frontends=4,
    )
    for share, prefix_tokens, rate, is_held_out in (
        (0.0, 0, 22, True),
        (0.5, 2048, 36, False),
        (0.8, 3264, 45, True),
        (0.95, 3904, 60, False),
    )
)

WRONG_PACES = tuple(
    Scenario(
        name=f"pace told {error:g} times as slow, 4096+128 at 9/s",
        load=steady(60, 9, MEDIUM_PROMPTS),
        slo=TIGHT,
        pace_error=error,
        is_held_out=is_held_out,
    )
    for error, is_held_out in ((0.5, False), (2.0, True))
)

TRACES = tuple(
    Scenario(
        name=f"Mooncake's {name} trace at {speed:g} times its speed",
        load=Trace(f"{name}_trace.jsonl", speed, num_requests),
        num_prefill=4,
        num_decode=4,
        slo=LOOSE,
        is_held_out=is_held_out,
        num_frontends=4,
    )
    for name, speed, num_requests, is_held_out in (
        ("conversation", 2, 400, True),
        ("conversation", 4, 600, False),
        ("synthetic", 4, 500, True),
    )
)

SCENARIOS = (*MEASURED, *COLD, *CHANGING, *SIZES, *SLOW_LINKS, *LENGTHS, *PREFIXES, *WRONG_PACES, *TRACES)
