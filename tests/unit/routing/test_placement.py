"""Which way a request takes: by what it says, by times and room, or by a fixed policy; and how ``baton verify``'s
control run corrupts a prompt.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.config import PredictedPlacement, RemotePlacement, SloConfig, ThresholdPlacement
from app.messages import GenerateRequest, PrefillMode
from app.routing.decision import Candidate, Lack, Way
from app.routing.placement import (
    EASY,
    NEAR,
    NEAR_S,
    PlacementPolicy,
    Prospect,
    choose_in_time,
    corrupt_prompt,
    demanded,
    place,
)
from tests.unit.decisions import local_way, remote_way

token_ids = st.integers(0, 200_000)
prompts = st.one_of(
    st.lists(token_ids, min_size=1),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),  # few tokens, many repetitions
    st.builds(lambda token, length: [token] * length, token_ids, st.integers(1, 40)),
)


def request(prompt: list[int], sampling: dict[str, Any] | None = None, mode: PrefillMode = "auto") -> GenerateRequest:
    return GenerateRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling or {}, prefill_mode=mode)


@pytest.mark.parametrize(
    ("mode", "sampling", "expected"),
    [
        ("auto", {}, None),
        ("auto", {"logprobs": 1}, None),
        ("auto", {"prompt_logprobs": None}, None),
        ("auto", {"prompt_logprobs": 0}, ("local", "prompt_logprobs")),
        ("auto", {"prompt_logprobs": 5}, ("local", "prompt_logprobs")),
        ("local", {"prompt_logprobs": 5}, ("local", "requested")),
        ("remote", {}, ("remote", "requested")),
        ("corrupted", {}, ("remote", "requested")),
    ],
)
def test_what_a_request_demands(mode: PrefillMode, sampling: dict[str, Any], expected: tuple[str, str] | None) -> None:
    assert demanded(request([1, 2], sampling, mode)) == expected


@given(prompts)
@example([5])
@example([5, 5])
@example([5, 6, 6])
@example([6, 6, 5])
def test_a_corrupted_prompt_has_the_same_length_and_other_tokens(prompt: list[int]) -> None:
    corrupted = corrupt_prompt(request(prompt)).prompt_token_ids
    assert len(corrupted) == len(prompt)
    assert corrupted != prompt


@given(prompts.filter(lambda prompt: len(prompt) > 1))
def test_a_corrupted_prompt_differs_before_its_last_token(prompt: list[int]) -> None:
    # Decode computes the last token's KV itself, so a difference there alone would change nothing.
    assert corrupt_prompt(request(prompt)).prompt_token_ids[:-1] != prompt[:-1]


@given(prompts)
@example([0])
@example([151_935])  # may be the last id of the vocabulary
def test_a_corrupted_prompt_stays_in_the_vocabulary(prompt: list[int]) -> None:
    corrupted = corrupt_prompt(request(prompt)).prompt_token_ids
    assert min(corrupted) >= 0
    assert max(corrupted) <= max(1, *prompt)  # a larger id need not exist


def test_corruption_changes_nothing_but_the_prompt() -> None:
    original = request([1, 2, 3], {"temperature": 0.0}, "corrupted")
    corrupted = corrupt_prompt(original)
    assert msgspec.structs.replace(corrupted, prompt_token_ids=[1, 2, 3]) == original
    assert original.prompt_token_ids == [1, 2, 3]


# The way that is in time

TTFT_S = 1.0
EASY_S = EASY * TTFT_S
"""The longest time to the first token that is easy for a request that has not waited."""
PREDICTED = PredictedPlacement()
SLO = SloConfig(ttft_ms=1e3 * TTFT_S)


def remote(ttft_s: float, lacks: Lack = "", **fields: Any) -> Way:
    return remote_way(queue_s=0.0, alone_s=ttft_s, lacks=lacks, **fields)


def local(ttft_s: float, lacks: Lack = "", **fields: Any) -> Way:
    return local_way(alone_s=ttft_s, lacks=lacks, **fields)


def on_prefill(ttft_s: float, lacks: Lack = "") -> Way:
    return local(ttft_s, lacks, serving_role="prefill")


def chosen(*ways: Way, waited_s: float = 0.0) -> Way | None:
    return choose_in_time(TTFT_S, waited_s, ways)


def test_of_easy_ways_the_one_that_costs_least_is_taken() -> None:
    quick, slow = remote(0.2 * EASY_S), local(0.6 * EASY_S)
    assert chosen(quick, slow) is quick
    quick, slow = local(0.2 * EASY_S), remote(0.6 * EASY_S)
    assert chosen(slow, quick) is quick
    disturbing = local(0.2 * EASY_S, interference_s=EASY_S)
    assert chosen(slow, disturbing) is slow


def test_a_local_way_has_to_be_clearly_cheaper_than_a_remote_one() -> None:
    away = remote(0.5 * EASY_S)
    limit_s = NEAR * (0.5 * EASY_S - NEAR_S)
    here = local(0.99 * limit_s)
    assert chosen(away, here) is here
    assert chosen(away, local(1.01 * limit_s)) is away
    assert chosen(away, local(limit_s / 2, interference_s=0.51 * limit_s)) is away


def test_an_easy_prefill_that_waits_for_room_is_better_than_a_costly_way_that_is_open() -> None:
    soon = remote(0.5 * EASY_S, "prefill")
    assert chosen(soon, local(0.9 * EASY_S)) is soon
    assert place(PREDICTED, SLO, Prospect(100), [soon, local(0.9 * EASY_S)]) is None
    here = local(0.1 * EASY_S)
    assert chosen(soon, here) is here


def test_nobody_waits_for_room_on_decode_while_another_way_is_open() -> None:
    open_way = remote(0.9 * EASY_S)
    for lacks in ("prefill", "decode"):
        assert chosen(open_way, local(0.1 * EASY_S, lacks)) is open_way
    here = local(0.9 * EASY_S)
    assert chosen(remote(0.1 * EASY_S, "decode"), here) is here


def test_why_a_prefill_replica_serves_the_whole_sequence() -> None:
    slow_link, full = remote(0.1 * EASY_S, pull_s=2 * TTFT_S), local(0.2 * EASY_S, "decode")
    whole = on_prefill(0.2 * EASY_S)
    assert place(PREDICTED, SLO, Prospect(100), [slow_link, full, whole]) == (whole, "slow_kv")
    assert place(PREDICTED, SLO, Prospect(100), [remote(0.1, "decode"), full, whole]) == (whole, "decode_full")


def test_a_token_that_comes_alone_is_no_beginning_of_an_answer() -> None:
    slow_link, here = remote(0.1 * EASY_S, pull_s=EASY_S), local(0.9 * EASY_S)
    assert chosen(slow_link, here) is here
    assert chosen(slow_link, local(0.9 * EASY_S, interference_s=2 * EASY_S)) is not slow_link
    quick_link = remote(0.1 * EASY_S, pull_s=0.1 * EASY_S)
    assert chosen(quick_link, here) is quick_link


def test_a_way_that_only_slow_kv_makes_late_is_none_while_another_may_soon_have_room() -> None:
    slow_link = remote(0.1 * EASY_S, pull_s=2 * TTFT_S)
    assert chosen(slow_link, local(0.9 * TTFT_S, "prefill")) is None
    assert chosen(slow_link, local(0.9 * TTFT_S, "decode")) is slow_link, "how long decode is full is not known"
    assert chosen(slow_link, local(0.9 * TTFT_S, "decode"), whole := on_prefill(0.9 * TTFT_S)) is whole
    assert chosen(slow_link, local(0.9 * TTFT_S, "prefill"), waited_s=1.01 * TTFT_S) is slow_link, "not for ever"
    late = remote(2 * TTFT_S)
    assert chosen(late, local(0.9 * TTFT_S, "prefill")) is late, "what is late for another reason is as before"


def test_what_a_request_has_waited_makes_ways_less_easy() -> None:
    cheap, quick = remote(0.5 * EASY_S), local(0.4 * EASY_S, interference_s=EASY_S)
    assert chosen(cheap, quick, waited_s=0.4 * EASY_S) is cheap
    assert chosen(cheap, quick, waited_s=0.55 * EASY_S) is quick  # the only easy one
    assert chosen(cheap, quick, waited_s=0.7 * EASY_S) is quick  # none is easy any more


def test_a_request_that_waited_for_prefill_takes_any_way_once_it_could_be_late() -> None:
    ways = [remote(0.5 * EASY_S, "prefill"), local(0.9 * EASY_S, interference_s=10.0)]
    assert chosen(*ways, waited_s=0.4 * EASY_S) is ways[0]
    assert chosen(*ways, waited_s=0.6 * EASY_S) is ways[1]


def test_if_no_way_is_easy_the_quickest_that_is_open_is_taken_however_late() -> None:
    ways = [remote(4 * TTFT_S), local(2 * TTFT_S, interference_s=100.0), on_prefill(1.5 * TTFT_S, "decode")]
    assert chosen(*ways) is ways[1]


def test_if_nothing_is_open_the_request_waits() -> None:
    assert chosen(remote(2 * TTFT_S, "prefill"), local(2 * TTFT_S, "decode")) is None
    assert chosen(remote(0.1 * EASY_S, "decode"), local(0.1 * EASY_S, "decode"), on_prefill(0.1, "decode")) is None


ways = st.builds(
    lambda make, ttft_s, lacks, interference_s: (
        make(ttft_s, lacks) if make is on_prefill else make(ttft_s, lacks, interference_s=interference_s)
    ),
    st.sampled_from([remote, local, on_prefill]),
    st.floats(0.0, 3.0),
    st.sampled_from(["", "prefill", "decode"]),
    st.floats(0.0, 10.0),
)


@given(st.lists(ways, min_size=1, max_size=5), st.floats(0.0, 2.0))
def test_what_is_chosen_is_open_or_an_easy_prefill_and_never_late_without_need(
    offered: list[Way], waited_s: float
) -> None:
    way = chosen(*offered, waited_s=waited_s)
    is_open = [each for each in offered if not each.lacks]
    if way is None:
        assert not is_open
        return
    is_easy = waited_s + way.ttft_s <= EASY_S
    if way.lacks:
        assert (way.kind, way.lacks, is_easy) == ("remote", "prefill", True)
    elif not is_easy:
        assert way.ttft_s == min(each.ttft_s for each in is_open)


# Policies


@pytest.mark.parametrize(
    ("way", "reason"), [(remote(0.01), "faster"), (local(0.01), "faster"), (on_prefill(0.01), "decode_full")]
)
def test_the_reason_says_why_the_way_was_predicted_to_be_the_best(way: Way, reason: str) -> None:
    closed = [remote(0.01, "decode"), local(0.01, "decode")]
    assert place(PREDICTED, SLO, Prospect(100), [*closed, way]) == (way, reason)


@pytest.mark.parametrize("lacks", ["prefill", "decode"])
def test_a_fixed_policy_waits_for_its_way(lacks: Lack) -> None:
    policy = RemotePlacement(policy="remote")
    assert place(policy, SLO, Prospect(100, waited_s=9.0), [remote(0.1, lacks), local(0.1)]) is None
    way = remote(5.0)
    assert place(policy, SLO, Prospect(100), [way, local(0.1)]) == (way, "configured")


def thresholds(**fields: int) -> PlacementPolicy:
    return ThresholdPlacement.model_validate({"policy": "thresholds", **fields})


def test_thresholds_count_what_waits_in_the_frontend_as_waiting_for_prefill() -> None:
    queued = Candidate("p", 0, 600, {}, 0.0)
    offered = [remote(0.1, prefill=queued), local(0.1)]
    policy = thresholds(max_local_tokens=100, max_prefill_queue_tokens=1000)
    for waiting_tokens, expected in ((400, (offered[0], "long")), (401, (offered[1], "prefill_queue"))):
        assert place(policy, SLO, Prospect(5000, waiting_tokens=waiting_tokens), offered) == expected


def test_thresholds_choose_before_they_look_for_room() -> None:
    policy = thresholds(max_local_tokens=100)
    assert place(policy, SLO, Prospect(5000), [remote(0.1, "prefill"), local(0.1)]) is None
    assert place(policy, SLO, Prospect(10), [remote(0.1), local(0.1, "decode")]) is None
