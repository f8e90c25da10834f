"""`python -m benchmarks.routing goodput`: what counts as in time, when the default loses, and the loads it plays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from app.bench.workload import Request
from app.config import SloConfig
from app.engines.sim.profile import load_profile
from app.pace import Pace
from benchmarks.routing import goodput
from benchmarks.routing.__main__ import bench_routing
from benchmarks.routing.fleet import Outcome
from benchmarks.routing.goodput import Contender, Measured, Second, is_in_time, settlings
from benchmarks.routing.goodput_oracle import cached_tokens, oracle_num_good
from benchmarks.routing.policies import Policy
from benchmarks.routing.scenarios import SCENARIOS, SEEDS_APART, Kind, Phase, Scenario, Trace, steady, steps, waves
from benchmarks.routing.timeline import Timeline

SLO = SloConfig(ttft_ms=1000, itl_ms=10)
KIND = Kind(100, 10)


def scenario(load: tuple[Phase, ...] = (), **changes: Any) -> Scenario:
    return Scenario(**{"name": "", "load": load or steady(10, 5, KIND), "slo": SLO, **changes})


def test_a_request_is_in_time_with_both_its_times_and_never_if_it_was_refused() -> None:
    for ttft_s, tpot_s, is_good in ((1.0, 0.01, True), (1.001, 0.01, False), (1.0, 0.0101, False), (0.0, 0.0, True)):
        assert is_in_time(scenario(), Outcome(0, 0.0, "remote", ttft_s, tpot_s)) == is_good
    assert not is_in_time(scenario(), Outcome(0, 0.0, None, 0.0))


def test_scenarios_have_names_of_their_own_and_half_of_them_are_held_out() -> None:
    assert len({each.name for each in SCENARIOS}) == len(SCENARIOS)
    assert 0.4 < sum(each.is_held_out for each in SCENARIOS) / len(SCENARIOS) < 0.6


def test_loads_have_the_rates_the_kinds_and_the_prefixes_that_they_say() -> None:
    short, long = Kind(100, 10, 0.75), Kind(3000, 20, 0.25, prefix_tokens=1000, num_prefixes=4)
    load = (Phase(50, 20, (short, long)), Phase(50, 4, (short,)))
    requests = scenario(load).requests(0, None)
    assert [each.at_s for each in requests] == sorted(each.at_s for each in requests)
    first, second = ([each for each in requests if (each.at_s < 50) == is_first] for is_first in (True, False))
    assert len(first) == pytest.approx(50 * 20, rel=0.1)
    assert len(second) == pytest.approx(50 * 4, rel=0.2)
    assert {(each.input_tokens, each.output_tokens) for each in second} == {(100, 10)}
    longer = [each for each in first if each.input_tokens > 100]
    assert len(longer) == pytest.approx(len(first) / 4, rel=0.2)
    assert {(each.input_tokens, each.output_tokens) for each in longer} == {(4000, 20)}
    assert len({each.pieces[0] for each in longer}) == 4
    assert len({each.pieces[-1] for each in requests}) == len(requests)


def test_a_seed_gives_the_same_load_again_and_held_out_loads_have_other_seeds() -> None:
    one, other = scenario(), scenario(is_held_out=True)
    assert one.requests(3, None) == one.requests(3, None) != one.requests(4, None)
    assert other.requests(3, None) == one.requests(3 + SEEDS_APART, None)


def test_gaps_may_be_bursty_at_the_same_rate() -> None:
    smooth, bursty = (scenario(steady(400, 5, KIND), burstiness=b).requests(0, None) for b in (1.0, 0.1))
    assert len(bursty) == pytest.approx(2000, rel=0.15)

    def most_in_a_second(load: Sequence[Request]) -> int:
        return max(sum(second <= each.at_s < second + 1 for each in load) for second in range(400))

    assert most_in_a_second(bursty) > 2 * most_in_a_second(smooth)


def test_each_contender_has_the_same_number_of_replicas_and_the_fleet_that_the_scenario_says() -> None:
    what = scenario(num_prefill=2, num_decode=3, num_frontends=4, first_use_s=1.5, pace_error=2.0)
    for contender in goodput.CONTENDERS:
        spec = goodput.make_spec(what, contender, load_profile("h200-llama-8b"))
        assert len(spec.names("prefill")) + len(spec.names("decode")) == 5
        assert (spec.num_prefill == 0) == (contender == "aggregated")
        assert ("prefill" in goodput.make_policy(contender, SLO, Timeline()).pools) == (contender != "aggregated")
        assert (spec.num_frontends, spec.first_use_s, spec.pace_error) == (4, 1.5, 2.0)


def test_a_shortened_scenario_changes_its_load_sooner() -> None:
    one = scenario(steps(30, (1, 2, 3), KIND))
    assert one.changes_s == [30, 60]
    assert one.shortened(1 / 3).changes_s == [10, 20]
    trace = scenario().shortened(1)
    assert trace == scenario()
    assert msgspec.structs.replace(one, load=Trace("t", 1.0, 90)).shortened(1 / 3).load == Trace("t", 1.0, 30)


def test_waves_go_up_and_down_between_two_rates() -> None:
    rates = [phase.rate for phase in waves(2, 20, 10, 30, KIND)]
    assert len(rates) == 20
    assert rates == pytest.approx([*rates[:5], *reversed(rates[:5])] * 2)
    assert rates[:5] == sorted(rates[:5])
    assert 10 < rates[0] < 11
    assert 29 < rates[4] < 30


def seconds_of(num_good: Sequence[int], num: int = 10, num_remote: Sequence[int] = ()) -> list[Second]:
    remote = num_remote or [num] * len(num_good)
    return [
        Second(num, good, {"remote": away, "on decode": num - away})
        for good, away in zip(num_good, remote, strict=True)
    ]


def test_the_time_to_settle_ends_when_the_share_in_time_stays_near_its_later_value() -> None:
    changing = scenario(steps(20, (1, 2, 3), KIND))
    good = [10] * 20 + [0] * 6 + [10] * 14 + [8] * 20
    first, second = settlings(changing, seconds_of(good))
    # From second 25 on a window has one second without any request in time, which is beyond 10 %; from 26 on none.
    assert (first.change_s, first.settled_after_s, first.steady_share) == (20, 6, 1.0)
    assert (second.change_s, second.settled_after_s, second.steady_share) == (40, 0, 0.8)


def test_what_never_comes_near_is_not_settled_before_the_next_change() -> None:
    (only,) = settlings(scenario(steps(20, (1, 2), KIND)), seconds_of([10] * 20 + [0] * 15 + [10] * 5))
    assert only.settled_after_s > 10


def test_a_swing_of_the_ways_shows() -> None:
    remote = [10] * 30 + [0] * 5 + [10] * 5
    (only,) = settlings(scenario(steps(20, (1, 2), KIND)), seconds_of([10] * 40, num_remote=remote))
    assert only.swing == 1.0
    (only,) = settlings(scenario(steps(20, (1, 2), KIND)), seconds_of([10] * 40, num_remote=[7] * 40))
    assert only.swing == 0.0


def test_changes_that_soon_follow_each_other_have_no_time_to_settle() -> None:
    assert settlings(scenario(waves(2, 20, 1, 2, KIND)), seconds_of([10] * 40)) == []


def row(**num_good: int) -> goodput.GoodputRow:
    by_contender = {
        name: Measured(
            scenario="",
            contender=name,
            num_requests=100,
            num_good=num,
            num_refused=0,
            arrival_s=10.0,
            ttft_p50_s=0.0,
            ttft_p99_s=0.0,
            tpot_mean_s=0.0,
            tpot_p99_s=0.0,
            end_s=11.0,
            by_way={},
            seconds=[],
        )
        for name, num in num_good.items()
    }
    return goodput.GoodputRow(
        scenario="",
        is_held_out=False,
        fleet="",
        slo="",
        by_contender=by_contender,
        oracle_num_good=0,
        settlings=[],
        measured={},
    )


def test_the_default_loses_below_97_percent_of_the_best_fixed_way() -> None:
    assert row(default=97, aggregated=0, remote=100, local=50).share_of_best == 0.97
    assert not row(default=97, aggregated=0, remote=100, local=50).is_lost
    lost = row(default=96, aggregated=100, remote=10, local=50)
    assert lost.is_lost
    assert lost.best_fixed == "aggregated"
    assert not row(default=0, aggregated=0, remote=0, local=0).is_lost


PACE = Pace(prefill_base_s=0.0, prefill_s_per_token=1e-3, step_base_s=0.0)


def prompts(*loads: tuple[float, int]) -> list[Request]:
    """Requests of one token each: (when they arrive, the tokens of the prompt)."""
    return [Request(at_s, [(100 * n, length)], 1) for n, (at_s, length) in enumerate(loads)]


def brute_force(requests: list[Request], speed: int, ttft_s: float) -> int:
    """The most requests that can be in time one after another, of all subsets."""

    def is_possible(chosen: Sequence[Request]) -> bool:
        free_at = 0.0
        for request in chosen:
            free_at = max(free_at, request.at_s) + request.input_tokens * 1e-3 / speed
            if free_at > request.at_s + ttft_s or request.input_tokens * 1e-3 > ttft_s:
                return False
        return True

    sizes = range(len(requests), 0, -1)
    return next((size for size in sizes if any(map(is_possible, combinations(requests, size)))), 0)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 12)), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_the_oracle_refuses_those_without_which_the_most_are_in_time(loads: list[tuple[int, int]]) -> None:
    requests = prompts(*((at / 4, 101 * length) for at, length in sorted(loads)))  # no deadline is met exactly
    assert oracle_num_good(scenario(), requests, PACE) == brute_force(requests, 2, 1.0)


def test_the_oracle_refuses_nothing_whose_time_nobody_could_use() -> None:
    # The first prompt is the longest, but the second arrives just before it ends.
    requests = prompts((0.0, 1000), (0.45, 800), (0.46, 800), (0.46, 800), (0.9, 800))
    assert oracle_num_good(scenario(), requests, PACE) == brute_force(requests, 2, 1.0) == 4


def test_the_oracles_replicas_decode_too() -> None:
    pace = msgspec.structs.replace(PACE, step_base_s=0.005, step_s_per_sequence=1e-3)
    requests = [Request(0.0, [(100 * n, 100)], 101) for n in range(30)]
    # A request takes 0.1 s for the prompt and 0.1 s for its tokens, of 1.5 replicas: half of one is lost to slow steps.
    assert oracle_num_good(scenario(), requests, pace) == 7
    assert oracle_num_good(scenario(num_prefill=3), requests, pace) == 17


def test_what_began_an_earlier_prompt_is_cached() -> None:
    pieces = [[(1, 100), (2, 50)], [(1, 100), (3, 50)], [(2, 50)], [(1, 100)], [(1, 60)]]
    assert cached_tokens(Request(0.0, each, 1) for each in pieces) == [0, 100, 0, 99, 0]


def run_goodput(*options: str) -> Result:
    return CliRunner().invoke(bench_routing, ["goodput", *options])


def test_the_command_compares_and_draws(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "page.svg"
    options = ["--only", "steps, long outputs", "--quick", "--json", str(out), "--picture", str(picture)]
    ran = run_goodput(*options)
    assert ran.exit_code == 0, ran.output
    (found,) = json.loads(out.read_text())["rows"]
    assert list(found["by_contender"]) == ["default", "aggregated", "remote", "local"]
    assert len({each["num_requests"] for each in found["by_contender"].values()}) == 1
    assert all(each["num_good"] <= found["oracle_num_good"] for each in found["by_contender"].values())
    assert found["by_contender"]["remote"]["by_way"] == {"remote": 1.0, "on decode": 0.0, "on prefill": 0.0}
    assert found["by_contender"]["local"]["by_way"]["on decode"] == 1.0
    assert [each["change_s"] for each in found["settlings"]] == [10, 20]
    assert "held out: the default is below 0.97 of the best fixed way in 0 of 1 scenarios" in ran.stdout
    assert "<svg" in picture.read_text()


def test_the_command_fails_where_the_default_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    make_policy = goodput.make_policy

    def always_local(contender: Contender, slo: SloConfig, timeline: Timeline) -> Policy:
        return make_policy("local" if contender == "default" else contender, slo, timeline)

    monkeypatch.setattr(goodput, "make_policy", always_local)
    ran = run_goodput("--only", "8192+256 at 3/s", "--quick")
    assert ran.exit_code == 1
    assert "LOST" in ran.stdout
    assert "2.57" in ran.stdout  # measured


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    rows = []
    for num in ("1", "2"):
        out = tmp_path / f"{num}.json"
        run_goodput("--only", "8192+256 at 3/s", "--quick", "--processes", num, "--json", str(out))
        rows.append(json.loads(out.read_text())["rows"])
    assert rows[0] == rows[1]


def test_traces_are_played_if_there_is_a_folder_of_them(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}
    lines = [{**line, "timestamp": 1000 * n, "hash_ids": [0, n]} for n in range(9)]
    text = "".join(json.dumps(each) + "\n" for each in lines)
    for name in ("conversation_trace.jsonl", "synthetic_trace.jsonl"):
        (tmp_path / name).write_text(text)
    ran = run_goodput("--only", "conversation", "--traces", str(tmp_path))
    assert "Mooncake's conversation trace at 4 times its speed" in ran.stdout
    assert "no scenario's name contains" in str(run_goodput("--only", "conversation").exception)
