"""Compares the goodput of replicas that change their role with that of every fixed split, in virtual time.

The load comes in waves: long prompts with short answers, then short prompts with long answers.  The router and the plan
of the roles are those of production (app/routing, app/autoscaling/role_plan.py) with the same reports and periods; a
switch takes as long as it was measured to take.  Not in it: a replica that begins to decode has no links for the time
of a probe, 0.1 s or so, in which it would compute prompts itself.

Run ``python -m benchmarks.routing.role_switch --out FOLDER``.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from app.autoscaling.load import FIELDS, Load, LoadMeter, mean_load
from app.autoscaling.replica_plan import Targets
from app.autoscaling.role_plan import HomeReport, RolePlanner
from app.bench.picture import COLOURS
from app.config import RoutingConfig, SloConfig
from app.engines.sim.profile import SimProfile, load_profile
from app.messages import Role
from benchmarks.routing.fleet import ROLES, Fleet, Outcome
from benchmarks.routing.policies import Baton
from benchmarks.routing.replica import FleetSpec, Replica
from benchmarks.routing.scenarios import Kind, Phase, Scenario
from benchmarks.routing.timeline import Timeline

NUM_REPLICAS = 4
REPORT_S, LOOK_BACK_S = 0.5, 1.5
"""As in deployments/build.py."""
PLAN_S = 0.25
"""Serve's control loop (deployments/cluster.py)."""
SWITCH_S = 0.3
"""From the plan to the frontends: the mean of what was measured (docs/benchmarks/2026-11-28-role-switch.md)."""
WINDOW_S = 5
SLO = SloConfig(ttft_ms=2000, itl_ms=10)
PROMPTS, OUTPUTS = Kind(8192, 32), Kind(512, 800)


def waves(prompts_per_s: float, outputs_per_s: float, num: int, wave_s: float) -> Scenario:
    """Return `num` waves of long prompts, each followed by one of long outputs."""
    load = (Phase(wave_s, prompts_per_s, (PROMPTS,)), Phase(wave_s, outputs_per_s, (OUTPUTS,))) * num
    return Scenario(name=f"{prompts_per_s:g} prompts/s, {outputs_per_s:g} outputs/s", load=load, slo=SLO)


class MeteredReplica(Replica):
    """A replica that measures its load as those of production do, and may change its role."""

    def __init__(self, *arguments: Any) -> None:
        self.meter: LoadMeter | None = None
        super().__init__(*arguments)
        self.home = self.role
        timeline: Timeline = self._timeline
        self.meter = LoadMeter(lambda: timeline.now)
        self.backlog = (0.0, 0.0)
        self.reports: deque[tuple[float, dict[str, float]]] = deque()

    def tell(self) -> None:
        self.measure()
        super().tell()

    def measure(self) -> None:
        if self.meter is None:
            return
        queued_tokens = self.queued_tokens + self.backlog[0]
        use = self.scheduler.num_used_blocks / self.num_blocks if self.role == "decode" else 0.0
        self.meter.set_levels(
            queued_tokens=queued_tokens,
            busy=float(queued_tokens > 0),
            prefilling=self._num_prefilling,
            waiting=self.backlog[1],
            decoding=self._num_decoding,
            kv_use=use,
        )

    def report(self) -> None:
        """Report what was measured, and forget what is older than the period that counts."""
        assert self.meter is not None
        self.measure()
        counts = {"prompts": self.num_prompts, "computed_tokens": self.computed_tokens}
        told = {**self.meter.read(), **counts, "generated_tokens": float(self._num_given)}
        self.reports.append((self._timeline.now, told))
        while self.reports[0][0] < self._timeline.now - LOOK_BACK_S:
            self.reports.popleft()

    def load(self) -> Load | None:
        """Return the mean over the reports that count; None if there are too few."""
        if len(self.reports) < 2:
            return None
        (began, first), (ended, last) = self.reports[0], self.reports[-1]
        return mean_load({f: first[f] for f in FIELDS}, {f: last[f] for f in FIELDS}, ended - began)


