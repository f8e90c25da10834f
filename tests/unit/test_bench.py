"""`baton bench`: what it derives, parses and adds up.  (What it starts and measures needs minutes and engines.)"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from app.bench import processes, report, targets
from app.bench.load import LoadFailed, LoadResult, LoadSpec, check_complete, parse_report, trace_lines
from app.bench.processes import Process, RoleMemory, parse_stat, role_of
from app.bench.report import Footprint, Machine, Measurement, Missing, Report, summarize
from app.bench.runner import WARM_UP, Schedule
from app.bench.targets import NotMeasurable, Setup, baton_document, to_flags
from app.config import parse

DOCUMENT = yaml.safe_load((Path(__file__).parents[2] / "serve_config.yaml").read_text())


def make_result(**changes: float) -> LoadResult:
    fields: dict[str, Any] = {field: 1.0 for field in LoadResult.__struct_fields__}
    return LoadResult(**{**fields, "num_completed": 8, "num_failed": 0, "output_tokens": 512, **changes})


def make_measurement(target: str, repetition: int, concurrency: int = 1, **changes: float) -> Measurement:
    return Measurement(target, repetition, concurrency, make_result(**changes), cpu_s_per_request=0.25)


def make_report(**changes: Any) -> Report:
    machine = Machine(cpu="Abacus", num_cores=2, memory_gib=24.0, kernel="Linux 6")
    return Report(
        command="baton bench",
        date="2026-01-01T00:00:00+00:00",
        machine=machine,
        versions={"ray": "2.60.0"},
        ray_llm_versions={},
        device="cpu",
        baseline="vllm",
        **changes,
    )


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(targets, "local_path", lambda source: "/models/tiny")
    return Setup(DOCUMENT, device="cpu", ray_llm_python=Path(sys.executable))


VLLM_REPORT = {
    "completed": 8,
    "failed": 0,
    "total_output_tokens": 512,
    "duration": 2.0,
    "request_throughput": 4.0,
    "output_throughput": 256.0,
    "median_ttft_ms": 50.0,
    "p99_ttft_ms": 90.0,
    "median_itl_ms": 3.0,
    "p99_itl_ms": 9.0,
    "median_tpot_ms": 3.5,
    "p99_tpot_ms": 4.0,
    "errors": [""] * 8,
}


class TestLoad:
    SPEC = LoadSpec(concurrency=1, num_requests=8)

    def test_vllms_report_is_parsed(self) -> None:
        result = parse_report(VLLM_REPORT)
        assert (result.ttft_ms, result.ttft_p99_ms, result.itl_ms, result.tpot_p99_ms) == (50.0, 90.0, 3.0, 4.0)
        assert check_complete(result, self.SPEC, errors=[""] * 8) is result

    def test_failed_requests_are_an_error_that_quotes_the_last_line_of_one(self) -> None:
        result = parse_report({**VLLM_REPORT, "completed": 7, "failed": 1})
        with pytest.raises(LoadFailed, match="1 of 8 requests failed: Bad Gateway"):
            check_complete(result, self.SPEC, errors=["", "Traceback\nBad Gateway\n"])

    def test_missing_tokens_are_an_error(self) -> None:
        result = parse_report({**VLLM_REPORT, "total_output_tokens": 511})
        with pytest.raises(LoadFailed, match="511 output tokens instead of 512"):
            check_complete(result, self.SPEC, errors=[])

    def test_every_prompt_of_a_trace_has_a_number_of_its_own(self) -> None:
        entries = [json.loads(line) for line in trace_lines(LoadSpec(1, 3, input_tokens=500, first_prompt=10))]
        assert [entry["hash_ids"] for entry in entries] == [[10], [11], [12]]
        assert {entry["input_length"] for entry in entries} == {500}

    def test_loads_of_one_start_share_no_prompt(self) -> None:
        loads = Schedule(["vllm"], [1, 8, 32], requests=24, repetitions=1).loads()
        numbers = [
            n for load in [WARM_UP, *loads] for n in range(load.first_prompt, load.first_prompt + load.num_requests)
        ]
        assert len(numbers) == len(set(numbers)) == 8 + 24 + 32 + 128


def test_targets_take_turns_forwards_and_backwards() -> None:
    schedule = Schedule(["vllm", "proxy", "baton"], [1], requests=1, repetitions=2)
    assert [target for _, target in schedule.turns()] == ["vllm", "proxy", "baton", "baton", "proxy", "vllm"]


class TestTargets:
    def test_the_aggregated_config_is_the_given_one_without_prefill(self) -> None:
        derived = baton_document(DOCUMENT, is_disaggregated=False)
        config = parse(derived["applications"][0]["args"])
        assert not config.models[0].is_disaggregated
        assert config.models[0].engine_args == parse(DOCUMENT["applications"][0]["args"]).models[0].engine_args
        assert "prefill" in DOCUMENT["applications"][0]["args"]["models"][0], "the original is untouched"

    def test_the_disaggregated_config_has_one_replica_of_each(self) -> None:
        document = baton_document(DOCUMENT, is_disaggregated=True)
        args = document["applications"][0]["args"]
        del args["models"][0]["decode"]["replicas"]
        args["models"][0]["decode"]["autoscaling"] = {"min_replicas": 2, "max_replicas": 9}
        config = parse(baton_document(document, is_disaggregated=True)["applications"][0]["args"])
        model = config.models[0]
        assert model.prefill is not None
        assert (config.frontend.replicas, model.prefill.replicas, model.decode.replicas) == (1, 1, 1)
        assert model.decode.autoscaling is None

    def test_disaggregated_needs_a_prefill_pool(self) -> None:
        aggregated = baton_document(DOCUMENT, is_disaggregated=False)
        with pytest.raises(NotMeasurable, match="no prefill pool"):
            baton_document(aggregated, is_disaggregated=True)

    def test_engine_arguments_become_options(self) -> None:
        options = {"max_model_len": 4096, "enforce_eager": True, "enable_prefix_caching": False, "x": {"a": 1}}
        assert to_flags(options) == [
            *("--max-model-len", "4096", "--enforce-eager", "--no-enable-prefix-caching", "--x", '{"a": 1}')
        ]

    def test_the_proxys_two_servers_differ_in_role_and_ports_only(self, setup: Setup, tmp_path: Path) -> None:
        prefill, decode, proxy = targets.plan_target("proxy", setup, tmp_path).commands
        differing = [(a, b) for a, b in zip(prefill.argv, decode.argv, strict=True) if a != b]
        assert len(differing) == 2  # the port and the KV transfer configuration
        assert "kv_producer" in differing[1][0]
        assert "kv_consumer" in differing[1][1]
        ports = [server.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for server in (prefill, decode)]
        assert ports[0] != ports[1]
        assert proxy.argv[1:3] == ["-m", "app.bench.proxy"]

    def test_all_engines_get_the_same_arguments(self, setup: Setup, tmp_path: Path) -> None:
        server = targets.plan_target("vllm", setup, tmp_path).commands[0]
        peer = targets.ray_llm_document(setup, port=1)["applications"][0]["args"]["decode_config"]["engine_kwargs"]
        assert set(to_flags(setup.engine_args)) <= set(server.argv)
        assert setup.engine_args.items() <= peer.items()
        assert server.environment["TORCHDYNAMO_DISABLE"] == "1"
        assert server.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"

    def test_ray_llm_without_its_python_is_not_measurable(self, setup: Setup, tmp_path: Path) -> None:
        for python in (None, tmp_path / "missing"):
            with pytest.raises(NotMeasurable, match="--ray-llm-python"):
                targets.plan_target("ray-llm", Setup(setup.document, "cpu", python), tmp_path)


class TestSummary:
    def test_medians_over_repetitions(self) -> None:
        measurements = [make_measurement("baton", n, ttft_ms=value) for n, value in enumerate((10.0, 90.0, 20.0))]
        (row,) = summarize(measurements, baseline="vllm")
        assert (row.result.ttft_ms, row.num_repetitions) == (20.0, 3)
        assert row.ttft_ratio is None, "the baseline was not measured"

    def test_a_ratio_is_taken_within_a_repetition(self) -> None:
        slow_second_time = [
            make_measurement("vllm", 0, ttft_ms=10.0),
            make_measurement("baton", 0, ttft_ms=20.0),
            make_measurement("vllm", 1, ttft_ms=1000.0),
            make_measurement("baton", 1, ttft_ms=2000.0),
        ]
        rows = {row.target: row for row in summarize(slow_second_time, baseline="vllm")}
        assert rows["baton"].ttft_ratio == 2.0
        assert rows["vllm"].ttft_ratio == 1.0

    def test_a_repetition_without_the_baseline_does_not_count_for_the_ratio(self) -> None:
        measurements = [
            make_measurement("vllm", 0, requests_per_s=4.0),
            make_measurement("baton", 0, requests_per_s=2.0),
            make_measurement("baton", 1, requests_per_s=400.0),
        ]
        rows = {row.target: row for row in summarize(measurements, baseline="vllm")}
        assert rows["baton"].requests_per_s_ratio == 0.5

    def test_rows_go_by_concurrency_then_as_measured(self) -> None:
        measurements = [make_measurement(target, 0, level) for target in ("vllm", "baton") for level in (8, 1)]
        rows = summarize(measurements, baseline="vllm")
        assert [(r.concurrency, r.target) for r in rows] == [(1, "vllm"), (1, "baton"), (8, "vllm"), (8, "baton")]


class TestOutput:
    FULL = make_report(
        measurements=[make_measurement("vllm", 0, ttft_ms=55.5), make_measurement("baton", 0, ttft_ms=111.0)],
        footprints=[Footprint("baton", 0, 40.0, 0.01, [RoleMemory("prefill replica", 1, 512 * report.MIB)])],
        missing=[Missing("ray-llm", 0, "no --ray-llm-python")],
    )

    def test_tables_are_markdown(self) -> None:
        sink = io.StringIO()
        report.print_report(self.FULL, Console(file=sink, width=report.TABLE_WIDTH))
        lines = [line.strip() for line in sink.getvalue().splitlines()]
        row = next(line for line in lines if line.startswith("|") and "111.0" in line)
        assert row.startswith("| 1 | baton ")
        assert " 2.00 |" in row
        header = next(line for line in lines if line.startswith("| c "))
        assert set(lines[lines.index(header) + 1]) <= set("|-:")
        assert "| prefill replica |         1 | 512 |" in lines
        assert "not measured: ray-llm (repetition 1): no --ray-llm-python" in lines

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


class TestProcesses:
    STAT = "42 (tmux: (x) y) S 7 42 42 0 -1 4194304 100 0 0 0 250 50 0 100 20 0 1 0 12345 1 1"

    def test_stat_lines_are_parsed_whatever_the_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "TICKS_PER_S", 100)
        assert parse_stat(self.STAT, "") == Process(42, 7, 12345, 4.0, "tmux: (x) y")
        assert parse_stat(self.STAT.replace(") S", ") Z"), "") is None

    def test_cpu_of_processes_that_came_later_counts_in_full(self) -> None:
        before = [Process(1, 0, 5, 1.0, "a")]
        after = [Process(1, 0, 5, 1.5, "a"), Process(2, 1, 9, 0.25, "b")]
        assert processes.cpu_between(before, after) == 0.75

    @pytest.mark.parametrize(
        ("title", "parent_role", "role"),
        [
            ("ray::ServeReplica:baton:prefill", "Ray itself", "prefill replica"),
            ("ray::ServeReplica:ray-llm:Decode:tiny", "Ray itself", "decode replica"),
            ("ray::ServeReplica:baton:frontend.handle_request", "Ray itself", "frontend"),
            ("VLLM::EngineCore", "prefill replica", "prefill engine core"),
            ("VLLM::Worker", "prefill engine core", "prefill engine worker"),
            ("VLLM::Worker", "engine core", "engine worker"),
            ("ray::ServeController.listen_for_change", "Ray itself", "controller"),
            ("python -c from multiprocessing.resource_tracker import main", "decode replica", "decode replica"),
        ],
    )
    def test_roles(self, title: str, parent_role: str, role: str) -> None:
        assert role_of(title, None, parent_role) == role

    def test_a_real_tree_is_read_and_ended(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1)
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            tree = processes.read_tree(child.pid)
            (row,) = processes.memory_by_role(tree, {child.pid: "server"})
            assert (row.role, row.num_processes) == ("server", 1)
            assert row.pss_bytes > report.MIB
            processes.end_all(tree)
            assert child.wait(10) == -9
        assert processes.read_tree(child.pid) == []
