"""What tenants use, and whether they may use more: exact over all frontends together, without a hop for each request.

1. A limit is a bucket that fills at its rate, up to what comes in BURST_S.  The ledger has it (deployments/ledger.py).
2. Twice a second each frontend tells the ledger what it has counted, and hears how full the buckets are and how many
   frontends there are.  So in the long run exactly as much is used as comes in, however it is spread.
3. Until the next report a frontend uses at most its equal part of what is in a bucket: its lease.  So together they use
   no more than there is, but for the last request of each: that goes ahead if anything is left, as nobody knows how
   many tokens it will take, and those behind it wait until the bucket has made up for it.
4. If the ledger does not answer, each frontend takes it that every other one uses as much as itself.

Sequences at a time are no rate.  Of those that are free, each frontend may begin its equal part until the next report,
as far as what others may still begin leaves it.  While one of them lacks some, those that want none give theirs back.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from app.errors import InvalidRequest, LimitReached
from app.tenants import RATES, Rate, Tenant

EXCHANGE_S = 0.5
"""How often a frontend talks to the ledger.  A call takes 1 ms, and what it brings is as old as this at most."""
BURST_S = 10.0
"""What a limit brings in so many seconds may be used at once by a tenant that has used nothing before.  With N
frontends this must be several times N * EXCHANGE_S, as each uses only its part of it in that time."""
GONE_S, FORGOTTEN_S = 5.0, 600.0
"""A frontend that has told nothing for so long is gone, and its sequences with it; later its counts are too."""


class Usage(msgspec.Struct):
    """What one tenant has used at one frontend since that began, and what its limits are there."""

    counts: dict[Rate, int]
    sequences: int
    """Those that run now."""
    rates: dict[Rate, float]
    """What each limit brings in a second, of those that are set."""
    max_sequences: int | None = None
    wants_sequences: bool = False
    """Whether any began or were refused since the last report."""
    lacks_sequences: bool = False
    """Whether any were refused since then."""


NOTHING = Usage(dict.fromkeys(RATES, 0), 0, {})


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


class _Frontend(msgspec.Struct, eq=False):
    """What one frontend told last, and what it may do."""

    told_at: float
    used: dict[str, Usage]
    may_run: dict[str, int]
    """Sequences at a time, by tenant."""

    def usage(self, tenant: str) -> Usage:
        return self.used.get(tenant, NOTHING)


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
        self._frontends = {each: told for each, told in self._frontends.items() if told.told_at >= now - FORGOTTEN_S}
        alive = [told for told in self._frontends.values() if told.told_at >= now - GONE_S]
        tenants = {tenant: usage for told in alive for tenant, usage in told.used.items()} | used
        leases = {
            tenant: self._lease(tenant, usage.max_sequences, frontend, alive, now) for tenant, usage in tenants.items()
        }
        return Leases(leases, len(alive))

    def _take(self, tenant: str, usage: Usage, before: Usage | None, now: float) -> None:
        for kind in RATES:
            if (rate := usage.rates.get(kind)) is None:
                continue  # not for all frontends yet, when a limit is taken back
            bucket = self._buckets.setdefault((tenant, kind), Bucket(rate, now))
            more = usage.counts[kind] - (before.counts[kind] if before is not None else 0)
            bucket.set(bucket.level(now) - more, now)
            bucket.rate = rate

    def _lease(
        self, tenant: str, max_sequences: int | None, frontend: _Frontend, alive: Sequence[_Frontend], now: float
    ) -> Lease:
        found = {kind: self._buckets.get((tenant, kind)) for kind in RATES}
        levels = {kind: bucket.level(now) for kind, bucket in found.items() if bucket is not None}
        if max_sequences is None:
            frontend.may_run.pop(tenant, None)
            return Lease(levels)
        frontend.may_run[tenant] = may_run = _may_run(tenant, max_sequences, frontend, alive)
        return Lease(levels, may_run)


def _may_run(tenant: str, max_sequences: int, frontend: _Frontend, alive: Sequence[_Frontend]) -> int:
    """Return how many sequences of a tenant `frontend` may run until its next report."""
    own = frontend.usage(tenant)
    others = [told for told in alive if told is not frontend]
    free = max_sequences - own.sequences - sum(told.usage(tenant).sequences for told in others)
    if free < 0:  # the limit is lower than before, or this ledger new: what runs may end, and nothing takes its place
        num_running = sum(bool(told.usage(tenant).sequences) for told in alive)
        return max(0, own.sequences - math.ceil(-free / max(1, num_running)))
    is_short = any(told.usage(tenant).lacks_sequences for told in alive)
    sharers = [told for told in alive if told.usage(tenant).wants_sequences] if is_short else alive
    if frontend not in sharers:
        return own.sequences
    unasked = _unasked(max_sequences, len(alive))
    claimed = sum(max(told.usage(tenant).sequences, told.may_run.get(tenant, unasked)) for told in others)
    return own.sequences + max(0, min(math.ceil(free / len(sharers)), max_sequences - own.sequences - claimed))


def _unasked(max_sequences: int, num_frontends: int) -> int:
    """Return how many sequences a frontend may run before the ledger knows that it has any of this tenant."""
    return max_sequences // num_frontends


class CountedSequence(Protocol):
    """A sequence that runs."""

    prompt_tokens: int
    output_tokens: int


class Account:
    """One tenant at this frontend."""

    def __init__(self, tenant: Tenant, leases: Leases, clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self._clock = clock
        self.ended: dict[Rate, int] = dict.fromkeys(RATES, 0)
        """What requests and ended sequences have used."""
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
        self._wants = self._lacks = False
        self.settle(leases, dict(self.ended))

    def take_limits(self, tenant: Tenant) -> None:
        """Go by the limits that the tenant has now."""
        self.tenant = tenant
        now, rates = self._clock(), tenant.rates()
        for kind, rate in rates.items():
            self._buckets.setdefault(kind, Bucket(rate, now)).rate = rate
        for kind in self._buckets.keys() - rates.keys():
            del self._buckets[kind]

    def begin_request(self) -> None:
        """Count a request.  Raises LimitReached."""
        if self._buckets:
            self._check("requests")
        self.ended["requests"] += 1

    def begin(self, sequence: CountedSequence, num_together: int = 1) -> None:
        """Count a sequence, and its prompt, which runs until `end`; `num_together` are those of its request.

        Raises LimitReached, and InvalidRequest if so many can never run at a time.
        """
        most = self.tenant.max_sequences
        if most is not None and num_together > most:
            raise InvalidRequest(f"{num_together} sequences in one request are more than `max_sequences` {most} allows")
        if self._buckets:
            self._check("prompt_tokens")
            self._check("output_tokens")
        self._wants = True
        if len(self._running) >= self._max_running:
            self._lacks = True
            raise self._refusal("max_sequences", 2 * EXCHANGE_S)
        self._running.add(sequence)

    def end(self, sequence: CountedSequence, *, has_prompt: bool) -> None:
        """Count what it used; `has_prompt`: whether its prompt was computed.  One that has not begun is left out."""
        if sequence in self._running:
            self._running.remove(sequence)
            self.ended["prompt_tokens"] += sequence.prompt_tokens * has_prompt
            self.ended["output_tokens"] += sequence.output_tokens

    def usage(self) -> Usage:
        """Return what to tell the ledger."""
        counts = {kind: self._count(kind) for kind in RATES}
        told = Usage(
            counts, len(self._running), self.tenant.rates(), self.tenant.max_sequences, self._wants, self._lacks
        )
        self._wants = self._lacks = False
        return told

    @property
    def num_running(self) -> int:
        return len(self._running)

    def state(self, kind: Rate) -> tuple[float, float, float] | None:
        """Return the most that may be used at once, what is left of it, and the seconds until all of it is there.

        None without such a limit.
        """
        if (bucket := self._buckets.get(kind)) is None:
            return None
        most, left = bucket.rate * BURST_S, self._left_of_all(kind)
        return most, max(0.0, left), max(0.0, most - left) / bucket.rate

    def left(self, kind: Rate) -> float:
        """Return what this frontend may still use of a limit before the ledger speaks again; infinite without one."""
        if (bucket := self._buckets.get(kind)) is None:
            return math.inf
        return bucket.level(self._clock()) / self._num_frontends - self._own_since(kind)

    def _left_of_all(self, kind: Rate) -> float:
        """Return what is left if the others have used nothing since the ledger spoke."""
        return self._buckets[kind].level(self._clock()) - self._own_since(kind)

    def _own_since(self, kind: Rate) -> int:
        return self._count(kind) - self._own[kind]

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
        """Return what has been used of a limit, by sequences that run too."""
        match kind:
            case "prompt_tokens":
                return self.ended[kind] + sum(each.prompt_tokens for each in self._running)
            case "output_tokens":
                return self.ended[kind] + sum(each.output_tokens for each in self._running)
        return self.ended[kind]

    def _check(self, kind: Rate) -> None:
        if kind in self._buckets and self.left(kind) <= 0:
            lacking = max(0.0, -self._left_of_all(kind))
            raise self._refusal(f"{kind}_per_s", max(EXCHANGE_S, lacking / self._buckets[kind].rate))

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
        """Return the account of a tenant."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant, self._leases, self._clock)
        return account

    def follow(self, tenants: Iterable[Tenant]) -> None:
        """Go by the limits that the file of keys has now.  Who is no longer in it goes once nothing of it runs."""
        found = {tenant.name: tenant for tenant in tenants}
        for name, account in list(self._accounts.items()):
            if (tenant := found.get(name)) is None:
                if not account.num_running:
                    del self._accounts[name]
            elif account.tenant is not tenant:
                account.take_limits(tenant)

    def all(self) -> dict[str, Account]:
        """Return the accounts by tenant.  Any thread may call this."""
        return dict(self._accounts)

    def usage(self) -> dict[str, Usage]:
        """Return what to tell the ledger, by tenant."""
        return {name: account.usage() for name, account in self._accounts.items()}

    def settle(self, leases: Leases | None, told: dict[str, Usage]) -> None:
        """Take what the ledger said after it was `told` that; None if it did not answer."""
        self._leases = leases or self._leases
        for name, usage in told.items():
            self._accounts[name].settle(leases, usage.counts)
