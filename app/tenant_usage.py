"""What tenants use, and whether they may use more: exact over all frontends together, without a hop for each request.

1. A limit is a bucket that fills at its rate, up to what comes in BURST_S.  The ledger has it (deployments/ledger.py).
2. Twice a second each frontend tells the ledger what it has counted, and hears how full the buckets are and how many
   frontends there are.  So in the long run exactly as much is used as comes in, however it is spread.
3. Until the next report a frontend uses at most its equal part of what is in a bucket: its lease.  The last request
   goes ahead if anything is left, as nobody knows how many tokens it will take.  Those behind it wait until the bucket
   has made up for it, and for what a new lease brought while others had not told yet that they used theirs: when all
   come at once after a pause, that is less than half of what was in the bucket.
4. If the ledger does not answer, each frontend takes it that every other one uses as much as itself.

What a tenant may hold at a time is no rate: sequences (`max_sequences`), and tokens of each model's KV memory
(`kv_share`).  Of what is free, each frontend may take its equal part until the next report, as far as what others may
still take leaves it.  While one of them lacks some, those that want none give theirs back.

A sequence holds its prompt and all that it may generate from its beginning on, since its client decides how much of
that it takes.  As above, it goes ahead if anything is left: so all frontends together hold no more than the share and
the last sequence of each, and a long prompt does not wait until all of its memory happens to be free at one frontend.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

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


Held = tuple[Literal["max_sequences", "kv_share"], str]
"""What a tenant holds at a time: the name of its limit, and the model whose KV memory it is of, else an empty name."""
SEQUENCES: Held = ("max_sequences", "")


class Holding(msgspec.Struct):
    """How much of one thing a tenant holds at one frontend now."""

    amount: int = 0
    """Sequences, or tokens."""
    most: int | None = None
    """How much it may hold at all frontends together; None without a limit."""
    wants_more: bool = False
    """Whether any was taken or refused since the last report."""
    lacks: bool = False
    """Whether any was refused since then."""


class Usage(msgspec.Struct):
    """What one tenant has used at one frontend since that began, and what its limits are there."""

    counts: dict[Rate, int]
    rates: dict[Rate, float]
    """What each limit brings in a second, of those that are set."""
    holdings: dict[Held, Holding]


NOTHING = Usage(dict.fromkeys(RATES, 0), {}, {})
NO_HOLDING = Holding()


class Lease(msgspec.Struct):
    """What one tenant has left."""

    levels: dict[Rate, float]
    """For all frontends together."""
    may_hold: dict[Held, int]
    """At the frontend that asked."""


NO_LEASE = Lease({}, {})


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
    may_hold: dict[str, dict[Held, int]]
    """By tenant."""

    def holdings(self, tenant: str) -> dict[Held, Holding]:
        return self.used.get(tenant, NOTHING).holdings

    def holding(self, tenant: str, what: Held) -> Holding:
        return self.holdings(tenant).get(what, NO_HOLDING)

    def claim(self, tenant: str, what: Held, unasked: int) -> int:
        """Return how much it may hold before its next report; `unasked` if it was told nothing of that."""
        may_hold = self.may_hold.get(tenant, {}).get(what, unasked)
        return max(self.holding(tenant, what).amount, may_hold)


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
        tenants = {tenant for told in alive for tenant in told.used}
        return Leases({tenant: self._lease(tenant, frontend, alive, now) for tenant in tenants}, len(alive))

    def _take(self, tenant: str, usage: Usage, before: Usage | None, now: float) -> None:
        for kind in RATES:
            if (rate := usage.rates.get(kind)) is None:
                continue  # not for all frontends yet, when a limit is taken back
            bucket = self._buckets.setdefault((tenant, kind), Bucket(rate, now))
            more = usage.counts[kind] - (before.counts[kind] if before is not None else 0)
            bucket.set(bucket.level(now) - more, now)
            bucket.rate = rate

    def _lease(self, tenant: str, frontend: _Frontend, alive: Sequence[_Frontend], now: float) -> Lease:
        found = {kind: self._buckets.get((tenant, kind)) for kind in RATES}
        levels = {kind: bucket.level(now) for kind, bucket in found.items() if bucket is not None}
        # As the frontend itself knows a limit, if it does.
        known = {what: held for told in alive for what, held in told.holdings(tenant).items()}
        limits = {what: held.most for what, held in (known | frontend.holdings(tenant)).items()}
        frontend.may_hold[tenant] = may_hold = {
            what: _may_hold(tenant, what, most, frontend, alive) for what, most in limits.items() if most is not None
        }
        return Lease(levels, may_hold)


def _may_hold(tenant: str, what: Held, most: int, frontend: _Frontend, alive: Sequence[_Frontend]) -> int:
    """Return how much a tenant may hold at `frontend` until its next report, of `most` at all.

    With what the others may hold that is never more than `most`.  So if more is held, as the last sequence of a
    frontend may take more than was left, a limit is lower than before or this ledger is new, nothing more is begun.
    """
    own = frontend.holding(tenant, what).amount
    free = most - sum(told.holding(tenant, what).amount for told in alive)
    is_short = any(told.holding(tenant, what).lacks for told in alive)
    sharers = [told for told in alive if told.holding(tenant, what).wants_more] if is_short else alive
    more = math.ceil(free / len(sharers)) if free > 0 and frontend in sharers else 0
    unasked = _unasked(most, len(alive))
    claimed = sum(told.claim(tenant, what, unasked) for told in alive if told is not frontend)
    return max(0, min(own + more, most - claimed))


def _unasked(most: int, num_frontends: int) -> int:
    """Return how much a tenant may hold at a frontend before the ledger knows that it holds any there."""
    return most // num_frontends


class CountedSequence(Protocol):
    """A sequence that runs."""

    model: str
    prompt_tokens: int
    output_tokens: int
    most_tokens: int
    """How many it may have at the end, the prompt's included."""


