"""Plans which replicas of one model prefill and which decode, within a number of replicas.

1. Each role's demand is a number of replicas (replica_plan.py): what its kind of work takes, whoever does it now.  The
   split that is wanted leaves the role that is short least short: it is the one in which the larger of the two ratios
   of demand to replicas is smallest.
2. A split is changed only if that *pressure* falls by GAIN, and has done so for PATIENCE_S (`Hysteresis`).
3. Those that have the least to do are switched, first those that return to their home: their engines were made for it.
4. More replicas are asked for only when no split is enough, and never more than the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from app.autoscaling.load import Load
from app.autoscaling.replica_plan import Demand, Replicas, SeenCapacity, Targets, measure, own_demand, settle
from app.messages import Role

SWITCHABLE: tuple[Role, Role] = ("prefill", "decode")

GAIN = 0.15
"""By how much of itself the pressure has to fall.  It is what `SPARE` of replica_plan.py leaves before a replica is
given up, for the same reason: demands are measured over some seconds and are off by about that much."""
PATIENCE_S = 1.0
"""For how long another split has to have been the better one: for two reports of each replica.  A switch takes 0.3 s
and loses nothing, so what costs is to be late (docs/benchmarks/2026-11-28-role-switch.md)."""
CALM = 0.7
"""No replica is moved while each role has this many times what it needs: at a ratio of demand to replicas below it a
queue hardly forms (`MAX_BUSY` of replica_plan.py)."""


class Member(msgspec.Struct, frozen=True):
    """One running replica."""

    replica: str
    home: Role
    role: Role
    work: float
    """How much it has to do, in any unit."""


def reassign(members: Sequence[Member], num_prefill: int) -> dict[str, Role]:
    """Return the role of each replica so that `num_prefill` prefill, and as few as possible change."""
    roles = {member.replica: member.role for member in members}
    now = sum(member.role == "prefill" for member in members)
    wanted: Role = "prefill" if num_prefill > now else "decode"
    others = [member for member in members if member.role != wanted]
    others.sort(key=lambda member: (member.home != wanted, member.work, member.replica))
    for member in others[: abs(num_prefill - now)]:
        roles[member.replica] = wanted
    return roles


def pressure(prefill_demand: float, decode_demand: float, num_prefill: int, num_decode: int) -> float:
    """Return the ratio of demand to replicas in the role that is shorter."""
    return max(_ratio(prefill_demand, num_prefill), _ratio(decode_demand, num_decode))


def best_split(prefill_demand: float, decode_demand: float, num_replicas: int) -> int:
    """Return how many of `num_replicas`, at least 2, should prefill; at least one is in each role."""
    return min(
        range(1, num_replicas),
        key=lambda num_prefill: (
            pressure(prefill_demand, decode_demand, num_prefill, num_replicas - num_prefill),
            num_prefill,
        ),
    )


def num_wanted(prefill_demand: float, decode_demand: float, budget: int) -> int:
    """Return how many replicas there should be together: what both roles need, from 2 up to `budget`."""
    return min(budget, max(2, math.ceil(max(1.0, prefill_demand)) + math.ceil(max(1.0, decode_demand))))


class Hysteresis:
    """Decides when the split follows the demands."""

    def __init__(self) -> None:
        self._better: int | None = None
        self._since = 0.0

    def decide(self, prefill_demand: float, decode_demand: float, num_prefill: int, num_decode: int, now: float) -> int:
        """Return how many of the present replicas should prefill from now on.

        `now` is of a monotonic clock, in seconds.  A split without one of the two roles is left at once.
        """
        num_replicas = num_prefill + num_decode
        if num_replicas < 2:
            return num_prefill
        best = best_split(prefill_demand, decode_demand, num_replicas)
        if not (num_prefill and num_decode):
            return best
        present = pressure(prefill_demand, decode_demand, num_prefill, num_decode)
        then = pressure(prefill_demand, decode_demand, best, num_replicas - best)
        if present <= CALM or then > (1 - GAIN) * present:
            self._better = None
            return num_prefill
        direction = 1 if best > num_prefill else -1
        if self._better != direction:
            self._better, self._since = direction, now
        if now - self._since < PATIENCE_S:
            return num_prefill
        self._better = None
        return best


class HomeReport(msgspec.Struct, frozen=True):
    """What is known of one deployment."""

    targets: Targets
    """What its role is to achieve."""
    running: Sequence[str]
    loads: Mapping[str, Load]
    """Those of the replicas that have reported since they took their role."""
    target: int
    """How many replicas the deployment aims at."""


class RolePlan(msgspec.Struct, frozen=True):
    """What is to be of one model's replicas."""

    roles: Mapping[str, Role]
    """The role of each running replica."""
    replicas: Mapping[Role, float]
    """How many each deployment is to have."""
    reason: str
    signals: Mapping[str, float]


