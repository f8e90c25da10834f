"""`baton bench`: medians, ratios, tables, JSON and the picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from app.bench import picture, report
from app.bench.endpoint import Endpoint
from app.bench.processes import RoleMemory
from app.bench.report import Footprint, Level, Missing, Report, summarize
from app.errors import ConfigError
from tests.unit.bench.samples import make_measurement, make_report


def printed(full: Report) -> list[str]:
    sink = io.StringIO()
    report.print_report(full, Console(file=sink, width=report.TABLE_WIDTH))
    return [line.strip() for line in sink.getvalue().splitlines()]


class TestSummary:
    def test_medians_over_repetitions(self) -> None:
        measurements = [make_measurement("baton", n, ttft_ms=value) for n, value in enumerate((10.0, 90.0, 20.0))]
        (row,) = summarize(measurements, baseline="vllm")
        assert (row.result.ttft_ms, row.num_repetitions) == (20.0, 3)
        assert row.ttft_ratio is None, "the baseline was not measured"

    def test_a_ratio_is_taken_within_a_repetition(self) -> None:
        slow_second_time = [
            make_measurement("vllm", 0, ttft_ms=10.0, ttft_p99_ms=20.0),
            make_measurement("baton", 0, ttft_ms=20.0, ttft_p99_ms=60.0),
            make_measurement("vllm", 1, ttft_ms=1000.0, ttft_p99_ms=2000.0),
            make_measurement("baton", 1, ttft_ms=2000.0, ttft_p99_ms=6000.0),
        ]
        rows = {row.target: row for row in summarize(slow_second_time, baseline="vllm")}
        assert (rows["baton"].ttft_ratio, rows["baton"].ttft_p99_ratio) == (2.0, 3.0)
        assert (rows["vllm"].ttft_ratio, rows["vllm"].ttft_p99_ratio) == (1.0, 1.0)

    def test_a_repetition_without_the_baseline_does_not_count_for_the_ratio(self) -> None:
        measurements = [
            make_measurement("vllm", 0, requests_per_s=4.0),
            make_measurement("baton", 0, requests_per_s=2.0),
            make_measurement("baton", 1, requests_per_s=400.0),
        ]
        rows = {row.target: row for row in summarize(measurements, baseline="vllm")}
        assert rows["baton"].requests_per_s_ratio == 0.5

    def test_levels_do_not_mix_and_rise_and_targets_keep_their_order(self) -> None:
        by_turns = [("vllm", 8), ("baton", 8), ("baton", 1), ("vllm", 1)]
        rows = summarize([make_measurement(target, 0, level) for target, level in by_turns], baseline="vllm")
        assert [(r.concurrency, r.target) for r in rows] == [(1, "vllm"), (1, "baton"), (8, "vllm"), (8, "baton")]
        rates = [make_measurement("a", 0, 0, rate=rate, ttft_ms=rate) for rate in (10.0, 0.5)]
        assert [(r.level, r.result.ttft_ms) for r in summarize(rates, "a")] == [
            (Level(rate=0.5), 0.5),
            (Level(rate=10.0), 10.0),
        ]

    def test_what_is_not_known_or_0_has_no_ratio(self) -> None:
        measurements = [
            make_measurement(target, 0, itl_ms=0.0, goodput_per_s=None, cpu_s=None) for target in ("vllm", "baton")
        ]
        row = summarize(measurements, baseline="vllm")[1]
        assert (row.itl_ratio, row.goodput_ratio, row.cpu_ratio, row.cpu_s_per_request) == (None,) * 4
        assert (row.result.goodput_per_s, row.output_tokens_per_cpu_s) == (None, None)

    def test_tokens_per_core(self) -> None:
        (row,) = summarize([make_measurement("baton", 0, cpu_s=0.5)], baseline="baton")
        assert row.output_tokens_per_cpu_s == 128.0, "64 tokens for half a second of one core"

    def test_failures_add_up(self) -> None:
        measurements = [make_measurement("a", n, failures={"Bad Gateway": n, "reset": 1}) for n in (1, 2)]
        assert summarize(measurements, "a")[0].result.failures == {"Bad Gateway": 3, "reset": 2}


class TestOutput:
    FULL = make_report(
        measurements=[make_measurement("vllm", 0, ttft_ms=55.5), make_measurement("baton", 0, ttft_ms=111.0)],
        footprints=[Footprint("baton", 0, 40.0, 0.01, [RoleMemory("prefill replica", 1, 512 * report.MIB)])],
        missing=[Missing("ray-llm", 0, "[no] python")],
    )

    def test_tables_are_markdown(self) -> None:
        lines = printed(self.FULL)
        row = next(line for line in lines if line.startswith("|") and "111.0" in line)
        assert row.startswith("| 1 | baton ")
        header = next(line for line in lines if line.startswith("| c "))
        assert set(lines[lines.index(header) + 1]) <= set("|-:")
        assert "| prefill replica |         1 | 512 |" in lines
        assert "not measured: ray-llm (repetition 1): [no] python" in lines

    def test_rates_stand_beside_ratios(self) -> None:
        cells = {
            name.strip(): cell.strip()
            for name, cell in zip(self.header().split("|"), self.row("baton").split("|"), strict=True)
        }
        assert cells["TTFT ratio"] == "2.00"
        assert (cells["CPU ms/req"], cells["tok/s/core"]) == ("250.0", "256")

    def header(self) -> str:
        return next(line for line in printed(self.FULL) if "tok/s/core" in line)

    def row(self, target: str) -> str:
        lines = printed(self.FULL)
        return next(line for line in lines[lines.index(self.header()) :] if f"| {target} " in line)

    def test_one_target_has_no_ratios(self) -> None:
        lines = printed(make_report(measurements=[make_measurement("vllm", 0)]))
        assert not any("ratio" in line for line in lines)

    def test_an_open_loop_is_headed_by_its_rate(self) -> None:
        lines = printed(make_report(measurements=[make_measurement("vllm", 0, 0, rate=2.5)]))
        assert any(line.startswith("| req/s asked | target") for line in lines)
        assert any(line.startswith("|         2.5 | vllm") for line in lines)

    def test_what_makes_numbers_doubtful_is_said(self) -> None:
        doubtful = make_report(
            measurements=[make_measurement("a", 0, client_cores=0.9, failures={"Bad Gateway": 2})],
            num_requests=10,
            num_left_out=3,
        )
        lines = printed(doubtful)
        assert "failed: a at concurrency 1: 2 x Bad Gateway" in lines
        assert "left out: 3 of 10 requests: too long for the model" in lines
        assert any(line.startswith("the client was busy: a at concurrency 1") for line in lines)

    def test_endpoints_and_workload_are_named(self) -> None:
        endpoint = Endpoint("baton", "http://127.0.0.1:8000", "tiny", "tiny", None, "0.32.0")
        lines = printed(make_report(endpoints=[endpoint], workload="prompts of 5", seed="7", limits_ms={"ttft": 500.0}))
        assert "baton: tiny at http://127.0.0.1:8000, version 0.32.0" in lines
        assert "prompts of 5, ttft within 500 ms, seed 7" in lines

    def test_json_holds_summary_and_raw_numbers(self) -> None:
        document = json.loads(report.to_json(self.FULL))
        assert document["summary"][1]["ttft_ratio"] == 2.0
        assert document["measurements"][0]["result"]["ttft_ms"] == 55.5
        assert document["footprints"][0]["memory"][0]["pss_bytes"] == 512 * report.MIB
        assert document["machine"]["num_cores"] == 2

    def test_this_machine_is_described(self) -> None:
        machine = report.describe_machine()
        assert machine.num_cores >= 1
        assert machine.memory_gib > 0
        assert "ray" in report.installed_versions()


class TestPicture:
    FULL = make_report(
        measurements=[
            make_measurement(target, repetition, concurrency)
            for target in ("baton", "vllm")
            for repetition in (0, 1)
            for concurrency in (1, 8)
        ],
        workload="prompts of 500 tokens",
        limits_ms={"ttft": 500.0},
    )

    def test_a_page_says_what_was_measured_where_and_how(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "page.svg"
        picture.draw(self.FULL, path)
        drawn = path.read_text()
        for words in ("baton and vllm", "prompts of 500 tokens", "Time to first token (TTFT)", "tokens/s", "p99"):
            assert words in drawn
        for words in ("2 cores of Abacus", "ray 2.60.0", "2026-01-01", "baton bench", "in time (TTFT 500 ms)"):
            assert words in drawn

    @pytest.mark.parametrize("suffix", [".png", ".pdf"])
    def test_a_single_level_is_drawn_too(self, suffix: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / f"page{suffix}"
        picture.draw(make_report(measurements=[make_measurement("a", 0, 0, speed=4.0, goodput_per_s=None)]), path)
        assert path.stat().st_size > 1000

    def test_a_format_that_there_is_not(self) -> None:
        with pytest.raises(ConfigError, match=r"^--picture: page.gif ends with none of \.svg, \.png, \.pdf"):
            picture.check(Path("page.gif"))

    def test_without_matplotlib_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(picture, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"baton\[bench\]"):
            picture.check(Path("page.png"))
