"""Limits of tenants over several frontends: exact however the load is spread, and when frontends or the ledger die."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest, LimitReached
from app.tenant_usage import BURST_S, EXCHANGE_S, GONE_S, Account, Accounts, Ledger
from app.tenants import Tenant

STEP_S = 0.01


class Sequence(msgspec.Struct, eq=False):
    prompt_tokens: int = 0
    output_tokens: int = 0
    most_tokens: int = 0
    model: str = "m"


@contextmanager
def counted(account: Account, sequence: Sequence) -> Iterator[None]:
    account.begin(sequence)
    try:
        yield
    finally:
        account.end(sequence, has_prompt=True)


class Fleet:
    """Frontends that talk to one ledger, each at its own moments."""

    def __init__(self, num: int, tenant: Tenant, **kv_sizes: int) -> None:
        self.now = 100.0
        self.tenant = tenant
        self.kv_sizes = kv_sizes
        self.ledger: Ledger | None = Ledger(self.clock)
        self.frontends = [Accounts(self.clock) for _ in range(num)]
        self.names = [f"frontend-{index}" for index in range(num)]
        self._due = [self.now + index * EXCHANGE_S / num for index in range(num)]
        for index in [*range(num)] * 2:  # so that each knows of all
            self.exchange(index)

    def clock(self) -> float:
        return self.now

    def exchange(self, index: int) -> None:
        accounts = self.frontends[index]
        accounts.follow([self.tenant], self.kv_sizes)
        told = accounts.usage()
        accounts.settle(self.ledger.exchange(self.names[index], told) if self.ledger is not None else None, told)

    def tick(self) -> None:
        self.now += STEP_S
        for index, due in enumerate(self._due):
            if self.now >= due:
                self._due[index] = self.now + EXCHANGE_S
                self.exchange(index)

    def account(self, index: int) -> Account:
        return self.frontends[index].of(self.tenant)

    def begins_request(self, index: int) -> bool:
        try:
            self.account(index).begin_request()
        except LimitReached:
            return False
        return True


@pytest.mark.parametrize("num_frontends", [1, 2, 4, 8])
@pytest.mark.parametrize("spread", ["even", "one", "skewed", "moving"])
def test_a_flood_gets_what_the_limit_allows(num_frontends: int, spread: str) -> None:
    """Requests come at five times the limit, however they are spread."""
    rate, seconds = 50.0, 60.0
    fleet, random = Fleet(num_frontends, Tenant(name="a", requests_per_s=rate)), Random(1)

    def frontend() -> int:
        if spread == "one":
            return 0
        if spread == "skewed":
            return min(random.randrange(num_frontends), random.randrange(num_frontends))
        if spread == "moving":
            return int(fleet.now / 7) % num_frontends
        return random.randrange(num_frontends)

    def flood(seconds: float) -> int:
        until, served = fleet.now + seconds, 0
        while fleet.now < until:
            fleet.tick()
            served += sum(fleet.begins_request(frontend()) for _ in range(round(5 * rate * STEP_S)))
        return served

    flood(BURST_S)  # what had come in before is used
    assert flood(seconds) == pytest.approx(rate * seconds, rel=0.05)


@pytest.mark.parametrize("num_frontends", [1, 2, 4])
def test_tokens_are_exact_whatever_one_request_takes(num_frontends: int) -> None:
    """Each takes several seconds' worth, and its output is known only as it comes."""
    tenant = Tenant(name="a", prompt_tokens_per_s=1000, output_tokens_per_s=200)
    fleet, random = Fleet(num_frontends, tenant), Random(2)
    used: list[tuple[float, int, int]] = []
    running: list[tuple[float, Sequence, ExitStack]] = []
    while fleet.now < 400:
        fleet.tick()
        for each in list(running):
            ends_at, sequence, stack = each
            if fleet.now >= ends_at:
                stack.close()
                running.remove(each)
            elif random.random() < 0.3:
                sequence.output_tokens += 1
                used.append((fleet.now, 0, 1))
        stack, sequence = ExitStack(), Sequence(random.randrange(1, 6000))
        try:
            stack.enter_context(counted(fleet.account(random.randrange(num_frontends)), sequence))
        except LimitReached:
            continue
        used.append((fleet.now, sequence.prompt_tokens, 0))
        running.append((fleet.now + random.uniform(1, 8), sequence, stack))
    late = [each for each in used if each[0] >= 160]
    prompt, output = sum(each[1] for each in late) / 240, sum(each[2] for each in late) / 240
    assert prompt <= 1000 * 1.05
    assert output <= 200 * 1.05
    assert max(prompt / 1000, output / 200) >= 0.95, "one of the two is what is short, and is used up"


