"""`python -m benchmarks.gpu`: the applications that it configures, what it reads from answers, and its page."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from app.bench.gpus import Gpu
from app.bench.report import Machine
from app.cli.entry import to_app
from app.config import parse
from app.errors import ConfigError
from benchmarks.gpu import runner as gpu_runner
from benchmarks.gpu.__main__ import join, measure
from benchmarks.gpu.measure import (
    Answer,
    Application,
    CacheResult,
    Client,
    Extent,
    Hop,
    MeasureError,
    Moved,
    NoAnswer,
    Series,
    Steps,
    measure_hop,
    modes_of,
    steps_of,
)
from benchmarks.gpu.peer_copy import PeerCopy, PeerCopyFailed, measure_peer_copy
from benchmarks.gpu.report import (
    Failure,
    GpuReport,
    aggregated_table,
    copy_table,
    nearest,
    page,
    ratio_table,
    to_json,
    transfer_table,
    versions_in,
)
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.setup import VARIANTS, Choice, Setup, Variant, find_setups, find_variants, serve_document

VLLM = Setup(name="vllm", engine="vllm", mode="disaggregated", source="baton:tiny", engine_args={"max_model_len": 4096})


def series(*ttfts: float) -> Series:
    return Series(Answer(999.0), [Answer(ttft, [7.0, 4.0]) for ttft in ttfts])


def application(name: str, remote: float, local: float, itl: float, **fields: Any) -> Application:
    moved = Moved(9, 9 * 64_000_000, 0.9, "ipc")
    hop = Hop(512, {"remote": series(remote), "local": series(local)}, moved, {"transfer": 2.0})
    return Application(name=name, engine="vllm", mode="disaggregated", hops=[hop], steps=Steps([itl] * 9), **fields)


def report(*applications: Application, **fields: Any) -> GpuReport:
    return GpuReport(
        command="python -m benchmarks.gpu measure",
        date="2026-11-28T00:00:00+00:00",
        machine=Machine("a processor", 16, 128.0, "Linux 6"),
        versions={"vllm": "0.32.0"},
        commit="abc",
        gpus=[Gpu("H100", 81559, "580")] * 2,
        source="baton:shape/llama-8b",
        device="cuda",
        tensor_parallel_size=1,
        applications=list(applications),
        **fields,
    )


def cells(table: Any) -> list[list[str]]:
    """Return the rows of a table."""
    return [list(row) for row in zip(*(column._cells for column in table.columns), strict=True)]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["disaggregated", "aggregated"])
def test_every_application_is_a_valid_configuration(engine: Any, device: Any, mode: Any) -> None:
    setup = Setup(
        name="x",
        engine=engine,
        mode=mode,
        device=device,
        source="baton:tiny",
        tensor_parallel_size=2,
        python="/x/python",
    )
    document = serve_document(setup, 8123)
    config = parse(document["applications"][0]["args"])
    model = config.models[0]
    assert document["http_options"] == {"host": "127.0.0.1", "port": 8123}
    assert (model.engine, model.is_disaggregated) == (engine, mode == "disaggregated")
    assert {pool.tensor_parallel_size for pool in model.pools().values()} == {2}
    assert {pool.python for pool in model.pools().values()} == {"/x/python"}


def test_a_variant_changes_only_what_it_names() -> None:
    variant = Variant("v", engine_args={"block_size": 64}, decode_args={"enforce_eager": True}, environment={"A": "1"})
    model = serve_document(VLLM.varied(variant), 8000)["applications"][0]["args"]["models"][0]
    assert model["engine_args"] == {"max_model_len": 4096, "block_size": 64}
    assert model["prefill"]["engine_args"] == {}
    assert model["decode"]["engine_args"] == {"enforce_eager": True}
    assert model["decode"]["environment"] == {"A": "1"}
    assert VLLM.engine_args == {"max_model_len": 4096}


def test_variants_come_by_name_or_from_a_file(tmp_path: Path) -> None:
    assert find_variants(None) == []
    assert find_variants(",".join(VARIANTS)) == list(VARIANTS.values())
    file = tmp_path / "variants.yaml"
    file.write_text("- {name: small, prefill_args: {max_num_batched_tokens: 2048}}\n")
    assert find_variants(str(file)) == [Variant("small", prefill_args={"max_num_batched_tokens": 2048})]
    file.write_text("- {name: small, prefil_args: {}}\n")
    for wrong in ("unheard-of", str(file), str(tmp_path / "none.json")):
        with pytest.raises(ConfigError, match="--variants"):
            find_variants(wrong)


def test_the_command_line_decides_what_is_measured() -> None:
    choice = Choice(
        engines=["vllm", "sglang"],
        source="baton:tiny",
        device="cuda",
        vllm_args={"gpu_memory_utilization": 0.5},
        variants=[VARIANTS["prefill-without-graphs"]],
    )
    vllm = find_setups(choice)
    assert [setup.name for setup in vllm] == ["vllm", "prefill-without-graphs"]
    assert vllm[1].engine_args == {"max_model_len": 16_384, "gpu_memory_utilization": 0.5}
    assert vllm[1].prefill_args == {"enforce_eager": True}
    both = find_setups(msgspec.structs.replace(choice, engines=["sglang"], sglang_python="/s/python"))
    assert [(setup.name, setup.mode, setup.python) for setup in both] == [
        ("sglang", "disaggregated", "/s/python"),
        ("sglang-aggregated", "aggregated", "/s/python"),
    ]
    assert both[0].engine_args == both[1].engine_args


class FakeBaton:
    """Answers as Baton does; each remote prefill moves 1 MB in 0.5 ms."""

    def __init__(self, kind: str | None = None, failing: int = 0) -> None:
        self.prompts: list[tuple[str, list[int]]] = []
        self._kind = kind
        self._failing = failing
        self._moved = 0

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self._answer), base_url="http://baton")

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": list(range(300, 400))})
        if request.url.path == "/stats":
            moved = {"num_transfers": self._moved, "transferred_bytes": self._moved * 1_000_000}
            decode = {"role": "decode", "transfer_s": self._moved * 0.0005, "transport": "cuda_ipc", **moved}
            return httpx.Response(200, json={"replicas": [{"role": "prefill"}, decode]})
        body = json.loads(request.content)
        mode = body["vllm_xargs"]["baton_prefill"]
        self.prompts.append((mode, body["prompt"]))
        if len(body["prompt"]) == self._failing:
            return httpx.Response(500, text="too much")
        self._moved += mode == "remote"
        actual = {
            "kind": self._kind or mode,
            "cached_tokens": 0,
            "phases": {"transfer": 1.5, "step": None},
        }
        explained = {"x-baton-explain": json.dumps([{"actual": actual}])}
        if not body.get("stream"):
            return httpx.Response(200, json={}, headers=explained)
        usage: list[dict[str, Any]] = [{"completion_tokens": num} for num in (0, 1, body["max_tokens"])]
        events = [json.dumps({"choices": [{"text": "x"}], "usage": each}) for each in usage]
        events.append(json.dumps({"choices": [], "usage": usage[-1]}))
        stream = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
        return httpx.Response(200, text=stream, headers=explained)


def test_an_answer_is_timed_and_explained() -> None:
    baton = FakeBaton()
    answer = Client(baton.client(), random.Random(0)).complete([1, 2, 3], "remote", max_tokens=5)
    assert answer.ttft_ms > 0
    assert len(answer.gaps_ms) == 4
    assert (answer.kind, answer.cached_tokens) == ("remote", 0)


def test_modes_alternate_and_no_prompt_comes_twice() -> None:
    baton = FakeBaton()
    hop = measure_hop(Client(baton.client(), random.Random(0)), ["remote", "local"], 64, repeat=3)
    timed, whole = baton.prompts[:8], baton.prompts[8:]
    assert [mode for mode, _ in timed] == ["remote", "local", "local", "remote"] * 2
    assert [mode for mode, _ in whole] == ["remote"] * 3
    assert len({tuple(prompt) for _, prompt in baton.prompts}) == 11
    assert {len(prompt) for _, prompt in baton.prompts} == {64}
    assert [len(each.answers) for each in hop.series.values()] == [3, 3]
    assert hop.phases_ms == {"transfer": 1.5}
    assert hop.series["remote"].second_token_ms is not None
    assert (hop.moved.num_transfers, hop.moved.num_bytes) == (4, 4_000_000)
    assert hop.moved.gb_per_s == pytest.approx(2.0)


def test_a_prompt_that_is_prefilled_elsewhere_is_no_measurement() -> None:
    with pytest.raises(MeasureError, match="prefilled local instead of remote"):
        measure_hop(Client(FakeBaton(kind="local").client(), random.Random(0)), ["remote"], 64, repeat=1)


def test_an_engine_without_local_prefill_has_one_mode() -> None:
    assert modes_of(Application(name="", engine="vllm", mode="disaggregated")) == ["remote", "local"]
    assert modes_of(Application(name="", engine="sglang", mode="disaggregated")) == ["remote"]
    assert modes_of(Application(name="", engine="sglang", mode="aggregated")) == ["auto"]


def test_every_part_is_measured_if_it_is_wanted() -> None:
    measured = Application(name="vllm", engine="vllm", mode="disaggregated")
    extent = Extent(lengths=[64, 512], cache_lengths=[128], repeat=2, parts=["hop", "itl", "cache"])
    steps = steps_of(Client(FakeBaton().client(), random.Random(0)), measured, extent)
    assert len(steps) == 6
    for _, step in steps:
        step()
    assert len(measured.first_ttfts_ms) == 3
    assert [hop.prompt_tokens for hop in measured.hops] == [64, 512]
    assert measured.steps is not None
    assert [(each.prompt_tokens, each.mode) for each in measured.cache] == [(128, "remote"), (128, "local")]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that runs a fake application, and returns the report that was written last."""

    def run(baton: FakeBaton, lengths: Sequence[int], time_limit_s: float | None = None) -> GpuReport:
        class Serving:
            def __enter__(self) -> float:
                return 1.0

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(gpu_runner, "serving", lambda *_: Serving())
        monkeypatch.setattr(gpu_runner, "new_client", lambda *_: baton.client())
        extent = Extent(lengths=lengths, cache_lengths=[], repeat=1, parts=["hop", "itl"])
        path = tmp_path / "gpu.json"
        runner = Runner(report(), extent, 0, path, tmp_path / "gpu.md", time_limit_s)
        runner.run(VLLM, 10.0)
        return msgspec.json.decode(path.read_bytes(), type=GpuReport)

    return run


