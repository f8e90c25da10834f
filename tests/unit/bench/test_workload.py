"""`baton bench`: what is sent, and when."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import mean, median, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bench.workload import (
    Lengths,
    LoadSpec,
    LogNormal,
    Normal,
    Request,
    Uniform,
    arrival_times,
    at_speed,
    draw_length,
    fitting,
    parse_lengths,
    read_trace,
)
from app.errors import ConfigError

VOCABULARY = range(10, 4000)


class TestLengths:
    @pytest.mark.parametrize(
        ("text", "lengths"),
        [
            ("500", 500),
            ("uniform:100:900", Uniform(100, 900)),
            ("normal:512:40.5", Normal(512, 40.5)),
            (" lognormal:512:0.6 ", LogNormal(512, 0.6)),
        ],
    )
    def test_the_grammar(self, text: str, lengths: Lengths) -> None:
        assert parse_lengths("--input", text) == lengths

    @pytest.mark.parametrize(
        "text",
        [
            *(
                "",
                "0",
                "-5",
                "many",
                "5.5",
                "uniform:9:1",
                "uniform:0:5",
                "uniform:1:2.5",
                "uniform:1:inf",
                "uniform:1",
            ),
            *("normal:1:2:3", "normal:0:1", "normal:5:-1", "lognormal:512:nan", "lognormal:inf:1", "zipf:1:2"),
        ],
    )
    def test_mistakes_name_the_option(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^--input: .*write N, uniform:LOW:HIGH"):
            parse_lengths("--input", text)

    @pytest.mark.parametrize("lengths", [500, Uniform(100, 900), Normal(500, 50), LogNormal(500, 0.6)])
    def test_all_have_the_mean_that_was_asked_for(self, lengths: Lengths) -> None:
        random = Random(1)
        assert mean(draw_length(lengths, random) for _ in range(20_000)) == pytest.approx(500, rel=0.02)

    def test_the_spread_is_that_which_was_asked_for(self) -> None:
        random = Random(1)
        assert stdev(draw_length(Normal(500, 50), random) for _ in range(5_000)) == pytest.approx(50, rel=0.05)
        logarithms = [math.log(draw_length(LogNormal(500, 0.6), random)) for _ in range(5_000)]
        assert stdev(logarithms) == pytest.approx(0.6, rel=0.05)
        uniform = {draw_length(Uniform(1, 4), random) for _ in range(100)}
        assert uniform == {1, 2, 3, 4}, "both ends are included"

    @given(
        st.one_of(
            st.builds(Normal, st.just(1.0), st.floats(0, 1e3)), st.builds(LogNormal, st.just(1.0), st.floats(0, 5))
        )
    )
    def test_no_length_is_below_1(self, lengths: Lengths) -> None:
        random = Random(0)
        assert min(draw_length(lengths, random) for _ in range(50)) >= 1


class TestPrompts:
    def test_every_prompt_is_another(self) -> None:
        requests = LoadSpec(1, 50, input_tokens=20).load().requests
        prompts = {tuple(request.prompt(VOCABULARY, "7")) for request in requests}
        assert len(prompts) == 50
        assert {len(prompt) for prompt in prompts} == {20}
        assert all(token in VOCABULARY for prompt in prompts for token in prompt)

    def test_the_number_and_the_seed_are_the_prompt(self) -> None:
        first = LoadSpec(1, 3, first_prompt=10).load().requests
        second = LoadSpec(8, 2, first_prompt=11).load().requests
        assert first[1].prompt(VOCABULARY, "7") == second[0].prompt(VOCABULARY, "7")
        assert first[1].prompt(VOCABULARY, "7") != first[1].prompt(VOCABULARY, "8")

    def test_another_process_draws_the_same(self) -> None:
        """Python's own `hash`, which vLLM's trace data set seeds by, is another in each process."""
        code = "from app.bench.workload import *; print(LoadSpec(1, 1).load().requests[0].prompt(range(99), '7'))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        assert json.loads(said) == LoadSpec(1, 1).load().requests[0].prompt(range(99), "7")

    def test_prefixes_are_shared_by_as_many_requests_each(self) -> None:
        spec = LoadSpec(1, 9, input_tokens=5, num_prefixes=3, prefix_tokens=40)
        prompts = [request.prompt(VOCABULARY, "7") for request in spec.load().requests]
        assert {len(prompt) for prompt in prompts} == {45}
        prefixes = [tuple(prompt[:40]) for prompt in prompts]
        assert [prefixes.count(prefix) for prefix in prefixes] == [3] * 9
        assert len({tuple(prompt[40:]) for prompt in prompts}) == 9

    @given(st.integers(1, 600), st.integers(1, 600))
    def test_a_shorter_piece_begins_as_a_longer_one(self, a: int, b: int) -> None:
        long, short = (Request(0.0, [(5, length)], 1).prompt(VOCABULARY, "7") for length in (max(a, b), min(a, b)))
        assert long[: len(short)] == short

    def test_lengths_are_drawn_again_for_another_seed(self) -> None:
        specs = [LoadSpec(1, 20, Uniform(1, 1000), Uniform(1, 1000), seed=seed) for seed in ("1", "1", "2")]
        lengths = [[(r.input_tokens, r.output_tokens) for r in spec.load().requests] for spec in specs]
        assert lengths[0] == lengths[1] != lengths[2]


class TestArrivals:
    def test_a_closed_loop_has_none(self) -> None:
        assert arrival_times(3, None, 1.0, Random(0)) == [0.0, 0.0, 0.0]

    @given(st.integers(1, 300), st.floats(0.1, 1000), st.floats(0.05, 50))
    def test_the_rate_is_exact_and_time_does_not_run_backwards(
        self, count: int, rate: float, burstiness: float
    ) -> None:
        moments = arrival_times(count, rate, burstiness, Random(0))
        assert moments[-1] == pytest.approx(count / rate)
        assert moments == sorted(moments)

    @pytest.mark.parametrize("burstiness", [0.25, 1.0, 16.0])
    def test_gaps_are_gamma_distributed(self, burstiness: float) -> None:
        """Of such gaps the coefficient of variation is 1 / sqrt(shape); of a Poisson process it is 1."""
        moments = arrival_times(20_000, 10.0, burstiness, Random(3))
        gaps = [b - a for a, b in pairwise(moments)]
        assert stdev(gaps) / mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)

    def test_a_poisson_process_has_short_gaps_more_often_than_long_ones(self) -> None:
        moments = arrival_times(20_000, 10.0, 1.0, Random(3))
        assert median(b - a for a, b in pairwise(moments)) == pytest.approx(math.log(2) / 10, rel=0.05)


class TestTrace:
    LINES = (
        {"timestamp": 27_000, "input_length": 1100, "output_length": 52, "hash_ids": [0, 1, 2], "type": "text"},
        {"timestamp": 30_500, "input_length": 600, "output_length": 26, "hash_ids": [0, 3]},
    )

    def write(self, folder: Path, *lines: object) -> Path:
        path = folder / "trace.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines))
        return path

    def test_mooncakes_blocks_become_pieces_and_time_begins_with_the_first(self, tmp_path: Path) -> None:
        requests = read_trace(self.write(tmp_path, *self.LINES), limit=None)
        assert requests == [Request(0.0, [(0, 512), (1, 512), (2, 76)], 52), Request(3.5, [(0, 512), (3, 88)], 26)]

    def test_equal_hash_ids_are_equal_tokens(self, tmp_path: Path) -> None:
        a, b = (request.prompt(VOCABULARY, "7") for request in read_trace(self.write(tmp_path, *self.LINES), None))
        assert (len(a), len(b)) == (1100, 600)
        assert a[:512] == b[:512]
        assert a[512:600] != b[512:]

    def test_speed_shortens_the_gaps(self, tmp_path: Path) -> None:
        requests = read_trace(self.write(tmp_path, *self.LINES), None)
        assert [request.at_s for request in at_speed(requests, 2.0)] == [0.0, 1.75]

    def test_limit_takes_the_first(self, tmp_path: Path) -> None:
        assert len(read_trace(self.write(tmp_path, *self.LINES), limit=1)) == 1

    def test_what_the_model_does_not_take_is_left_out(self, tmp_path: Path) -> None:
        requests = read_trace(self.write(tmp_path, *self.LINES), None)
        assert fitting(requests, 626) == requests[1:]
        assert fitting(requests, 625) == []
        assert fitting(requests, None) == requests

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ({"timestamp": 0, "input_length": 5, "output_length": 1}, "missing required field `hash_ids`"),
            ({"timestamp": 0, "input_length": "5", "output_length": 1, "hash_ids": [1]}, "Expected `int`"),
            ({"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}, "513 tokens, 1 hash_ids"),
            ({"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}, "0 tokens"),
        ],
    )
    def test_a_wrong_line_is_named(self, line: object, problem: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=f"^--trace: line 2: .*{problem}"):
            read_trace(self.write(tmp_path, self.LINES[0], line), None)

    def test_a_missing_or_empty_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"^--trace: .*No such file"):
            read_trace(tmp_path / "nowhere", None)
        with pytest.raises(ConfigError, match="holds no request"):
            read_trace(self.write(tmp_path), None)