class Flood:
    """Clients that begin sequences of some 10 s whenever they may, by the frontends that `choose` draws."""

    def __init__(self, fleet: Fleet, choose: Callable[[], int], most_tokens: int = 0) -> None:
        self.fleet = fleet
        self._most_tokens = most_tokens
        self.running: list[tuple[float, ExitStack]] = []
        self._choose = choose
        self._random = Random(3)

    def go_on(self, seconds: float) -> list[int]:
        """Return how many ran at each moment."""
        until, counts = self.fleet.now + seconds, []
        while self.fleet.now < until:
            self.fleet.tick()
            for each in list(self.running):
                if self.fleet.now >= each[0]:
                    each[1].close()
                    self.running.remove(each)
            for _ in range(4):
                stack = ExitStack()
                try:
                    sequence = Sequence(most_tokens=self._most_tokens)
                    stack.enter_context(counted(self.fleet.account(self._choose()), sequence))
                except LimitReached:
                    continue
                self.running.append((self.fleet.now + self._random.expovariate(1 / 10), stack))
            counts.append(len(self.running))
        return counts


@pytest.mark.parametrize("most", [1, 2, 3, 10, 16])
@pytest.mark.parametrize("num_frontends", [1, 2, 4, 8])
@pytest.mark.parametrize("spread", ["even", "one"])
def test_all_of_the_sequences_run_wherever_they_are_asked_for(most: int, num_frontends: int, spread: str) -> None:
    fleet, random = Fleet(num_frontends, Tenant(name="a", max_sequences=most)), Random(3)
    for index in range(num_frontends):  # each has had one
        with suppress(LimitReached), counted(fleet.account(index), Sequence()):
            pass
    flood = Flood(fleet, lambda: random.randrange(num_frontends) if spread == "even" else 0)
    flood.go_on(20)
    counts = flood.go_on(60)
    assert max(counts) == most
    assert sum(counts) / len(counts) >= 0.85 * most


@pytest.mark.parametrize("num_frontends", [1, 2, 8])
def test_a_lowered_limit_lets_run_what_runs_and_begins_no_more(num_frontends: int) -> None:
    fleet, random = Fleet(num_frontends, Tenant(name="a", max_sequences=40)), Random(3)
    flood = Flood(fleet, lambda: random.randrange(num_frontends))
    assert flood.go_on(30)[-1] >= 36
    fleet.tenant = Tenant(name="a", max_sequences=4)
    flood.go_on(60)
    assert max(flood.go_on(30)) <= 4


def test_a_new_ledger_brings_what_runs_back_under_the_limit() -> None:
    fleet, random = Fleet(8, Tenant(name="a", max_sequences=16)), Random(3)
    flood = Flood(fleet, lambda: random.randrange(8))
    flood.go_on(30)
    fleet.ledger = Ledger(fleet.clock)
    flood.go_on(60)
    assert max(flood.go_on(30)) <= 16


def test_more_sequences_in_one_request_than_may_ever_run_are_a_fault_of_the_request() -> None:
    account = Fleet(1, Tenant(name="a", max_sequences=2)).account(0)
    with pytest.raises(InvalidRequest, match="3 sequences in one request are more than `max_sequences` 2 allows"):
        account.begin(Sequence(), 3)