class RolePlanner:
    """Plans the two deployments of one model together, within `budget` replicas."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._hysteresis = Hysteresis()
        self._capacity = dict.fromkeys(SWITCHABLE, SeenCapacity())
        self._planned_at: float | None = None
        self._has_begun = False
        """Whether both deployments have had a replica.  Before that nobody takes the place of those that start."""

    def plan(self, homes: Mapping[Role, HomeReport], assigned: Mapping[str, Role], now: float) -> RolePlan:
        """Plan by what both deployments have reported.

        `assigned` has the roles that are not those of the replicas' homes.  `now` is of a monotonic clock.
        """
        members = [
            Member(replica, home, assigned.get(replica, home), report.loads[replica].sequences)
            if replica in report.loads
            else Member(replica, home, assigned.get(replica, home), 0.0)
            for home, report in homes.items()
            for replica in report.running
        ]
        numbers = {role: sum(member.role == role for member in members) for role in SWITCHABLE}
        demands = self._demands(homes, numbers, now)
        prefill, decode = (demands[role].replicas for role in SWITCHABLE)
        num_reporting = sum(len(report.loads) for report in homes.values())
        num_prefill = numbers["prefill"]
        self._has_begun = self._has_begun or all(report.running for report in homes.values())
        # If not all have reported, nobody knows what the last switch brought.
        if self._has_begun and (num_reporting == len(members) or not all(numbers.values())):
            num_prefill = self._hysteresis.decide(prefill, decode, num_prefill, numbers["decode"], now)
        target = sum(report.target for report in homes.values())
        wanted = float(num_wanted(prefill, decode, self._budget))
        reason = f"prefill: {demands['prefill'].reason}; decode: {demands['decode'].reason}"
        replicas = Replicas(target=target, running=len(members), reporting=num_reporting)
        total = settle(Demand(wanted, reason), replicas, {})
        return RolePlan(
            reassign(members, num_prefill),
            self._share(homes, min(self._budget, math.ceil(total.replicas)), demands, numbers),
            total.reason,
            {"prefill_demand": prefill, "decode_demand": decode, "prefill_roles": float(num_prefill)},
        )

    def _demands(self, homes: Mapping[Role, HomeReport], numbers: Mapping[Role, int], now: float) -> dict[Role, Demand]:
        """Return what each role needs for its kind of work, wherever that is done at present.

        Decode replicas compute prompts when prefill is short, and prefill replicas serve sequences when decode is.
        """
        passed_s = 0.0 if self._planned_at is None else now - self._planned_at
        self._planned_at = now
        known = [load for report in homes.values() for load in report.loads.values()]
        demands: dict[Role, Demand] = {}
        for role in SWITCHABLE:
            loads, targets = [_work_of(role, load) for load in known], homes[role].targets
            capacity = self._capacity[role] = measure(loads, self._capacity[role], targets, passed_s)
            demands[role] = own_demand(loads, capacity, targets, numbers[role])
        return demands

    def _share(
        self, homes: Mapping[Role, HomeReport], total: int, demands: Mapping[Role, Demand], numbers: Mapping[Role, int]
    ) -> dict[Role, float]:
        """Return how many replicas each deployment is to have.

        What is added or given up is of the deployment whose role is shortest, or has most to spare; each keeps one.
        """
        shares = {home: float(report.target) for home, report in homes.items()}
        more = total - round(sum(shares.values()))
        by_need = sorted(SWITCHABLE, key=lambda role: _ratio(demands[role].replicas, numbers[role]))
        if more > 0:
            shares[by_need[-1]] += more
        for home in by_need:
            given_up = min(-more, shares[home] - 1) if more < 0 else 0
            shares[home] -= given_up
            more += int(given_up)
        return shares


def _work_of(role: Role, load: Load) -> Load:
    """Return the part of a replica's load that is of one role's kind."""
    if role == "prefill":
        return msgspec.structs.replace(load, waiting=0.0, started=0.0, decoding=0.0, generated_tokens=0.0, kv_use=0.0)
    return msgspec.structs.replace(load, queued_tokens=0.0, busy=0.0, computed_tokens=0.0, prompts=0.0, prefilling=0.0)


def _ratio(demand: float, replicas: int) -> float:
    if replicas:
        return demand / replicas
    return math.inf if demand else 0.0
