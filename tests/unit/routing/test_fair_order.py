"""Tenants have turns so that each gets tokens by its weight."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.routing.fair_order import FairOrder, Flow

COSTS = st.lists(st.integers(1, 1000), min_size=1, max_size=20)
WEIGHTS = st.floats(0.1, 10.0)


class Tenants:
    """Tenants whose requests wait in turn, by the tokens that each takes."""

    def __init__(self) -> None:
        self.order: FairOrder[Flow] = FairOrder(Flow)
        self.waiting: dict[str, list[float]] = {}
        self.weights: dict[str, float] = {}
        self.got: Counter[str] = Counter()

    def join(self, tenant: str, *tokens: float, weight: float = 1.0, credit: float = 0.0) -> None:
        self.weights[tenant] = weight
        for number in tokens:
            self.order.count(self.order.flow(tenant, credit), 1, number / weight)
            self.waiting.setdefault(tenant, []).append(number)

    def serve(self) -> str:
        (flow,) = self.order.first(1)
        tokens = self.waiting[flow.tenant].pop(0)
        self.order.charge(flow, tokens / self.weights[flow.tenant])
        self.order.count(flow, -1, tokens / self.weights[flow.tenant])
        self.got[flow.tenant] += int(tokens)
        return flow.tenant


@given(COSTS, COSTS, WEIGHTS, WEIGHTS)
def test_two_that_always_wait_get_tokens_by_their_weights_within_one_request_of_each(
    costs_a: list[int], costs_b: list[int], weight_a: float, weight_b: float
) -> None:
    """Theorem 1 of the paper: |W_a / w_a - W_b / w_b| <= max_a / w_a + max_b / w_b."""
    tenants = Tenants()
    tenants.join("a", *costs_a * 5, weight=weight_a)
    tenants.join("b", *costs_b * 5, weight=weight_b)
    bound = max(costs_a) / weight_a + max(costs_b) / weight_b
    while all(tenants.waiting.values()):
        tenants.serve()
        assert abs(tenants.got["a"] / weight_a - tenants.got["b"] / weight_b) <= bound * (1 + 1e-9)


@given(COSTS, st.integers(1, 1000), st.integers(1, 40))
def test_time_in_which_a_tenant_had_nothing_waiting_earns_nothing(costs: list[int], own: int, num_before: int) -> None:
    tenants = Tenants()
    tenants.join("busy", *costs * 60)
    for _ in range(num_before):
        tenants.serve()
    tenants.got.clear()
    tenants.join("idle", *[own] * 100)
    while all(tenants.waiting.values()):
        tenants.serve()
        assert tenants.got["idle"] - tenants.got["busy"] <= own + max(costs)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_who_leaves_the_line_and_comes_back_for_each_request_gets_no_more(own: int, other: int) -> None:
    tenants = Tenants()
    tenants.join("stays", *[other] * 100)
    tenants.join("comes back", own)
    while tenants.waiting["stays"]:
        if tenants.serve() == "comes back":
            tenants.join("comes back", own)
        assert tenants.got["comes back"] - tenants.got["stays"] <= own + other


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(COSTS, WEIGHTS), min_size=1))
def test_nobody_starves_and_all_are_served(wishes: dict[str, tuple[list[int], float]]) -> None:
    """Between two turns of one that waits, another one gets no more than by its weight and one request more."""
    tenants = Tenants()
    for tenant, (costs, weight) in wishes.items():
        tenants.join(tenant, *costs, weight=weight)
    most = max(cost / weight for costs, weight in wishes.values() for cost in costs)
    turns = [tenants.serve() for _ in range(sum(len(costs) for costs, _ in wishes.values()))]
    assert tenants.order.num_waiting == 0
    assert tenants.order.first(1) == []
    for tenant, (costs, weight) in wishes.items():
        at = [-1, *(index for index, name in enumerate(turns) if name == tenant)]
        assert len(at) == 1 + len(costs)
        for begin, end in pairwise(at):
            between = Counter(turns[begin + 1 : end])
            for other, number in between.items():
                cheapest = min(wishes[other][0]) / wishes[other][1]
                assert (number - 2) * cheapest <= max(costs) / weight + most


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([1, 1, -1, 0]), st.integers(1, 100)), max_size=60))
def test_the_numbers_are_right_whoever_comes_leaves_and_is_served(steps: list[tuple[str, int, int]]) -> None:
    tenants = Tenants()
    for tenant, what, tokens in steps:
        mine = tenants.waiting.setdefault(tenant, [])
        if what == 1:
            tenants.join(tenant, tokens)
        elif what == -1 and mine:
            tenants.order.count(tenants.order.flows[tenant], -1, mine.pop())
        elif what == 0 and any(tenants.waiting.values()):
            tenants.serve()
        num_waiting = {name: len(costs) for name, costs in tenants.waiting.items() if costs}
        assert tenants.order.num_waiting == sum(num_waiting.values())
        assert {f.tenant: f.num_waiting for f in tenants.order.first(9)} == num_waiting  # work conservation
        for flow in tenants.order.first(9):
            assert flow.waiting_cost == pytest.approx(sum(tenants.waiting[flow.tenant]))


def test_those_with_nothing_more_to_answer_for_are_forgotten_when_somebody_new_comes() -> None:
    tenants = Tenants()
    tenants.join("busy", *[10] * 50)
    for number in range(20):
        tenants.join(str(number), 1)
    for _ in range(30):
        tenants.serve()
    tenants.join("new", 1)
    assert set(tenants.order.flows) == {"busy", "new"}


@given(st.integers(1, 40), st.integers(1, 30))
def test_what_a_tenant_has_got_is_not_forgotten_because_somebody_new_comes(own: int, num: int) -> None:
    tenants = Tenants()
    tenants.join("busy", *[own] * 200)
    for number in range(num):
        tenants.join("other", own, credit=5 * own)
        while tenants.waiting["other"]:
            tenants.serve()
        tenants.join(f"new {number}", 1)
    assert tenants.got["other"] <= tenants.got["busy"] + own


def test_small_requests_between_large_ones_bring_no_more_credit() -> None:
    tenants = Tenants()
    tenants.join("busy", *[10] * 3000)
    for number in range(100):
        tenants.join("other", *[10] * 20, credit=40)
        while tenants.waiting["other"]:
            tenants.serve()
        tenants.join("other", 1, credit=4)
        while tenants.waiting["other"]:
            tenants.serve()
        for _ in range(3):
            tenants.serve()
        tenants.join(f"new {number}", 1)
    assert tenants.got["other"] <= tenants.got["busy"] + 60


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 100))
def test_who_left_its_part_to_others_may_start_as_much_earlier_as_its_credit(own: int, num: int, before: int) -> None:
    """A flow that others were served before has so many requests in a row: those that it missed, up to its credit."""
    tenants = Tenants()
    tenants.join("busy", *[own] * 400)
    for _ in range(before):
        tenants.serve()
    tenants.join("quiet", *[own] * 20, credit=num * own)
    in_a_row = 0
    while tenants.serve() == "quiet":
        in_a_row += 1
    had = min(num, max(0, before - 1))  # before the first one nobody had anything
    assert had <= in_a_row <= had + 1


@given(st.integers(1, 40), st.integers(0, 200), st.lists(st.integers(0, 12), min_size=1, max_size=60))
def test_over_a_long_time_credit_brings_no_more_than_a_tenants_part(own: int, credit: int, pauses: list[int]) -> None:
    """However it comes and goes, it is never ahead of one that always waits by more than a request."""
    tenants = Tenants()
    tenants.join("busy", *[40] * 1000)
    for pause in pauses:
        for _ in range(pause):
            tenants.serve()
        tenants.join("other", own, credit=credit)
        while tenants.waiting["other"]:
            tenants.serve()
        assert tenants.got["other"] <= tenants.got["busy"] + own + 40


def test_what_goes_before_a_newcomer_is_predicted_by_the_weights() -> None:
    tenants = Tenants()
    tenants.join("flood", *[100] * 10)
    tenants.join("half", *[100], weight=0.5)
    order, flood, half = tenants.order, tenants.order.flow("flood"), tenants.order.flow("half")
    new = order.flow("new")
    assert (order.share_before(new, flood), order.share_before(new, half)) == (0.0, 0.0)
    assert order.share_before(half, flood) == pytest.approx(0.2)  # 100 tokens at weight 0.5 are 200 of the flood's
    assert order.share_before(flood, half) == order.share_before(flood, flood) == 1.0
    assert order.last() is flood
