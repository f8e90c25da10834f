"""What tenants use, and whether they may use more: exact over all frontends together, without a hop for each request.

1. A limit is a bucket that fills at its rate, up to what comes in BURST_S.  The ledger has it (deployments/ledger.py).
2. Twice a second each frontend tells the ledger what it has counted, and hears how full the buckets are and how many
   frontends there are.  So in the long run exactly as much is used as comes in, however it is spread.
3. Until the next report a frontend uses at most its equal part of what is in a bucket: its lease.  So together they use
   no more than there is, but for the last request of each: that goes ahead if anything is left, as nobody knows how
   many tokens it will take, and those behind it wait until the bucket has made up for it.
4. If the ledger does not answer, each frontend takes it that every other one uses as much as itself.

Sequences at a time are no rate.  Of those that are free, each frontend may begin its equal part until the next report,
unless what others may still begin leaves less.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import msgspec

from app.errors import LimitReached
from app.tenants import RATES, Rate, Tenant

EXCHANGE_S = 0.5
"""How often a frontend talks to the ledger.  A call takes 1 ms, and what it brings is as old as this at most."""
BURST_S = 10.0
"""What a limit brings in so many seconds may be used at once by a tenant that has used nothing before.  With N
frontends this must be several times N * EXCHANGE_S, as each uses only its part of it in that time."""
GONE_S = 5.0
"""A frontend that has told nothing for so long is gone, and its sequences with it."""


class Usage(msgspec.Struct):
    """What one tenant has used at one frontend since that began, and what its limits are there."""

    counts: dict[Rate, int]
    sequences: int
    """Those that run now."""
    rates: dict[Rate, float]
    """What each limit brings in a second, of those that are set."""
    max_sequences: int | None = None


class Lease(msgspec.Struct):
    """What one tenant has left."""

    levels: dict[Rate, float]
    """For all frontends together."""
    max_sequences: int | None = None
    """How many may run at the frontend that asked."""


class Leases(msgspec.Struct):
    """What a frontend hears from the ledger."""

    tenants: dict[str, Lease]
    num_frontends: int
    """How many share each level, this one included."""


class Bucket:
    """What is left of one limit."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._level = rate * BURST_S
        self._at = now

    def level(self, now: float) -> float:
        return min(self.rate * BURST_S, self._level + self.rate * (now - self._at))

    def set(self, level: float, now: float) -> None:
        self._level, self._at = level, now


class _Frontend(msgspec.Struct):
    """What one frontend told last, and what it may do."""

    told_at: float
    used: dict[str, Usage]
    may_run: dict[str, int]
    """Sequences at a time, by tenant."""