class SwitchingFleet(Fleet):
    """A fleet whose replicas change their roles by the plan."""

    make_replica = MeteredReplica

    def __init__(self, spec: FleetSpec, frontends: list[Baton], timeline: Timeline, end_s: float) -> None:
        waiting = list(frontends)
        super().__init__(spec, lambda: waiting.pop(), timeline)
        self._batons = frontends
        self._planner = RolePlanner(NUM_REPLICAS)
        self._assigned: dict[str, Role] = {}
        self._end_s = end_s
        self.splits = [(0.0, spec.num_prefill)]
        """The number of prefill replicas from each moment on."""
        timeline.after(REPORT_S, self._report)
        timeline.after(PLAN_S, self._plan)

    @property
    def _metered(self) -> list[MeteredReplica]:
        return [replica for replica in self.replicas.values() if isinstance(replica, MeteredReplica)]

    def _report(self) -> None:
        self._share_backlog()
        for replica in self._metered:
            replica.report()
        if self._timeline.now < self._end_s:
            self._timeline.after(REPORT_S, self._report)

    def _share_backlog(self) -> None:
        """Share out what waits in the frontends, as deployments/frontend/served_model.py does."""
        for role in ROLES:
            tokens = sequences = 0
            for baton in self._batons:
                if role == ("prefill" if baton.line.lacks == "prefill" else "decode"):
                    tokens += baton.line.queued_tokens if role == "prefill" else 0
                    sequences += baton.line.num_waiting if role == "decode" else 0
            members = [replica for replica in self._metered if replica.role == role]
            for replica in members:
                replica.backlog = (tokens / len(members), sequences / len(members))
                replica.measure()

    def _plan(self) -> None:
        self._share_backlog()
        targets = {
            role: Targets(
                ttft_s=SLO.ttft_ms / 1e3,
                itl_s=SLO.itl_ms / 1e3,
                is_for_prompts=role == "prefill",
                is_for_decoding=role == "decode",
            )
            for role in ROLES
        }
        homes = {}
        for home in ROLES:
            members = [replica for replica in self._metered if replica.home == home]
            loads = {replica.name: load for replica in members if (load := replica.load()) is not None}
            homes[home] = HomeReport(targets[home], [r.name for r in members], loads, len(members))
        plan = self._planner.plan(homes, self._assigned, self._timeline.now)
        before = {replica.name: self._assigned.get(replica.name, replica.home) for replica in self._metered}
        for replica in self._metered:
            role = plan.roles[replica.name]
            if role != before[replica.name]:
                self._assigned[replica.name] = role
                replica.reports.clear()
                self._timeline.after(SWITCH_S, self._switch, replica, role)
        if self._timeline.now < self._end_s:
            self._timeline.after(PLAN_S, self._plan)

    def _switch(self, replica: MeteredReplica, role: Role) -> None:
        replica.role = role
        for baton in self._batons:
            baton.on_role(replica.name, role)
        self.splits.append((self._timeline.now, sum(each.role == "prefill" for each in self._metered)))
        replica.tell()


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """How one contender did."""

    contender: str
    num_requests: int
    num_ended: int
    num_refused: int
    num_good: int
    goodput_per_s: float
    windows: list[float]
    """The share of the requests in time, by when they arrived, in windows of WINDOW_S seconds."""
    splits: list[tuple[float, int]]


def is_good(outcome: Outcome) -> bool:
    in_time = outcome.ttft_s <= SLO.ttft_ms / 1e3 and outcome.tpot_s <= SLO.itl_ms / 1e3
    return outcome.way is not None and in_time


