"""`python -m benchmarks.peers`: what it starts, derived and not started.  (Starting it needs minutes and engines.)"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
import yaml
from rich.console import Console

from app.bench.load import LoadResult
from app.bench.processes import Process, RoleMemory
from app.bench.report import MIB, Footprint, Machine, Measurement, to_json
from app.bench.workload import LoadSpec
from app.config import parse
from app.engines.sim.profile import load_profile
from benchmarks.peers import control_plane, prompts, report, targets
from benchmarks.peers.prompts import TextRequest, as_text
from benchmarks.peers.report import PeersReport, RoleCost
from benchmarks.peers.runner import WARM_UP, Schedule
from benchmarks.peers.suites import SUITES, plan_target
from benchmarks.peers.targets import ENVIRONMENTS, NotMeasurable, Setup, baton_document, to_flags
from tests.conftest import REPOSITORY

DOCUMENT = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Setup:
    monkeypatch.setattr(targets, "local_path", lambda source: "/models/tiny")
    for peer in ENVIRONMENTS:
        python = tmp_path / "environments" / peer / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
    (tmp_path / "environments" / "vllm-rs" / "vllm-rs").symlink_to(sys.executable)
    return Setup(DOCUMENT, device="cpu", environments=tmp_path / "environments")


def test_loads_of_one_start_share_no_prompt() -> None:
    loads = Schedule(["vllm"], [1, 8, 32], requests=24, requests_per_stream=4, repetitions=1).loads()
    numbers = [n for load in [WARM_UP, *loads] for n in range(load.first_prompt, load.first_prompt + load.num_requests)]
    assert len(numbers) == len(set(numbers)) == 8 + 24 + 32 + 128


def test_targets_take_turns_forwards_and_backwards() -> None:
    schedule = Schedule(["vllm", "proxy", "baton"], [1], requests=1, requests_per_stream=1, repetitions=2)
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
        prefill, decode, proxy = plan_target("proxy", setup, tmp_path).commands
        differing = [(a, b) for a, b in zip(prefill.argv, decode.argv, strict=True) if a != b]
        assert len(differing) == 2  # the port and the KV transfer configuration
        assert "kv_producer" in differing[1][0]
        assert "kv_consumer" in differing[1][1]
        ports = [server.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] for server in (prefill, decode)]
        assert ports[0] != ports[1]
        assert proxy.argv[1:3] == ["-m", "benchmarks.peers.proxy"]

    def test_all_engines_get_the_same_arguments(self, setup: Setup, tmp_path: Path) -> None:
        server = plan_target("vllm", setup, tmp_path).commands[0]
        plan_target("ray-llm", setup, tmp_path)
        (application,) = yaml.safe_load((tmp_path / "ray-llm.yaml").read_text())["applications"]
        peer = application["args"]["decode_config"]["engine_kwargs"]
        assert set(to_flags(setup.engine_args)) <= set(server.argv)
        assert setup.engine_args.items() <= peer.items()
        assert peer["kv_transfer_config"]["kv_role"] == "kv_consumer"
        assert server.environment["TORCHDYNAMO_DISABLE"] == "1"
        assert server.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"

    @pytest.mark.parametrize("name", [name for suite in SUITES.values() for name in suite.targets])
    def test_every_target_has_a_plan_on_this_machine_only(self, name: str, setup: Setup, tmp_path: Path) -> None:
        plan = plan_target(name, setup, tmp_path)
        assert plan.base_url.startswith("http://127.0.0.1:")
        assert not any("0.0.0.0" in word for command in plan.commands for word in command.argv)
        roles = [command.role for command in plan.commands]
        assert len(roles) == len(set(roles)), "each role has a log of its own"

    def test_a_name_means_one_target_in_all_suites(self) -> None:
        assert not targets.TARGETS.keys() & control_plane.TARGETS.keys()

    def test_the_router_stands_in_front_of_the_server_that_is_measured_alone(
        self, setup: Setup, tmp_path: Path
    ) -> None:
        server, router = plan_target("sglang-router", setup, tmp_path).commands
        port = server.argv[server.argv.index("--port") + 1]
        assert router.argv[router.argv.index("--worker-urls") + 1] == f"http://127.0.0.1:{port}"
        assert router.argv[0] == setup.python("sglang-router")

    def test_a_peer_without_its_environment_is_not_measurable_and_says_what_its_script_said(
        self, setup: Setup, tmp_path: Path
    ) -> None:
        with pytest.raises(NotMeasurable, match=r"no --environments; benchmarks/peers/dynamo_env\.sh"):
            plan_target("dynamo", Setup(DOCUMENT, "cpu", None), tmp_path)
        (tmp_path / "dynamo.log").write_text("resolving\nerror: no such version\n")
        with pytest.raises(NotMeasurable, match=r"dynamo_env\.sh has not made its environment: error: no such version"):
            plan_target("dynamo", Setup(DOCUMENT, "cpu", tmp_path), tmp_path)


class TestControlPlane:
    @pytest.mark.parametrize("is_disaggregated", [False, True])
    def test_batons_sim_engines_run_at_full_speed(self, setup: Setup, is_disaggregated: bool, tmp_path: Path) -> None:
        document = control_plane.sim_document(setup, tmp_path, is_disaggregated=is_disaggregated)
        model = parse(document["applications"][0]["args"]).models[0]
        assert model.is_disaggregated == is_disaggregated
        assert model.decode.engine == "sim"
        assert model.merged_engine_args(model.decode) == {"speed_up": "max"}

    def test_paced_all_engines_take_the_same_time_for_a_token(self, setup: Setup, tmp_path: Path) -> None:
        paced = msgspec.structs.replace(setup, token_ms=20.0)
        document = control_plane.sim_document(paced, tmp_path, is_disaggregated=True)
        profile = load_profile(document["applications"][0]["args"]["models"][0]["engine_args"]["profile"])
        assert [profile.step_s(num, 1000 * num) for num in (1, 128)] == [0.02, 0.02]
        assert profile.prefill_s(500) == 0.0
        mocker, _ = plan_target("dynamo", paced, tmp_path).commands
        times = numpy.load(mocker.argv[mocker.argv.index("--planner-profile-data") + 1])
        assert (times["decode_itl"] == 20.0).all()
        for name in ("vllm-fake", "ray-llm-sim", "ray-llm-sim-direct"):
            command = plan_target(name, paced, tmp_path).commands[0]
            assert command.environment[control_plane.FAKE_ENGINE_TOKEN_MS] == "20.0"
        source = (control_plane.REPOSITORY / "benchmarks" / "peers" / "fake_engine.py").read_text()
        assert f'"{control_plane.FAKE_ENGINE_TOKEN_MS}"' in source

    def test_dynamos_processes_find_each_other_by_files_of_their_own(self, setup: Setup, tmp_path: Path) -> None:
        mocker, frontend = plan_target("dynamo", setup, tmp_path).commands
        assert mocker.environment == frontend.environment
        assert mocker.environment["DYN_FILE_KV"].startswith(str(tmp_path))
        assert frontend.argv[frontend.argv.index("--router-mode") + 1] == "kv"

    def test_ray_serve_llm_gets_the_engine_that_computes_nothing(self, setup: Setup, tmp_path: Path) -> None:
        (default,) = plan_target("ray-llm-sim", setup, tmp_path).commands
        (direct,) = plan_target("ray-llm-sim-direct", setup, tmp_path).commands
        for command in (default, direct):
            module, _, name = command.environment["RAYLLM_VLLM_ENGINE_CLS"].rpartition(".")
            source = control_plane.REPOSITORY / Path(*module.split(".")).with_suffix(".py")
            assert f"class {name}(" in source.read_text()
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in default.environment
        assert control_plane.FASTEST_RAY_LLM.items() <= direct.environment.items()


class TestPrompts:
    @pytest.fixture(autouse=True)
    def _known_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prompts, "words", lambda tokenizer: [f" word{n}" for n in range(100)])

    def test_text_has_as_many_words_as_the_request_has_tokens(self) -> None:
        load = LoadSpec(concurrency=2, num_requests=3, input_tokens=500, first_prompt=7).load()
        text = as_text(load, "/models/tiny")
        requests = [request for request in text.requests if isinstance(request, TextRequest)]
        sent = [request.prompt([], text.seed) for request in requests]
        assert [len(prompt.split()) for prompt in sent] == [500, 500, 500]
        assert len(set(sent)) == 3
        assert sent == [request.prompt([], text.seed) for request in requests], "the same for all targets"
        assert [r.output_tokens for r in text.requests] == [r.output_tokens for r in load.requests]
        assert text.concurrency == 2

    def test_real_words_stay_one_token_each_in_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        tokenizers = pytest.importorskip("tokenizers")
        from app.models.source import local_path

        folder = local_path("baton:tiny")
        request = as_text(LoadSpec(concurrency=1, num_requests=1).load(), folder).requests[0]
        tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        assert len(tokenizer.encode(request.prompt([], "0")).ids) == request.input_tokens


def make_result(**changes: float) -> LoadResult:
    fields: dict[str, Any] = {
        "num_completed": 10,
        "num_failed": 0,
        "output_tokens": 640,
        "duration_s": 1.0,
        "requests_per_s": 10.0,
        "output_tokens_per_s": 640.0,
        **{f"{name}{which}_ms": 1.0 for name in ("ttft", "itl", "tpot") for which in ("", "_p99")},
    }
    return LoadResult(**{**fields, **changes})


def make_report(**changes: Any) -> PeersReport:
    fields: dict[str, Any] = {
        "command": "python -m benchmarks.peers",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": Machine(cpu="Abacus", num_cores=2, memory_gib=24.0, kernel="Linux 6"),
        "versions": {"ray": "2.60.0"},
        "baseline": "vllm-fake",
        "suite": "control-plane",
        "environments": {"dynamo": {"ai-dynamo": "1.6.1"}},
    }
    return PeersReport(**{**fields, **changes})


class TestReport:
    FULL = make_report(
        measurements=[
            Measurement("dynamo", repetition, level, make_result(ttft_ms=ttft, tokens_per_chunk=1.0), cpu_s)
            for repetition, (ttft, cpu_s) in enumerate([(5.0, 0.002), (90.0, 0.009), (6.0, 0.004)])
            for level in (1, 32)
        ],
        footprints=[
            Footprint("dynamo", 0, 2.0, 0.0, [RoleMemory("frontend", 1, 90 * MIB), RoleMemory("x", 2, 60 * MIB)])
        ],
        role_costs=[
            RoleCost("dynamo", 0, 1, "mocker", 9.0),
            *(RoleCost("dynamo", n, 32, "frontend", cost) for n, cost in enumerate([1.0, 7.0, 2.0])),
            RoleCost("dynamo", 0, 32, "idle", 0.001),
        ],
    )

    def rows(self) -> list[list[str]]:
        sink = io.StringIO()
        report.print_all(self.FULL, Console(file=sink, width=200))
        lines = [line.strip() for line in sink.getvalue().splitlines()]
        assert "dynamo: ai-dynamo 1.6.1" in lines
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]

    def test_one_line_per_target_holds_medians(self) -> None:
        assert ["dynamo", "6.0", "4.00", "4.00", "16000", "1.0", "150", "3"] in self.rows()

    def test_cost_by_role_is_that_of_the_highest_load_without_what_hardly_costs(self) -> None:
        rows = self.rows()
        assert ["dynamo", "frontend", "2.00"] in rows
        assert not any("mocker" in row or "idle" in row for row in rows)

    def test_json_holds_the_costs_by_role(self) -> None:
        document = json.loads(to_json(self.FULL))
        assert document["suite"] == "control-plane"
        assert document["role_costs"][0]["role"] == "mocker"

    def test_nothing_measured_is_a_report_too(self) -> None:
        sink = io.StringIO()
        report.print_all(make_report(), Console(file=sink, width=200))
        assert "Abacus" in sink.getvalue()

    def test_cpu_is_added_up_by_role(self) -> None:
        before = [Process(1, 0, 5, 1.0, "python"), Process(2, 1, 6, 3.0, "VLLM::EngineCore")]
        after = [
            *(Process(p.pid, p.parent, p.started_at, p.cpu_s + 0.5, p.title) for p in before),
            Process(3, 2, 9, 0.25, ""),
        ]
        assert report.cpu_by_role(before, after, {1: "server"}) == {"server": 0.5, "engine core": 0.75}

    def test_versions_are_those_of_the_environments_that_are_there(self, tmp_path: Path) -> None:
        assert report.environment_versions(None) == {}
        folder = tmp_path / "dynamo" / "lib" / "python3.11" / "site-packages" / "ai_dynamo-1.6.1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: ai-dynamo\nVersion: 1.6.1\n")
        assert report.environment_versions(tmp_path) == {"dynamo": {"ai-dynamo": "1.6.1"}}


def test_the_scripts_pin_what_they_install() -> None:
    for peer, (script, packages) in ENVIRONMENTS.items():
        text = (control_plane.REPOSITORY / "benchmarks" / "peers" / script).read_text()
        for package in packages:
            assert f"{package}==" in text or f"{package}[" in text or package == "nixl", (peer, package)
