"""`baton bench`: the command, on a tiny endpoint, with a client that makes its results up."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from app.bench.endpoint import Endpoint, find_endpoint
from app.bench.load import LoadFailed, LoadResult
from app.bench.measure import WARM_UP_REQUESTS
from app.bench.workload import RequestPlan
from app.cli import bench as cli
from app.cli.entry import to_app
from app.errors import ConfigError
from tests.unit.bench.samples import make_result
from tests.unit.bench.server import TinyServer, serving


@pytest.fixture
def server() -> Iterator[TinyServer]:
    with serving() as server:
        yield server


class ScriptedClient:
    """Stands in for LoadClient: keeps what it was to send, and answers at once."""

    sent: ClassVar[list[tuple[str, RequestPlan]]] = []

    def __init__(self, log: Path) -> None: ...

    def start(self) -> None: ...

    def check_tokenizer(self, tokenizer: str) -> None: ...

    def close(self) -> None: ...

    def send(
        self,
        url: str,
        model: str,
        tokenizer: str,
        load: RequestPlan,
        limits_ms: Mapping[str, float] | None = None,
        *_: Any,
    ) -> LoadResult:
        self.sent.append((url, load))
        return self.answer(url, load)

    @staticmethod
    def answer(url: str, load: RequestPlan) -> LoadResult:
        return make_result()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `baton bench` with these arguments."""
    monkeypatch.setattr(cli, "LoadClient", ScriptedClient)
    ScriptedClient.sent.clear()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda *arguments: CliRunner().invoke(to_app(cli.bench), [*map(str, arguments)])


def measured() -> list[tuple[str, RequestPlan]]:
    """What was sent after the warm-up."""
    return [(url, load) for url, load in ScriptedClient.sent if len(load.requests) != WARM_UP_REQUESTS]


class TestLevels:
    def test_a_closed_loop_is_what_one_gets(self, bench: Callable[..., Result], server: TinyServer) -> None:
        assert bench(server.url, "--input", "20").exit_code == 0
        assert [(load.concurrency, len(load.requests)) for _, load in measured()] == [(1, 24), (8, 32), (32, 128)]
        assert {request.at_s for _, load in measured() for request in load.requests} == {0.0}

    def test_an_open_loop_lasts_ten_seconds_at_least(self, bench: Callable[..., Result], server: TinyServer) -> None:
        assert bench(server.url, "--rate", "10,0.5", "--requests", "20", "--input", "20").exit_code == 0
        loads = [load for _, load in measured()]
        assert [(load.concurrency, len(load.requests)) for load in loads] == [(None, 20), (None, 100)]
        assert [load.requests[-1].at_s for load in loads] == pytest.approx([40.0, 10.0])

    def test_a_trace_is_replayed_without_what_is_too_long(
        self, bench: Callable[..., Result], server: TinyServer, tmp_path: Path
    ) -> None:
        trace = tmp_path / "trace.jsonl"
        lengths = {0: 400, 8000: 500, 9000: 520, 10_000: 502}
        lines = [
            {"timestamp": moment, "input_length": length, "output_length": 10, "hash_ids": [1, 2]}
            for moment, length in lengths.items()
        ]
        trace.write_text("\n".join(json.dumps(line) for line in lines))
        result = bench(server.url, "--trace", trace, "--speed", "1,4")
        assert result.exit_code == 0
        assert "left out: 2 of 8 requests: too long for the model" in result.output
        assert "trace trace.jsonl" in result.output
        moments = [[request.at_s for request in load.requests] for _, load in ScriptedClient.sent[1:]]
        assert moments == [[0.0, 8.0, 10.0], [0.0, 2.0, 2.5]]

    def test_endpoints_take_turns_and_get_the_same(self, bench: Callable[..., Result], server: TinyServer) -> None:
        with serving() as other:
            arguments = (f"a={server.url}", "--against", f"b={other.url}", "--repetitions", "2", "--input", "20")
            assert bench(*arguments, "--concurrency", "1,2", "--seed", "7").exit_code == 0
            a, b = server.url, other.url
            forwards, backwards = (a, b, b, a), (b, a, a, b)
            assert [url for url, _ in measured()] == [*forwards, *backwards], "each level both ways round"
        loads = [load for _, load in measured()]
        assert all(a == b for a, b in zip(loads[::2], loads[1::2], strict=True))
        assert len({load.seed for load in loads}) == 4, "no prompt comes twice to the same endpoint"

    def test_the_seed_decides_all(self, bench: Callable[..., Result], server: TinyServer) -> None:
        sent = []
        for seed in ("7", "7", "8"):
            ScriptedClient.sent.clear()
            bench(server.url, "--input", "uniform:5:400", "--seed", seed)
            sent.append([load for _, load in measured()])
        assert sent[0] == sent[1] != sent[2]