def measure(contender: str, scenario: Scenario, profile: SimProfile, seed: int) -> Result:
    """Serve the requests with a fixed number of prefill replicas ("1+3") or with "switching", which begins with 2+2."""
    random.seed(seed)
    timeline = Timeline()
    requests = scenario.requests(seed, None)
    num_prefill = 2 if contender == "switching" else int(contender[0])
    spec = FleetSpec(
        profile=profile,
        num_prefill=num_prefill,
        num_decode=NUM_REPLICAS - num_prefill,
        num_blocks=int(90e9 / profile.kv_bytes_per_token / 128),
        block_size=128,
        num_frontends=2,
    )
    batons = [Baton(RoutingConfig(), SLO, timeline) for _ in range(spec.num_frontends)]
    end_s = requests[-1].at_s
    splits = [(0.0, num_prefill)]
    if contender == "switching":
        fleet: Fleet = (switching := SwitchingFleet(spec, batons, timeline, end_s))
        splits = switching.splits
    else:
        waiting = list(batons)
        fleet = Fleet(spec, partial(waiting.pop, 0), timeline)
    result = fleet.run(requests)
    good = [outcome for outcome in result.outcomes if is_good(outcome)]
    return Result(
        contender=contender,
        num_requests=len(requests),
        num_ended=result.num_ended,
        num_refused=result.num_refused,
        num_good=len(good),
        goodput_per_s=len(good) / end_s,
        windows=_windows(result.outcomes),
        splits=splits,
    )


def _windows(outcomes: Sequence[Outcome]) -> list[float]:
    arrived: dict[int, list[bool]] = {}
    for outcome in outcomes:
        arrived.setdefault(int(outcome.arrived_at // WINDOW_S), []).append(is_good(outcome))
    return [sum(arrived.get(n, [])) / max(1, len(arrived.get(n, []))) for n in range(max(arrived) + 1)]


def draw(results: Sequence[Result], scenario: Scenario, path: Path) -> None:
    """Write the picture.  The suffix of `path` says in which format."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11.69, 5.5), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        for result, colour in zip(results, COLOURS, strict=False):
            moments = [WINDOW_S * (n + 0.5) for n in range(len(result.windows))]
            label = f"{result.contender}: {result.goodput_per_s:.2f}/s in time"
            width = 2.0 if result.contender == "switching" else 0.9
            above.plot(moments, [100 * share for share in result.windows], color=colour, linewidth=width, label=label)
        above.set_ylabel(f"% of the requests in time, windows of {WINDOW_S} s")
        above.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(results))
        switching = next(result for result in results if result.contender == "switching")
        ends = [*(moment for moment, _ in switching.splits), WINDOW_S * len(switching.windows)]
        below.step(
            ends, [*(split for _, split in switching.splits), switching.splits[-1][1]], where="post", color=COLOURS[0]
        )
        below.set_ylim(0.5, NUM_REPLICAS - 0.5)
        below.set_ylabel("prefill replicas")
        below.set_xlabel("seconds; dotted: the load changes")
        for axes in (above, below):
            for moment in scenario.changes_s:
                axes.axvline(moment, color="#666666", linewidth=0.8, linestyle=":")
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=float, default=8.0, help="long prompts per second")
    parser.add_argument("--outputs", type=float, default=24.0, help="long outputs per second")
    parser.add_argument("--wave", type=float, default=60.0, help="seconds of each wave")
    parser.add_argument("--waves", type=int, default=3, help="pairs of waves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for role-switch.json and role-switch.svg")
    arguments = parser.parse_args()
    scenario = waves(arguments.prompts, arguments.outputs, arguments.waves, arguments.wave)
    profile = load_profile("h200-llama-8b")
    results = []
    for contender in ("switching", "1+3", "2+2", "3+1"):
        results.append(result := measure(contender, scenario, profile, arguments.seed))
        lost = result.num_requests - result.num_ended - result.num_refused
        print(
            f"{result.contender:10} {result.goodput_per_s:6.2f}/s in time, {result.num_good} of {result.num_requests}, "
            f"{result.num_refused} refused, {lost} lost, {len(result.splits) - 1} switches",
            flush=True,
        )
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "role-switch.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)))
        draw(results, scenario, arguments.out / "role-switch.svg")


if __name__ == "__main__":
    main()