class Memory:
    """Sequences that hold a tenant's share of the memory of one model, `most` tokens, over several frontends."""

    def __init__(self, num_frontends: int, most: int) -> None:
        self.fleet = Fleet(num_frontends, Tenant(name="a", kv_share=0.5), m=2 * most)
        self._running: list[list[Sequence]] = [[] for _ in range(num_frontends)]
        self.largest = [0] * num_frontends
        """The largest sequence that each frontend has begun."""

    def held(self) -> int:
        return sum(sequence.most_tokens for each in self._running for sequence in each)

    def begins(self, index: int, most_tokens: int) -> bool:
        sequence = Sequence(most_tokens=most_tokens)
        try:
            self.fleet.account(index).begin(sequence)
        except LimitReached:
            return False
        self._running[index].append(sequence)
        self.largest[index] = max(self.largest[index], most_tokens)
        return True

    def end(self, index: int, num: int) -> None:
        """End the first sequences of a frontend."""
        ended, self._running[index] = self._running[index][:num], self._running[index][num:]
        for sequence in ended:
            self.fleet.account(index).end(sequence, has_prompt=True)

    def wait(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.fleet.tick()


MOVES = st.lists(
    st.tuples(st.sampled_from(["begin", "begin", "end", "wait"]), st.integers(0, 3), st.integers(1, 100)),
    min_size=10,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.sampled_from([2, 100]), st.sampled_from([1, 10, 300]), MOVES)
def test_no_more_of_the_memory_than_the_share_and_the_last_sequence_of_each_frontend(
    num_frontends: int, most: int, most_tokens: int, moves: list[tuple[str, int, int]]
) -> None:
    """Whatever each does and when; and all of it is there for a frontend that is the only one to want it."""
    memory = Memory(num_frontends, most)
    for move, frontend, number in moves:
        index = frontend % num_frontends
        if move == "begin":
            for _ in range(number):
                memory.begins(index, most_tokens)
        elif move == "end":
            memory.end(index, number)
        else:
            memory.wait(number)
        assert memory.held() < most + max(1, sum(memory.largest))
    for index in range(num_frontends):
        memory.end(index, 100 * len(moves))
    for _ in range(5):
        memory.wait(round(EXCHANGE_S / STEP_S))
        while memory.begins(0, 1):
            pass
    assert memory.held() == most


def test_while_more_than_the_share_is_held_nothing_begins_anywhere() -> None:
    memory = Memory(2, most=100)
    assert [memory.begins(0, each) for each in (1, 48, 60)] == [True] * 3, "the last one goes ahead with 1 token left"
    memory.wait(100)
    memory.end(0, 1)
    assert [memory.begins(index, 1) for index in range(2)] == [False] * 2
    memory.wait(100)
    assert [memory.begins(index, 1) for index in range(2)] == [False] * 2
    memory.end(0, 1)
    memory.wait(200)
    assert [memory.begins(index, 1) for index in range(2)] == [True] * 2


@pytest.mark.parametrize("num_frontends", [1, 2, 4])
@pytest.mark.parametrize("spread", ["even", "one"])
def test_all_of_the_memory_is_filled_wherever_it_is_asked_for(num_frontends: int, spread: str) -> None:
    fleet, random = Fleet(num_frontends, Tenant(name="a", kv_share=0.1), m=100_000), Random(3)
    flood = Flood(fleet, lambda: random.randrange(num_frontends) if spread == "even" else 0, most_tokens=100)
    flood.go_on(20)
    counts = flood.go_on(60)
    assert max(counts) * 100 < 10_000 + num_frontends * 100
    assert sum(counts) / len(counts) * 100 >= 0.85 * 10_000


def test_each_model_has_a_share_of_its_own_memory() -> None:
    fleet = Fleet(1, Tenant(name="a", kv_share=0.5), m=100, n=1000)
    account = fleet.account(0)
    account.begin(Sequence(most_tokens=50))
    with pytest.raises(LimitReached) as caught:
        account.begin(Sequence(most_tokens=1))
    assert (caught.value.limit, caught.value.retry_after_s) == ("kv_share", 2 * EXCHANGE_S)
    account.begin(Sequence(most_tokens=499, model="n"))
    account.begin(Sequence(most_tokens=1, model="n"))
    assert account.kv_tokens() == {"m": 50, "n": 500}
    with pytest.raises(LimitReached):
        account.begin(Sequence(most_tokens=1, model="n"))


def test_a_sequence_that_its_memory_has_no_room_for_is_no_sequence() -> None:
    fleet = Fleet(1, Tenant(name="a", kv_share=0.5, max_sequences=2), m=100)
    account = fleet.account(0)
    with counted(account, Sequence(most_tokens=50)):
        refused = Sequence(most_tokens=1)
        with pytest.raises(LimitReached, match="kv_share"):
            account.begin(refused)
        account.end(refused, has_prompt=False)
        assert account.num_running == 1
        assert account.kv_tokens() == {"m": 50}
    with counted(account, Sequence(most_tokens=1)), counted(account, Sequence(most_tokens=1)):
        pass


def test_what_never_fits_into_the_share_is_a_fault_of_the_request() -> None:
    account = Fleet(1, Tenant(name="a", kv_share=0.5), m=200).account(0)
    with pytest.raises(InvalidRequest, match=r"100 tokens.* `kv_share` 0\.5 allows"):
        account.begin(Sequence(100, most_tokens=101))
    with pytest.raises(InvalidRequest, match=r"2 sequences .* 101 tokens .* `kv_share` 0\.5 allows"):
        account.begin(Sequence(50, most_tokens=51), 2, 101)
    with counted(account, Sequence(99, most_tokens=4000)):
        pass
    account.begin(Sequence(49, most_tokens=50), 2, 100)
    account.begin(Sequence(49, most_tokens=50), 2, 100)


def test_the_share_goes_by_the_replicas_that_there_are() -> None:
    fleet = Fleet(1, Tenant(name="a", kv_share=0.5))
    account = fleet.account(0)

    def admits() -> bool:
        sequence = Sequence(most_tokens=1)
        try:
            account.begin(sequence)
        except LimitReached:
            return False
        account.end(sequence, has_prompt=True)
        return True

    account.begin(Sequence(most_tokens=70))  # nobody knows yet how much memory there is
    # No memory at all says nothing: the model sleeps, or its replicas are being replaced.
    for size, is_admitted in [(100, False), (200, True), (0, True), (100, False), (0, False)]:
        fleet.kv_sizes = {"m": size}
        fleet.exchange(0)
        assert admits() == is_admitted, size


def test_a_prompt_that_nobody_computed_is_given_back() -> None:
    fleet = Fleet(1, Tenant(name="a", prompt_tokens_per_s=10))
    for _ in range(50):
        sequence = Sequence(1000)
        fleet.account(0).begin(sequence)
        assert fleet.account(0).left("prompt_tokens") < 0
        fleet.account(0).end(sequence, has_prompt=False)
    assert fleet.account(0).left("prompt_tokens") == 10 * BURST_S


@pytest.mark.parametrize("before", [None, 5.0])
def test_a_limit_that_changes_while_a_frontend_is_idle_holds_for_all(before: float | None) -> None:
    fleet = Fleet(2, Tenant(name="a", requests_per_s=before))
    for index in range(2):
        assert fleet.begins_request(index)
    fleet.tenant = Tenant(name="a", requests_per_s=20)

    def flood(seconds: float) -> int:
        until, served = fleet.now + seconds, 0
        while fleet.now < until:
            fleet.tick()
            served += sum(fleet.begins_request(0) for _ in range(3))
        return served

    flood(BURST_S + 2)
    assert flood(30) == pytest.approx(20 * 30, rel=0.05)


def test_a_tenant_that_is_taken_out_of_the_file_leaves_nothing() -> None:
    accounts = Accounts()
    tenant = Tenant(name="a")
    sequence = Sequence()
    accounts.of(tenant).begin(sequence)
    accounts.follow([], {})
    assert accounts.all()
    accounts.of(tenant).end(sequence, has_prompt=True)
    accounts.follow([], {})
    assert not accounts.all()


def test_a_frontend_that_was_silent_for_a_while_has_not_used_nothing() -> None:
    fleet = Fleet(1, Tenant(name="a", requests_per_s=2))
    assert fleet.begins_request(0)
    fleet.exchange(0)
    while fleet.begins_request(0):
        pass
    fleet.now += 2 * GONE_S
    fleet.exchange(0)
    assert fleet.account(0).left("requests") <= 2


@pytest.mark.parametrize("num_frontends", [1, 4])
def test_who_is_refused_is_told_the_whole_time_by_any_number_of_frontends(num_frontends: int) -> None:
    fleet = Fleet(num_frontends, Tenant(name="a", prompt_tokens_per_s=10))
    with counted(fleet.account(0), Sequence(500)):
        pass
    with pytest.raises(LimitReached) as caught:
        fleet.account(0).begin(Sequence(1))
    assert caught.value.retry_after_s == pytest.approx((500 - 10 * BURST_S) / 10)


def test_a_tenant_that_has_used_nothing_has_a_burst_and_no_more() -> None:
    fleet = Fleet(1, Tenant(name="a", requests_per_s=2))
    served = 0
    while fleet.begins_request(0):
        served += 1
    assert served == 2 * BURST_S
    with pytest.raises(LimitReached) as caught:
        fleet.account(0).begin_request()
    assert (caught.value.tenant, caught.value.limit) == ("a", "requests_per_s")
    assert caught.value.retry_after_s == EXCHANGE_S
    fleet.exchange(0)
    fleet.now += 1000
    fleet.exchange(0)
    assert sum(fleet.begins_request(0) for _ in range(1000)) == 2 * BURST_S, "idle time earns no more than that"


def test_who_is_refused_is_told_when_it_has_made_up_for_its_last_request() -> None:
    fleet = Fleet(1, Tenant(name="a", prompt_tokens_per_s=100))
    account = fleet.account(0)
    with counted(account, Sequence(3000)):
        pass
    with pytest.raises(LimitReached) as caught, counted(account, Sequence(1)):
        pass
    assert caught.value.retry_after_s == pytest.approx((3000 - 100 * BURST_S) / 100)
    for _ in range(round(caught.value.retry_after_s / STEP_S) + 1):
        fleet.tick()
    with counted(account, Sequence(1)):
        pass


def test_without_limits_nothing_is_refused() -> None:
    fleet = Fleet(2, Tenant(name="a"))
    assert all(fleet.begins_request(0) for _ in range(1000))
    assert fleet.account(0).left("requests") == math.inf
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(counted(fleet.account(0), Sequence(10**6, 10**6)))


def test_a_frontend_that_begins_late_knows_what_is_left() -> None:
    fleet = Fleet(1, Tenant(name="a", requests_per_s=2))
    while fleet.begins_request(0):
        pass
    fleet.exchange(0)
    late = Accounts(fleet.clock)
    assert fleet.ledger is not None
    late.settle(fleet.ledger.exchange("late", {}), {})
    with pytest.raises(LimitReached):
        late.of(fleet.tenant).begin_request()


def test_a_frontends_death_gives_nothing_back_but_its_sequences() -> None:
    fleet = Fleet(2, Tenant(name="a", requests_per_s=2, max_sequences=2))
    while fleet.begins_request(1):
        pass
    stack = ExitStack()
    stack.enter_context(counted(fleet.account(1), Sequence()))
    fleet.exchange(1)
    fleet.exchange(0)
    left = fleet.account(0).left("requests")
    fleet.names[1] = "frontend-9"  # another process, which has counted nothing
    fleet.frontends[1] = Accounts(fleet.clock)
    for _ in range(round(6 / STEP_S)):
        fleet.tick()
    assert fleet.account(0).left("requests") <= (left + 6 * 2) + 0.1
    with ExitStack() as both:
        both.enter_context(counted(fleet.account(0), Sequence()))
        for _ in range(round(2 * EXCHANGE_S / STEP_S)):
            fleet.tick()
        both.enter_context(counted(fleet.account(1), Sequence()))


@pytest.mark.parametrize("num_frontends", [1, 4])
def test_without_a_ledger_an_even_load_still_gets_its_limit(num_frontends: int) -> None:
    rate = 50.0
    fleet, random = Fleet(num_frontends, Tenant(name="a", requests_per_s=rate)), Random(4)

    def flood(seconds: float) -> int:
        until, served = fleet.now + seconds, 0
        while fleet.now < until:
            fleet.tick()
            served += sum(fleet.begins_request(random.randrange(num_frontends)) for _ in range(3))
        return served

    flood(BURST_S)
    fleet.ledger = None
    assert flood(30) == pytest.approx(rate * 30, rel=0.1)
    fleet.ledger = Ledger(fleet.clock)  # begins with full buckets, and with frontends that have counted much
    flood(BURST_S)
    assert flood(30) == pytest.approx(rate * 30, rel=0.05)


def test_a_changed_limit_holds_from_the_next_report_on() -> None:
    fleet = Fleet(1, Tenant(name="a", requests_per_s=1000))
    assert all(fleet.begins_request(0) for _ in range(100))
    fleet.tenant = Tenant(name="a", requests_per_s=1)
    fleet.exchange(0)
    assert sum(fleet.begins_request(0) for _ in range(100)) <= BURST_S
    fleet.tenant = Tenant(name="a")
    fleet.exchange(0)
    assert all(fleet.begins_request(0) for _ in range(100))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_never_more_than_came_in_and_one_request_of_each_frontend(data: st.DataObject) -> None:
    """Whatever each does and when: no window has more than its burst and a half, its rate and the last ones of all."""
    num = data.draw(st.integers(1, 5))
    rate = data.draw(st.sampled_from([3.0, 20.0, 100.0]))
    fleet = Fleet(num, Tenant(name="a", requests_per_s=rate))
    began, served = fleet.now, 0
    for _ in range(data.draw(st.integers(1, 30))):
        index, tries = data.draw(st.integers(0, num - 1)), data.draw(st.integers(0, 400))
        served += sum(fleet.begins_request(index) for _ in range(tries))
        for _ in range(data.draw(st.integers(0, 120))):
            fleet.tick()
    assert served <= rate * (1.5 * BURST_S + fleet.now - began) + num