class _OwnHolding:
    """How much of one thing a tenant holds here."""

    def __init__(self) -> None:
        self.amount = 0
        self._most: int | None = None
        self._may_hold = math.inf
        self._wants_more = self._lacks = False

    def limit(self, most: int | None, num_frontends: int) -> None:
        """Go by this limit.  What it leaves here, the ledger says at the next report."""
        if most is None:
            self._may_hold = math.inf
        elif self._most is None:
            self._may_hold = _unasked(most, num_frontends)
        self._most = most

    def settle(self, may_hold: int | None, num_frontends: int) -> None:
        """Take what the ledger says; None if it does not know of this limit yet."""
        if self._most is not None:
            self._may_hold = _unasked(self._most, num_frontends) if may_hold is None else may_hold

    def has_any_left(self) -> bool:
        is_left = self.amount < self._may_hold
        self._wants_more, self._lacks = True, self._lacks or not is_left
        return is_left

    def tell(self) -> Holding:
        """Return what to tell the ledger."""
        told = Holding(self.amount, self._most, self._wants_more, self._lacks)
        self._wants_more = self._lacks = False
        return told


class Account:
    """One tenant at this frontend."""

    def __init__(self, tenant: Tenant, leases: Leases, kv_sizes: Mapping[str, int], clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self._kv_sizes = kv_sizes
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
        self._lease = leases.tenants.get(tenant.name, NO_LEASE)
        self._holdings: dict[Held, _OwnHolding] = {}
        self.take_limits(tenant)
        self.settle(leases, dict(self.ended))

    def take_limits(self, tenant: Tenant) -> None:
        """Go by the limits that the tenant has now."""
        self.tenant = tenant
        now, rates = self._clock(), tenant.rates()
        for kind, rate in rates.items():
            self._buckets.setdefault(kind, Bucket(rate, now)).rate = rate
        for kind in self._buckets.keys() - rates.keys():
            del self._buckets[kind]
        for what, holding in self._holdings.items():
            holding.limit(self._most(what), self._num_frontends)

    def _most(self, what: Held) -> int | None:
        """Return how much of something the tenant may hold; None without a limit.

        Whoever has a share of a model's memory has no limit there before this frontend has seen a replica of it.
        """
        limit, model = what
        if limit == "max_sequences":
            return self.tenant.max_sequences
        share, size = self.tenant.kv_share, self._kv_sizes.get(model)
        return None if share is None or size is None else max(1, int(share * size))

    def _holding(self, what: Held) -> _OwnHolding:
        if (holding := self._holdings.get(what)) is None:
            holding = self._holdings[what] = _OwnHolding()
            holding.limit(self._most(what), self._num_frontends)
            holding.settle(self._lease.may_hold.get(what), self._num_frontends)
        return holding

    def begin_request(self) -> None:
        """Count a request.  Raises LimitReached."""
        if self._buckets:
            self._check("requests")
        self.ended["requests"] += 1

    def begin(self, sequence: CountedSequence, num_together: int = 1, tokens_together: int = 0) -> None:
        """Count a sequence, and its prompt, which runs until `end`.

        `num_together` are those of its request, and may have `tokens_together` at the end.

        Raises LimitReached, and InvalidRequest if they can never run at a time.
        """
        kv: Held = ("kv_share", sequence.model)
        amounts = {SEQUENCES: 1, kv: sequence.most_tokens}
        self._check_request(sequence, num_together, tokens_together)
        if self._buckets:
            self._check("prompt_tokens")
            self._check("output_tokens")
        for what in amounts:
            if not self._holding(what).has_any_left():
                raise self._refusal(what[0], 2 * EXCHANGE_S)
        for what, amount in amounts.items():
            self._holding(what).amount += amount
        self._running.add(sequence)

    def _check_request(self, sequence: CountedSequence, num_together: int, tokens_together: int) -> None:
        """Raise InvalidRequest for what waiting would not help.

        A single sequence may be allowed more tokens than the share has, as clients mostly leave that to the model's
        limit: it then goes ahead as any other, and holds all of the share until its end.
        """
        most = self.tenant.max_sequences
        if most is not None and num_together > most:
            raise InvalidRequest(f"{num_together} sequences in one request are more than `max_sequences` {most} allows")
        most_tokens = self._most(("kv_share", sequence.model))
        if most_tokens is None:
            return
        allowed = f"the {most_tokens} that `kv_share` {self.tenant.kv_share:g} allows of this model's KV memory"
        if sequence.prompt_tokens >= most_tokens:
            raise InvalidRequest(
                f"the prompt has {sequence.prompt_tokens} tokens, and with its answer more than {allowed}"
            )
        if num_together > 1 and tokens_together > most_tokens:
            raise InvalidRequest(
                f"{num_together} sequences in one request may have {tokens_together} tokens (prompt and max_tokens), "
                f"more than {allowed}"
            )

    def end(self, sequence: CountedSequence, *, has_prompt: bool) -> None:
        """Count what it used; `has_prompt`: whether its prompt was computed.  One that has not begun is left out."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._holding(SEQUENCES).amount -= 1
            self._holding(("kv_share", sequence.model)).amount -= sequence.most_tokens
            self.ended["prompt_tokens"] += sequence.prompt_tokens * has_prompt
            self.ended["output_tokens"] += sequence.output_tokens

    def usage(self) -> Usage:
        """Return what to tell the ledger."""
        counts = {kind: self._count(kind) for kind in RATES}
        return Usage(counts, self.tenant.rates(), {what: holding.tell() for what, holding in self._holdings.items()})

    @property
    def num_running(self) -> int:
        return len(self._running)

    def kv_tokens(self) -> dict[str, int]:
        """Return the tokens that its sequences may have at their ends, by model.  Any thread may call this."""
        return {what[1]: holding.amount for what, holding in list(self._holdings.items()) if what != SEQUENCES}

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
            self._lease = leases.tenants.get(self.tenant.name, NO_LEASE)
            for kind, level in self._lease.levels.items():
                if kind in self._buckets:
                    self._buckets[kind].set(level, now)
            for what, holding in self._holdings.items():
                holding.settle(self._lease.may_hold.get(what), self._num_frontends)
        self._own = told

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
        self._kv_sizes: dict[str, int] = {}
        self._leases = Leases({}, 1)

    def of(self, tenant: Tenant) -> Account:
        """Return the account of a tenant."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = Account(tenant, self._leases, self._kv_sizes, self._clock)
        return account

    def follow(self, tenants: Iterable[Tenant], kv_sizes: Mapping[str, int]) -> None:
        """Go by the limits that the file of keys has now.  Who is no longer in it goes once nothing of it runs.

        `kv_sizes` are the tokens that fit into the KV memory of each model's replicas.  A model without any keeps the
        size that it had, as it sleeps or its replicas are being replaced.
        """
        known = {model: size for model, size in kv_sizes.items() if size}
        has_new_sizes = not known.items() <= self._kv_sizes.items()
        self._kv_sizes.update(known)
        found = {tenant.name: tenant for tenant in tenants}
        for name, account in list(self._accounts.items()):
            if (tenant := found.get(name)) is None:
                if not account.num_running:
                    del self._accounts[name]
            elif has_new_sizes or account.tenant is not tenant:
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