class TestResults:
    def test_json_picture_and_tables(self, bench: Callable[..., Result], server: TinyServer, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        files = (tmp_path / "out.json", tmp_path / "out.svg")
        options = ("--slo", "ttft:500,tpot:50", "--input", "20", "--json", files[0], "--picture", files[1])
        with serving() as other:
            result = bench(f"a={server.url}/v1", "--against", f"b={other.url}", "--pid", os.getpid(), *options)
        assert result.exit_code == 0
        assert "ratios to b" in result.output
        document = json.loads(files[0].read_text())
        assert document["limits_ms"] == {"ttft": 500, "tpot": 50}
        assert [each["version"] for each in document["endpoints"]] == ["1.2.3", "1.2.3"]
        costs = {m["target"]: m["cpu_s_per_request"] for m in document["measurements"]}
        assert costs["a"] >= 0.0
        assert costs["b"] is None, "no process was named"
        assert "a and b" in files[1].read_text()

    def test_a_load_that_fails_is_noted_and_the_rest_goes_on(
        self, bench: Callable[..., Result], server: TinyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def answer(url: str, load: RequestPlan) -> LoadResult:
            if load.concurrency == 8:
                raise LoadFailed("all 32 requests failed")
            return make_result()

        monkeypatch.setattr(ScriptedClient, "answer", staticmethod(answer))
        result = bench(f"a={server.url}", "--input", "20")
        assert result.exit_code == 0
        assert "not measured: a (repetition 1): concurrency 8: all 32 requests failed" in result.output
        assert "| 32 | a " in result.output

    def test_an_interrupted_benchmark_prints_what_it_has(
        self, bench: Callable[..., Result], server: TinyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def answer(url: str, load: RequestPlan) -> LoadResult:
            if load.concurrency == 8:
                raise KeyboardInterrupt
            return make_result(ttft_ms=12.5)

        monkeypatch.setattr(ScriptedClient, "answer", staticmethod(answer))
        result = bench(f"a={server.url}", "--input", "20", "--json", tmp_path / "out.json")
        assert result.exit_code == 130
        assert "12.5" in result.output
        assert len(json.loads((tmp_path / "out.json").read_text())["measurements"]) == 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            (("--concurrency", "two"), "--concurrency: 'two' are no comma-separated numbers"),
            (("--concurrency", "1.5"), "--concurrency: '1.5' are not whole numbers"),
            (("--rate", "1,0"), "--rate: '1,0': every number has to be above 0"),
            (("--rate", "1", "--concurrency", "1"), "--concurrency: does nothing here: --rate is an open loop"),
            (("--burstiness", "1"), "--burstiness: does nothing here: there is no --rate"),
            (("--rate", "1", "--burstiness", "0"), "--burstiness: has to be above 0"),
            (("--prefixes", "3"), "--prefixes: does nothing here: there are no --prefix-tokens"),
            (("--speed", "2"), "--speed: does nothing here: there is no --trace"),
            (("--trace", "nowhere"), "--trace: nowhere cannot be read"),
            (("--input", "zipf:1"), "--input: 'zipf:1' is no distribution"),
            (("--output", "x"), "--output: 'x' is no distribution"),
            (("--input", "450"), "--input: no request fits the 512 tokens"),
            (("--slo", "itl:5"), "--slo: there is no latency 'itl'; known are ttft, tpot, e2e"),
            (("--slo", "ttft"), "--slo: '' are no comma-separated numbers"),
            (("--json", "nowhere/out.json"), "--json: the folder of nowhere/out.json does not exist"),
            (("--picture", "out.gif"), "--picture: out.gif ends with none of"),
            (("--model", "huge"), "--model: there is no model 'huge'; served are tiny"),
            (("--tokenizer", "./nowhere"), "--tokenizer: the folder './nowhere' does not exist"),
            (("--pid", "4194305"), "--pid: there is no process 4194305"),
            (("--against-pid", "1"), "--against-pid: does nothing here: there is no --against"),
        ],
    )
    def test_each_names_its_option(
        self, bench: Callable[..., Result], server: TinyServer, options: tuple[str, ...], problem: str
    ) -> None:
        result = bench(server.url, *options)
        assert isinstance(result.exception, ConfigError)
        assert problem in str(result.exception)
        assert ScriptedClient.sent == []

    def test_a_trace_draws_nothing(self, bench: Callable[..., Result], server: TinyServer, tmp_path: Path) -> None:
        result = bench(server.url, "--trace", tmp_path / "t", "--rate", "1")
        assert str(result.exception) == "--rate: does nothing here: --trace brings its own"

    def test_two_endpoints_of_one_name(self, bench: Callable[..., Result], server: TinyServer) -> None:
        result = bench(server.url, "--against", server.url)
        assert "--against: both are called" in str(result.exception)

    def test_an_endpoint_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r"^--against: http://127\.0\.0\.1:9 does not answer: "):
            find_endpoint("--against", "http://127.0.0.1:9", None, None, [])

    @pytest.mark.parametrize("text", ["127.0.0.1:8000", "ftp://host", "a=b=http://host", "http://", ""])
    def test_what_is_no_url(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^URL: .* is no URL"):
            find_endpoint("URL", text, None, None, [])

    def test_a_server_that_is_no_openai_endpoint(self, server: TinyServer) -> None:
        with pytest.raises(ConfigError, match=r"GET .*\d/nothing/v1/models answered 404"):
            find_endpoint("URL", f"{server.url}/nothing", None, None, [])


class TestEndpoint:
    def test_what_it_says_of_itself(self, server: TinyServer) -> None:
        endpoint = find_endpoint("URL", f"mine={server.url}/v1/", None, None, [])
        assert endpoint == Endpoint("mine", server.url, "tiny", "tiny", 512, "1.2.3")

    def test_its_name_is_its_host_and_port_unless_given(self, server: TinyServer) -> None:
        assert find_endpoint("URL", server.url, None, None, []).name == server.url.removeprefix("http://")

    def test_the_tokenizer_is_the_models_root_where_that_is_a_folder(self, server: TinyServer, tmp_path: Path) -> None:
        server.models = [{"id": "other"}, {"id": "tiny", "root": str(tmp_path)}]
        assert find_endpoint("URL", server.url, "tiny", None, []).tokenizer == str(tmp_path)
        assert find_endpoint("URL", server.url, None, None, []).tokenizer == "other"
        assert find_endpoint("URL", server.url, "tiny", "some/name", []).tokenizer == "some/name"