class Ledger:
    """The buckets of all limits, out of which is taken what the frontends have counted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._frontends: dict[str, _Frontend] = {}
        self._buckets: dict[tuple[str, Rate], Bucket] = {}

    def exchange(self, name: str, used: dict[str, Usage]) -> Leases:
        """Take what the frontend `name` has counted, by tenant, and return what is left.

        Its first report only says where it stands: what it says then was counted before this ledger began.
        """
        now = self._clock()
        frontend = self._frontends.setdefault(name, _Frontend(now, used, {}))
        for tenant, usage in used.items():
            self._take(tenant, usage, frontend.used.get(tenant), now)
        frontend.told_at, frontend.used = now, used
        self._frontends = {each: told for each, told in self._frontends.items() if told.told_at >= now - GONE_S}
        tenants = {tenant: usage for told in self._frontends.values() for tenant, usage in told.used.items()} | used
        leases = {tenant: self._lease(tenant, usage.max_sequences, frontend, now) for tenant, usage in tenants.items()}
        return Leases(leases, len(self._frontends))

    def _take(self, tenant: str, usage: Usage, before: Usage | None, now: float) -> None:
        for kind in RATES:
            if (rate := usage.rates.get(kind)) is None:
                self._buckets.pop((tenant, kind), None)
                continue
            bucket = self._buckets.setdefault((tenant, kind), Bucket(rate, now))
            more = usage.counts[kind] - (before.counts[kind] if before is not None else 0)
            bucket.set(bucket.level(now) - more, now)
            bucket.rate = rate

    def _lease(self, tenant: str, max_sequences: int | None, frontend: _Frontend, now: float) -> Lease:
        found = {kind: self._buckets.get((tenant, kind)) for kind in RATES}
        levels = {kind: bucket.level(now) for kind, bucket in found.items() if bucket is not None}
        if max_sequences is None:
            frontend.may_run.pop(tenant, None)
            return Lease(levels)
        own = _running(frontend, tenant)
        others = [told for told in self._frontends.values() if told is not frontend]
        running = own + sum(_running(told, tenant) for told in others)
        unasked = _unasked(max_sequences, len(self._frontends))
        taken = own + sum(max(_running(told, tenant), told.may_run.get(tenant, unasked)) for told in others)
        part = math.ceil(max(0, max_sequences - running) / len(self._frontends))
        may_begin = max(0, min(part, max_sequences - taken))
        frontend.may_run[tenant] = own + may_begin
        return Lease(levels, own + may_begin)


def _unasked(max_sequences: int, num_frontends: int) -> int:
    """Return how many sequences a frontend may run before the ledger knows that it has any of this tenant."""
    return max(1, max_sequences // num_frontends)


def _running(frontend: _Frontend, tenant: str) -> int:
    usage = frontend.used.get(tenant)
    return usage.sequences if usage is not None else 0


class CountedSequence(Protocol):
    """A sequence that runs."""

    prompt_tokens: int
    output_tokens: int


class Account:
    """One tenant at this frontend."""

    def __init__(self, tenant: Tenant, leases: Leases, clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self._clock = clock
        self._counts: dict[Rate, int] = dict.fromkeys(RATES, 0)
        """Without the output of sequences that run."""
        self._running: set[CountedSequence] = set()
        self._buckets: dict[Rate, Bucket] = {}
        """How full they are for all frontends."""
        self._own: dict[Rate, int] = dict.fromkeys(RATES, 0)
        """What this frontend had counted when the ledger said that."""
        self._num_frontends = 1
        self.refusals: Counter[str] = Counter()
        """How often each limit refused something."""
        self._max_running = math.inf
        """How many of its sequences may run here at a time."""
        self.take_limits(tenant)
        self.settle(leases, dict(self._counts))

    def take_limits(self, tenant: Tenant) -> None:
        """Go by the limits that the tenant has now."""
        self.tenant = tenant
        now = self._clock()
        for kind, rate in tenant.rates().items():
            self._buckets.setdefault(kind, Bucket(rate, now)).rate = rate
        for kind in self._buckets.keys() - tenant.rates().keys():
            del self._buckets[kind]

    def begin_request(self) -> None:
        """Count a request.  Raises LimitReached."""
        if self._buckets:
            self._check("requests")
        self._counts["requests"] += 1

    def begin(self, sequence: CountedSequence) -> None:
        """Count a sequence, and its prompt, which runs until `end`.  Raises LimitReached."""
        if self._buckets:
            self._check("prompt_tokens")
            self._check("output_tokens")
        if len(self._running) >= self._max_running:
            raise self._refusal("max_sequences", EXCHANGE_S)
        self._counts["prompt_tokens"] += sequence.prompt_tokens
        self._running.add(sequence)

    def end(self, sequence: CountedSequence) -> None:
        """Count its output.  One that has not begun is left out."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._counts["output_tokens"] += sequence.output_tokens

    def usage(self) -> Usage:
        counts = {kind: self._count(kind) for kind in RATES}
        return Usage(counts, len(self._running), self.tenant.rates(), self.tenant.max_sequences)

    def state(self, kind: Rate) -> tuple[float, float, float] | None:
        """Return the most that may be used at once, what is left of it, and the seconds until all of it is there.

        None without such a limit.
        """
        if (bucket := self._buckets.get(kind)) is None:
            return None
        most = bucket.rate * BURST_S
        left = bucket.level(self._clock()) - (self._count(kind) - self._own[kind])
        return most, max(0.0, left), max(0.0, most - left) / bucket.rate

    def left(self, kind: Rate) -> float:
        """Return what this frontend may still use of a limit before the ledger speaks again; infinite without one."""
        if (bucket := self._buckets.get(kind)) is None:
            return math.inf
        own = self._count(kind) - self._own[kind]
        return bucket.level(self._clock()) / self._num_frontends - own

    def settle(self, leases: Leases | None, told: dict[Rate, int]) -> None:
        """Take what the ledger says is left, after it was `told` this frontend's counts; None if it said nothing."""
        now = self._clock()
        if leases is None:
            for kind, bucket in self._buckets.items():
                own = told[kind] - self._own[kind]
                bucket.set(bucket.level(now) - own * self._num_frontends, now)
        else:
            self._num_frontends = leases.num_frontends
            lease = leases.tenants.get(self.tenant.name, Lease({}))
            for kind, level in lease.levels.items():
                if kind in self._buckets:
                    self._buckets[kind].set(level, now)
            self._max_running = self._allowed(lease.max_sequences)
        self._own = told

    def _allowed(self, leased: int | None) -> float:
        if self.tenant.max_sequences is None:
            return math.inf
        if leased is None:  # the ledger does not know of this limit yet
            return _unasked(self.tenant.max_sequences, self._num_frontends)
        return leased

    def _count(self, kind: Rate) -> int:
        running = sum(each.output_tokens for each in list(self._running)) if kind == "output_tokens" else 0
        return self._counts[kind] + running

    def _check(self, kind: Rate) -> None:
        if kind in self._buckets and (left := self.left(kind)) <= 0:
            raise self._refusal(f"{kind}_per_s", max(EXCHANGE_S, -left / self._buckets[kind].rate))

    def _refusal(self, limit: str, retry_after_s: float) -> LimitReached:
        self.refusals[limit] += 1
        return LimitReached(self.tenant.name, limit, round(retry_after_s, 1))


class Accounts:
    """The tenants at this frontend."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._leases = Leases({}, 1)

    def of(self, tenant: Tenant) -> Account:
        """Return the account of a tenant, with the limits that it has now."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant, self._leases, self._clock)
        elif account.tenant is not tenant:
            account.take_limits(tenant)
        return account

    def usage(self) -> dict[str, Usage]:
        """Return what this frontend has counted, by tenant."""
        return {name: account.usage() for name, account in list(self._accounts.items())}

    def refusals(self) -> dict[tuple[str, str], int]:
        """Return how often a limit refused something, by tenant and limit."""
        accounts = list(self._accounts.items())
        return {(name, limit): number for name, account in accounts for limit, number in list(account.refusals.items())}

    def settle(self, leases: Leases | None, told: dict[str, Usage]) -> None:
        """Take what the ledger said after it was `told` that; None if it did not answer."""
        self._leases = leases or self._leases
        for name, usage in told.items():
            self._accounts[name].settle(leases, usage.counts)
