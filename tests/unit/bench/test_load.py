"""`baton bench`: what the load's client sends to a real HTTP endpoint, and what becomes of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.bench.load import LoadClient, LoadFailed, check_complete, parse_report
from app.bench.workload import LoadSpec, Request, RequestPlan
from tests.unit.bench.server import TinyServer, serving


def make_load(*output_tokens: int) -> RequestPlan:
    return RequestPlan([Request(0.0, [(n, 5)], tokens) for n, tokens in enumerate(output_tokens)], None, "0")


def make_vllm_report(**changes: Any) -> dict[str, Any]:
    """What vLLM's client returns for three requests of 3 tokens, which took 10, 20 and 30 ms in 2 s; seconds."""
    report = {
        "duration": 2.0,
        "client_cpu_s": 0.5,
        "errors": ["", "", ""],
        "output_lens": [3, 3, 3],
        "input_lens": [5, 5, 5],
        "ttfts": [0.004, 0.008, 0.012],
        "latencies": [0.010, 0.020, 0.030],
        "itls": [[0.003, 0.003], [0.006, 0.006], [0.018]],
    }
    return {**report, **changes}


class TestResult:
    def test_latencies_are_those_of_requests_in_ms(self) -> None:
        result = parse_report(make_vllm_report(), make_load(3, 3, 3), {})
        assert (result.ttft_ms, result.ttft_mean_ms) == pytest.approx((8.0, 8.0))
        assert (result.e2e_ms, result.e2e_p90_ms, result.e2e_p99_ms) == pytest.approx((20.0, 28.0, 29.8))
        assert (result.tpot_ms, result.tpot_p99_ms) == pytest.approx((6.0, 8.94)), "(end - first) / 2 further tokens"
        assert (result.itl_ms, result.itl_mean_ms) == pytest.approx((6.0, 7.2)), "of all gaps, not of requests"

    def test_rates_and_chunks(self) -> None:
        result = parse_report(make_vllm_report(), make_load(3, 3, 3), {})
        assert (result.num_completed, result.num_failed, result.input_tokens, result.output_tokens) == (3, 0, 15, 9)
        assert (result.requests_per_s, result.output_tokens_per_s, result.client_cores) == (1.5, 4.5, 0.25)
        assert result.chunks_per_request == pytest.approx(8 / 3), "the last request got two tokens in one chunk"
        assert result.tokens_per_chunk == pytest.approx(9 / 8)

    @pytest.mark.parametrize(
        ("limits_ms", "num_good"),
        [
            ({"ttft": 8.1}, 2),
            ({"ttft": 100.0, "e2e": 10.1}, 1),
            ({"tpot": 6.1}, 2),
            ({"ttft": 8.1, "tpot": 1.0}, 0),
            ({"ttft": 100.0, "tpot": 100.0, "e2e": 100.0}, 3),
        ],
    )
    def test_goodput_counts_what_keeps_every_limit(self, limits_ms: dict[str, float], num_good: int) -> None:
        result = parse_report(make_vllm_report(), make_load(3, 3, 3), limits_ms)
        assert result.goodput_per_s == num_good / 2.0

    def test_without_limits_there_is_no_goodput(self) -> None:
        assert parse_report(make_vllm_report(), make_load(3, 3, 3), {}).goodput_per_s is None

    def test_a_single_token_has_no_tpot_and_keeps_its_limit(self) -> None:
        report = make_vllm_report(output_lens=[1, 1, 3], itls=[[], [], [0.009, 0.009]], latencies=[0.004, 0.008, 0.03])
        result = parse_report(report, make_load(1, 1, 3), {"tpot": 0.1})
        assert result.tpot_ms == result.tpot_p90_ms == pytest.approx(9.0)
        assert result.goodput_per_s == 1.0

    def test_failed_requests_count_by_reason_and_leave_latencies_alone(self) -> None:
        report = make_vllm_report(
            errors=["Traceback\n...\nBad Gateway\n", "", ""], output_lens=[0, 3, 2], ttfts=[0.0, 0.008, 9.9]
        )
        result = parse_report(report, make_load(3, 3, 3), {"ttft": 1000.0})
        assert (result.num_completed, result.num_failed) == (1, 2)
        assert result.failures == {"Bad Gateway": 1, "2 output tokens instead of 3": 1}
        assert (result.ttft_ms, result.goodput_per_s) == pytest.approx((8.0, 0.5))

    def test_a_stream_that_just_ends_is_a_failure(self) -> None:
        """vLLM's client takes it for a success of one token."""
        result = parse_report(make_vllm_report(output_lens=[3, 1, 3]), make_load(3, 3, 3), {})
        assert result.failures == {"the stream ended early, or without the usage that was asked for": 1}

    def test_no_success_at_all_is_an_error_that_says_why(self) -> None:
        report = make_vllm_report(errors=["Bad Gateway"] * 2 + ["reset"], output_lens=[0, 0, 0])
        with pytest.raises(LoadFailed, match="all 3 requests failed, 2 of them: Bad Gateway"):
            parse_report(report, make_load(3, 3, 3), {})

    def test_who_compares_wants_every_request(self) -> None:
        whole = parse_report(make_vllm_report(), make_load(3, 3, 3), {})
        assert check_complete(whole, 3) is whole
        part = parse_report(make_vllm_report(output_lens=[3, 2, 3]), make_load(3, 3, 3), {})
        with pytest.raises(LoadFailed, match="1 of 3 requests failed: 2 output tokens instead of 3"):
            check_complete(part, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 100 words and one special token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    words = {"<end>": 0, **{f"word{n}": n for n in range(1, 101)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<end>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadClient]:
    """The real one; it takes some 10 s to start."""
    client = LoadClient(tmp_path_factory.mktemp("logs") / "load.log")
    yield client
    client.close()


@pytest.fixture
def server() -> Iterator[TinyServer]:
    with serving() as server:
        yield server


class TestClient:
    def test_a_closed_loop_keeps_its_streams_busy(self, client: LoadClient, server: TinyServer, tokenizer: str) -> None:
        result = client.run(server.url, "tiny", tokenizer, LoadSpec(4, 12, input_tokens=20, output_tokens=10))
        assert (result.num_completed, result.output_tokens, result.input_tokens) == (12, 120, 240)
        assert server.most_running == 4
        assert result.chunks_per_request == 10
        assert 0 < result.ttft_ms < result.e2e_ms <= result.e2e_p99_ms
        assert result.tpot_ms >= 2.0, "the server sleeps so long between chunks"
        assert 0 < result.client_cores < 1

    def test_what_is_sent(self, client: LoadClient, server: TinyServer, tokenizer: str) -> None:
        client.run(server.url, "tiny", tokenizer, LoadSpec(1, 3, input_tokens=20, output_tokens=10))
        body = server.bodies[0]
        assert {name: body[name] for name in ("model", "max_tokens", "ignore_eos", "temperature", "stream")} == {
            **{"model": "tiny", "max_tokens": 10, "ignore_eos": True, "temperature": 0, "stream": True}
        }
        prompts = {tuple(body["prompt"]) for body in server.bodies}
        assert len(prompts) == 3
        assert all(1 <= token <= 100 for prompt in prompts for token in prompt), "never a special token"

    def test_an_open_loop_does_not_wait_for_answers(
        self, client: LoadClient, server: TinyServer, tokenizer: str
    ) -> None:
        requests = [Request(at_s, [(n, 5)], 100) for n, at_s in enumerate((0.0, 0.05, 0.15))]
        progress: list[int] = []
        result = client.send(
            server.url, "tiny", tokenizer, RequestPlan(requests, None, "0"), {"ttft": 1e6}, on_progress=progress.append
        )
        assert server.most_running == 3, "each takes 0.2 s at least, so they overlap"
        gaps = [later - server.moments[0] for later in server.moments]
        assert gaps == pytest.approx([0.0, 0.05, 0.15], abs=0.04)
        assert result.goodput_per_s == result.requests_per_s

    def test_failures_and_merged_tokens(self, client: LoadClient, server: TinyServer, tokenizer: str) -> None:
        server.fail_every, server.tokens_per_chunk = 3, 5
        result = client.send(server.url, "tiny", tokenizer, LoadSpec(1, 6, 5, 10).load())
        assert result.failures == {"No Replica": 2}
        assert (result.num_completed, result.tokens_per_chunk, result.chunks_per_request) == (4, 5.0, 2.0)
        server.stop_after = 7
        with pytest.raises(LoadFailed, match="all 2 requests failed"):
            client.run(server.url, "tiny", tokenizer, LoadSpec(1, 2, 5, 10))

    def test_an_error_in_the_client_is_told(self, client: LoadClient, tmp_path: Path) -> None:
        with pytest.raises(LoadFailed, match=r"the load's client: .*nowhere"):
            client.check_tokenizer(str(tmp_path / "nowhere"))

    def test_a_client_that_was_killed_is_noticed(self, client: LoadClient, tokenizer: str) -> None:
        client.start()
        client._process.kill()
        with pytest.raises(LoadFailed, match="the load's client ended"):
            client.check_tokenizer(tokenizer)
        assert client._connection is None, "so the next call starts another"