def test_a_measurement_that_fails_is_said_and_leaves_the_others(start: Any, tmp_path: Path) -> None:
    found = start(FakeBaton(failing=2048), [64, 2048, 8192])
    assert [hop.prompt_tokens for hop in found.applications[0].hops] == [64, 8192]
    assert found.applications[0].steps is not None
    assert found.failures == [Failure("vllm: TTFT of 2048 tokens", "/v1/completions answered 500: too much")]
    assert "Not measured: vllm: TTFT of 2048 tokens" in (tmp_path / "gpu.md").read_text()


def test_an_application_that_does_not_answer_ends_its_measurements(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    baton = FakeBaton()

    def refuse(*_: Any, **__: Any) -> Answer:
        raise NoAnswer("gone")

    monkeypatch.setattr(Client, "complete", refuse)
    found = start(baton, [64, 512])
    assert found.failures == [Failure("vllm", "gone")]


def test_what_would_end_too_late_is_not_begun(start: Any) -> None:
    found = start(FakeBaton(), [64], 10.0)
    assert found.applications == []
    assert found.failures == [Failure("vllm", "left out for --time-limit")]


def test_the_rate_of_transfers_is_compared_with_the_nearest_copy() -> None:
    copies = [PeerCopy(1_000_000, 1e-3), PeerCopy(64_000_000, 4e-4)]
    assert nearest(copies, 60_000_000) == copies[1]
    assert nearest(copies, 2_000_000) == copies[0]
    assert nearest([], 1.0) is None
    rows = cells(transfer_table([application("vllm", 50, 30, 5)], copies))
    assert rows == [["vllm", "512", "64.0", "100.0", "0.64", "160.00", "0.00"]]
    assert cells(copy_table(copies))[1] == ["64.0", "0.400", "160.00"]


def test_variants_are_ratios_to_the_first_application() -> None:
    rows = cells(ratio_table([application("vllm", 50, 30, 5), application("eager", 100, 33, 10)]))
    assert rows == [["eager", "remote", "2.00", "2.00"], ["eager", "local", "1.10", "2.00"]]


def test_apart_is_compared_with_aggregated() -> None:
    apart = Application(name="sglang", engine="sglang", mode="disaggregated")
    alone = Application(name="sglang-aggregated", engine="sglang", mode="aggregated")
    apart.hops.append(Hop(512, {"remote": series(60, 40, 50)}, Moved(0, 0, 0.0, "")))
    alone.hops.append(Hop(512, {"auto": series(40)}, Moved(0, 0, 0.0, "")))
    assert cells(aggregated_table([apart, alone])) == [["sglang", "512", "50.0", "40.0", "10.0", "1.25"]]


def test_the_page_shows_what_there_is() -> None:
    whole = application(
        "vllm", 50, 30, 5, first_ttfts_ms=[300.0, 51.0, 50.0], cache=[CacheResult(512, "remote", 80, 40, 496)]
    )
    text = page([report(whole, failures=[Failure("sglang", "it did not start")])])
    for expected in (
        "2 x H100 (81559 MiB), driver 580",
        "commit abc: `python -m benchmarks.gpu measure`",
        "vllm: KV by `ipc`",
        "| vllm   | 300.0 |   51.0 |  50.0 |",
        "|           512 |        50.0 |       30.0 |            999.0 |           999.0 |       20.0 | "
        "                    7.0 |                    7.0 |      2.0 | 1 |",
        "|    5.00 |",
        "|          2.00 |",
        "Not measured: sglang: it did not start",
    ):
        assert expected in text, text
    assert "Variants" not in text
    assert page([report()]).count("|") == 0


def test_the_page_of_several_runs_has_them_all(tmp_path: Path) -> None:
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file, name in zip(files, ("first", "second"), strict=True):
        file.write_bytes(to_json(report(application(name, 50, 30, 5))))
    target = tmp_path / "page.md"
    done = CliRunner().invoke(to_app(measure, join), ["join", *map(str, files), "--page", str(target)])
    assert done.exit_code == 0, done.output
    text = target.read_text()
    assert text.index("first: time to first token") < text.index("second: time to first token")


def test_without_gpus_it_says_so_and_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(to_app(measure, join), ["measure"])
    assert done.exit_code == 1
    assert done.output.splitlines() == [
        "this needs 2 NVIDIA GPUs, and this machine shows 0 (CUDA_VISIBLE_DEVICES is set): nothing was run"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--parts", "vllm,typo"),
        ("--measurements", "hop,typo"),
        ("--lengths", "64,many"),
        ("--cache-lengths", "0"),
        ("--vllm-args", "{enforce_eager}"),
        ("--sglang-args", "[]"),
        ("--variants", "typo"),
    ],
)
def test_mistakes_are_named_before_anything_starts(option: str, value: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--page", str(tmp_path / "a.md")]
    done = CliRunner().invoke(to_app(measure, join), ["measure", "--device", "cpu", *files, option, value])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.field == option


def test_versions_come_from_the_other_environment(tmp_path: Path) -> None:
    assert versions_in(sys.executable)["ray"]
    assert versions_in(str(tmp_path / "none")) == {}


def test_copies_are_measured_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    python.write_text('#!/bin/sh\necho a warning\necho \'[{"size_bytes": 1000000, "seconds": 0.001}]\'\n')
    assert measure_peer_copy("cuda") == [PeerCopy(1_000_000, 0.001)]
    assert measure_peer_copy("cuda")[0].gb_per_s == pytest.approx(1.0)
    python.write_text("#!/bin/sh\necho no CUDA >&2\nexit 1\n")
    with pytest.raises(PeerCopyFailed, match="no CUDA"):
        measure_peer_copy("cuda")
