"""``baton verify``: when two answers count as the same, and when nothing was verified."""

import json
import math
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from app.cli.verify import (
    OUTPUT_TOKENS,
    TOLERANCE_OF_PREFILL,
    Case,
    GreedyOutput,
    VerifyError,
    VerifyTarget,
    _prompts,
    compare_output,
)
from app.cli.verify import TOLERANCE as USUAL_TOLERANCE
from app.errors import ConfigError

TOLERANCE = 0.02
PATIENCE_S = 30.0
"""How long a pool may take to become reachable in tests in which it does."""
NUM_PROMPTS = 10
"""Prompts that one run prefills remotely: five lengths, three with a shared prefix and one twice."""
NUM_BY_PREFILL = 7 * 2 * OUTPUT_TOKENS
"""Requests that make the reference by prefill: for each group of prompts two answers, token by token."""
SHARED_PREFIX_AT = 5 * 4
"""The completions before the three prompts with a shared prefix: of each length one by remote prefill, three local."""
UNREACHABLE = "the {} pool of {} has no replica that the frontend can reach"
BETWEEN = (USUAL_TOLERANCE + TOLERANCE_OF_PREFILL) / 2
"""A logprob difference that passes where prefill alone is the reference."""


def answer(tokens: str, *logprobs: float, margin: float = 5.0) -> GreedyOutput:
    return GreedyOutput(list(tokens), list(logprobs), [margin] * len(tokens))


# Comparing


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        (answer("ab", -1.0, -2.0), answer("ab", -1.0, -2.0), 0.0),
        (answer("ab", -1.0, -2.0), answer("ab", -1.25, -1.5), 0.5),
        (answer("ab", -1.0, -2.0), answer("ac", -1.25, -9.0), 0.25),
        (answer("abc", -1.0, -2.0, -3.0), answer("a", -1.5), 0.5),
        (answer("ab", -1.0, -2.0), answer("xb", -1.0, -2.0), math.inf),
        (answer(""), answer(""), math.inf),
    ],
    ids=["same", "largest", "until tokens differ", "until one ends", "first token differs", "empty"],
)
def test_the_difference_counts_until_the_tokens_differ(
    ours: GreedyOutput, theirs: GreedyOutput, difference: float
) -> None:
    assert ours.max_difference(theirs) == theirs.max_difference(ours) == difference


@pytest.mark.parametrize(
    ("ours", "theirs", "num"),
    [("abc", "abc", 3), ("abx", "abc", 2), ("xbc", "abc", 0), ("axc", "abc", 1), ("ab", "abc", 2), ("", "abc", 0)],
)
def test_equal_tokens_are_counted_until_the_first_that_differs_or_lacks(ours: str, theirs: str, num: int) -> None:
    one, other = answer(ours, *[0.0] * len(ours)), answer(theirs, *[0.0] * len(theirs))
    assert one.num_equal(other) == other.num_equal(one) == num


def passes(remote: GreedyOutput, margin: float = 5.0, noise: float = 0.0) -> bool:
    return Case("case", 7, remote, answer("ab", -1.0, -2.0, margin=margin), noise).passes(TOLERANCE)


@pytest.mark.parametrize("difference", [0.0, TOLERANCE / 2, -TOLERANCE / 2])
def test_equal_tokens_with_near_logprobs_pass(difference: float) -> None:
    assert passes(answer("ab", -1.0, -2.0 + difference))


@pytest.mark.parametrize("difference", [TOLERANCE * 2, -TOLERANCE * 2])
def test_equal_tokens_with_other_logprobs_fail(difference: float) -> None:
    assert not passes(answer("ab", -1.0, -2.0 + difference))


def test_noise_raises_what_passes_to_twice_the_noise() -> None:
    assert passes(answer("ab", -1.0, -2.5), noise=0.25)
    assert not passes(answer("ab", -1.0, -2.75), noise=0.25)


def test_a_token_may_differ_where_noise_can_flip_it() -> None:
    assert passes(answer("ax", -1.0, -2.0), margin=TOLERANCE / 2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_token_that_noise_cannot_flip_must_not_differ(noise: float) -> None:
    assert not passes(answer("ax", -1.0, -2.0), margin=5.0, noise=noise)


def test_the_first_token_must_not_differ() -> None:
    assert not passes(answer("xb", -1.0, -2.0), margin=0.0)


def test_an_answer_that_ends_early_fails() -> None:
    assert not passes(answer("a", -1.0))


def test_noise_without_bounds_does_not_make_everything_pass() -> None:
    # The engine's own answers differ from the first token on: nothing can be told from a comparison.
    assert not passes(answer("ax", -1.0, -9.0), noise=math.inf)


# Against an application


class FakeBaton(ThreadingHTTPServer):
    """Answers like Baton; what a prefill mode does to the answer is up to the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeBatonHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.max_model_len = 4096
        self.engine = "vllm"
        self.modes = {"tiny": "disaggregated"}
        """How each model is served."""
        self.after_transfer: tuple[str, float] | None = None
        """Token and logprob that decode computes after the first token of what was prefilled remotely, if others."""
        self.token_by_mode: dict[str, str] = {}
        self.logprob_by_mode: dict[str, float] = {}
        self.num_local = 0
        """How many of the next prompts decode prefills itself although it should not."""
        self.num_transfers = 100
        self.num_probes = 0
        self.completions: list[dict[str, Any]] = []
        self.fixed: dict[str, tuple[int, str]] = {}
        """Status and body of what some paths answer instead."""
        self.reachable = {"tiny": {"prefill": 1, "decode": 2}, "alone": {"decode": 1}}
        """How many replicas of each pool the frontend that answers can reach."""
        self.not_yet: list[tuple[int, str]] = []
        """What the next requests get while there is no application."""
        self.num_polls = 0
        """How often /health was asked."""
        self.ready_after_polls = 0
        """Until /health was asked so often, no pool of prefill can be reached."""
        self.lacking: list[tuple[int, str]] = []
        """After so many completions, another frontend answers the next one, and cannot reach that pool."""

    def reply(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            facts = {
                "engine": self.engine,
                "max_model_len": self.max_model_len,
                "local_prefill": self.engine != "sglang",
            }
            return {"data": [{"id": name, "mode": mode, **facts} for name, mode in self.modes.items()]}
        if path == "/tokenize":
            return {"tokens": [3, 4, 5]}
        if path == "/health":
            return {"models": [{"name": name, "pools": self.pools(name)} for name in self.modes]}
        if path == "/stats":
            num = self.num_transfers + self.num_probes
            counted = {"num_transfers": num, "num_probes": self.num_probes, "transferred_bytes": 0, "transport": "tcp"}
            busy = {"num_transfers": len(self.completions), "num_probes": 0, "transferred_bytes": 0, "transport": "shm"}
            return {
                "replicas": [
                    {"model": "tiny", "role": "prefill", **counted},
                    {"model": "tiny", "role": "decode", **counted},
                    {"model": "busy", "role": "decode", **busy},
                ]
            }
        return self.complete(body)

    def pools(self, model: str) -> dict[str, dict[str, int]]:
        self.num_polls += 1
        late = {"prefill": 0} if self.num_polls <= self.ready_after_polls else {}
        return {role: {"reachable": late.get(role, num)} for role, num in self.reachable.get(model, {}).items()}

    def lacks(self, path: str) -> str | None:
        """Return the pool that the frontend which gets this completion cannot reach."""
        if path == "/v1/completions" and self.lacking and len(self.completions) == self.lacking[0][0]:
            return self.lacking.pop(0)[1]
        return None

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        self.completions.append(body)
        mode = body["vllm_xargs"]["baton_prefill"]
        if mode in ("remote", "corrupted"):  # without either it would be Baton's own choice
            self.num_local -= 1
            self.num_transfers += self.num_local < 0
            self.num_probes += 1  # new prefill replicas come all the time
        first = self.token_by_mode.get(mode, "token_id:7"), self.logprob_by_mode.get(mode, -1.0)
        rest = first if mode == "local" or self.after_transfer is None else self.after_transfer
        tokens, logprobs = zip(first, *[rest] * (body["max_tokens"] - 1), strict=True)
        candidates = [{token: logprob, "token_id:1": -6.0} for token, logprob in zip(tokens, logprobs, strict=True)]
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": candidates}}]}


class FakeBatonHandler(BaseHTTPRequestHandler):
    server: FakeBaton
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        lacking, explanation = self.server.lacks(self.path), ""
        if lacking is not None and self.server.engine == "sglang":
            status, text = 503, f"the {lacking} pool has no ready replica"
        else:
            early = self.server.not_yet.pop(0) if self.server.not_yet else None
            status, text = (
                early or self.server.fixed.get(self.path) or (200, json.dumps(self.server.reply(self.path, body)))
            )
        if lacking is not None and status == 200 and body["vllm_xargs"]["baton_prefill"] != "local":
            self.server.num_transfers -= 1
            actual = {"kind": "local", "reason": f"no_{lacking}_replica", "ttft_ms": 1.0}
            explanation = json.dumps([{"kind": "local", "reason": actual["reason"], "actual": actual}])
        self.send_response(status)
        if "x-baton-explain" in self.headers and explanation:
            self.send_header("x-baton-explain", explanation)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(server: FakeBaton) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield
    server.shutdown()
    thread.join()


@pytest.fixture
def baton(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBaton]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("app.cli.verify.POLL_S", 0.001)
    with FakeBaton() as server, serving(server):
        yield server


@pytest.fixture
def sglang(baton: FakeBaton) -> FakeBaton:
    """An engine whose decode replicas cannot prefill."""
    baton.engine = "sglang"
    return baton


def verified(
    url: str,
    corrupt_kv: bool = False,
    tolerance: float | None = TOLERANCE,
    wait_s: float = PATIENCE_S,
    **models: str,
) -> bool:
    return compare_output(url, corrupt_kv=corrupt_kv, tolerance=tolerance, seed=0, wait_s=wait_s, **models)


def test_equal_output_passes(baton: FakeBaton, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(baton.url)
    assert f"KV of {NUM_PROMPTS} of {NUM_PROMPTS} prompts moved" in capsys.readouterr().out


def test_other_tokens_fail(baton: FakeBaton) -> None:
    baton.token_by_mode["remote"] = "token_id:8"
    assert not verified(baton.url)


def test_other_logprobs_fail(baton: FakeBaton) -> None:
    baton.logprob_by_mode["remote"] = -1.0 - 2 * TOLERANCE
    assert not verified(baton.url)


def test_corruption_asks_for_wrong_kv_and_fails_if_it_arrives(baton: FakeBaton) -> None:
    baton.token_by_mode["corrupted"] = "token_id:8"
    assert not verified(baton.url, corrupt_kv=True)


def test_a_corrupted_run_that_still_passes_is_not_hidden(baton: FakeBaton) -> None:
    assert verified(baton.url, corrupt_kv=True)


@pytest.mark.parametrize("num_local", [1, NUM_PROMPTS])
def test_prompts_that_were_prefilled_locally_verify_nothing(baton: FakeBaton, num_local: int) -> None:
    baton.num_local = num_local
    with pytest.raises(VerifyError, match=f"only {NUM_PROMPTS - num_local} of {NUM_PROMPTS} prompts"):
        verified(baton.url)


def test_no_serving_can_reuse_the_kv_of_another(baton: FakeBaton) -> None:
    verified(baton.url)
    modes_by_salt: dict[str, set[str]] = {}
    for body in baton.completions:
        modes_by_salt.setdefault(body["cache_salt"], set()).add(body["vllm_xargs"]["baton_prefill"])
    # seven groups of prompts, served three times each: once remotely and twice locally
    assert sorted(sorted(modes) for modes in modes_by_salt.values()) == [["local"]] * 14 + [["remote"]] * 7


@pytest.mark.parametrize("max_model_len", [128, 512, 1024, 2048, 4096])
def test_every_prompt_leaves_room_for_the_output(baton: FakeBaton, max_model_len: int) -> None:
    baton.max_model_len = max_model_len
    with httpx.Client(base_url=baton.url) as client:
        groups = _prompts(VerifyTarget(client), random.Random(0))
    assert max(len(prompt) for _, prompts in groups for prompt in prompts) + OUTPUT_TOKENS <= max_model_len


# Which model, and what it is compared with


def asked(baton: FakeBaton) -> set[tuple[str, str]]:
    """Which models were asked to prefill how."""
    return {(body["model"], body["vllm_xargs"]["baton_prefill"]) for body in baton.completions}


def test_the_first_disaggregated_model_is_verified(baton: FakeBaton) -> None:
    baton.modes = {"alone": "aggregated", "tiny": "disaggregated", "other": "disaggregated"}
    assert verified(baton.url)
    assert asked(baton) == {("tiny", "remote"), ("tiny", "local")}


def test_a_model_can_be_named(baton: FakeBaton) -> None:
    baton.modes = {"other": "disaggregated", "tiny": "disaggregated"}
    assert verified(baton.url, model="tiny")
    assert asked(baton) == {("tiny", "remote"), ("tiny", "local")}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_reference_answers_what_would_have_been_prefilled_locally(baton: FakeBaton, engine: str) -> None:
    baton.engine = engine
    baton.modes = {"tiny": "disaggregated", "alone": "aggregated"}
    assert verified(baton.url, reference="alone")
    assert asked(baton) == {("tiny", "remote"), ("alone", "local")}
    assert {body["max_tokens"] for body in baton.completions} == {OUTPUT_TOKENS}


def test_a_reference_that_answers_otherwise_fails(baton: FakeBaton) -> None:
    baton.modes = {"tiny": "disaggregated", "alone": "aggregated"}
    baton.token_by_mode["local"] = "token_id:8"
    assert not verified(baton.url, reference="alone")


@pytest.mark.parametrize(
    ("modes", "named", "words"),
    [
        ({"tiny": "aggregated"}, {}, r"serves no disaggregated model; it serves tiny \(aggregated\)"),
        ({}, {}, "serves no disaggregated model"),
        (
            {"tiny": "disaggregated"},
            {"model": "huge"},
            r"no disaggregated model huge; it serves tiny \(disaggregated\)",
        ),
        ({"tiny": "disaggregated", "a": "aggregated"}, {"model": "a"}, "no disaggregated model a; it serves tiny"),
        ({"tiny": "disaggregated"}, {"reference": "huge"}, "no aggregated model huge; it serves tiny"),
        ({"tiny": "disaggregated"}, {"reference": "tiny"}, "no aggregated model tiny; it serves tiny"),
    ],
    ids=["aggregated only", "none", "unknown", "aggregated", "unknown reference", "disaggregated reference"],
)
def test_a_model_that_is_not_there_is_an_error(
    baton: FakeBaton, modes: dict[str, str], named: dict[str, Any], words: str
) -> None:
    baton.modes = modes
    with pytest.raises(VerifyError, match=words):
        verified(baton.url, **named)
    assert baton.completions == []


def test_another_server_than_batons_is_an_error(baton: FakeBaton) -> None:
    baton.fixed["/v1/models"] = 200, json.dumps({"data": [{"id": "tiny", "max_model_len": 4096}]})
    with pytest.raises(VerifyError, match="serves no disaggregated model"):
        verified(baton.url)


# An engine whose decode replicas cannot prefill: compared with what its prefill replicas compute


def by_prefill(baton: FakeBaton) -> list[dict[str, Any]]:
    return [body for body in baton.completions if body["max_tokens"] == 1]


def test_equal_output_by_prefill_passes(sglang: FakeBaton, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(sglang.url)
    num = NUM_PROMPTS + NUM_BY_PREFILL
    assert f"KV of {num} of {num} prompts moved" in capsys.readouterr().out


def test_nothing_asks_for_local_prefill_of_an_engine_that_cannot(sglang: FakeBaton) -> None:
    verified(sglang.url, corrupt_kv=True)
    assert asked(sglang) == {("tiny", "remote"), ("tiny", "corrupted")}
    assert {body["vllm_xargs"]["baton_prefill"] for body in by_prefill(sglang)} == {"remote"}


def test_each_token_of_the_reference_is_prefilled_from_all_before_it(sglang: FakeBaton) -> None:
    verified(sglang.url)
    requests = by_prefill(sglang)
    assert len(requests) == NUM_BY_PREFILL
    for start in range(0, len(requests), OUTPUT_TOKENS):
        prompts = [body["prompt"] for body in requests[start : start + OUTPUT_TOKENS]]
        assert prompts == [prompts[0] + [7] * num for num in range(OUTPUT_TOKENS)]


def test_the_reference_by_prefill_is_made_without_and_with_a_prefix_cache(sglang: FakeBaton) -> None:
    verified(sglang.url)
    salts = [body["cache_salt"] for body in by_prefill(sglang)]
    answers = [salts[start : start + OUTPUT_TOKENS] for start in range(0, len(salts), OUTPUT_TOKENS)]
    assert [len(set(answer)) for answer in answers] == [OUTPUT_TOKENS, 1] * 7
    others = {body["cache_salt"] for body in sglang.completions if body["max_tokens"] > 1}
    assert len(set(salts) | others) == 7 * (OUTPUT_TOKENS + 1 + 1)


@pytest.mark.parametrize("tolerance", [None, TOLERANCE])
def test_wrong_kv_is_found_by_prefill(sglang: FakeBaton, tolerance: float | None) -> None:
    sglang.after_transfer = "token_id:8", -1.0
    assert not verified(sglang.url, tolerance=tolerance)


def test_wrong_kv_that_leaves_the_tokens_equal_is_found_by_prefill(sglang: FakeBaton) -> None:
    sglang.after_transfer = "token_id:7", -1.0 - 2 * TOLERANCE_OF_PREFILL
    assert not verified(sglang.url, tolerance=None)


def test_corruption_fails_by_prefill_too(sglang: FakeBaton) -> None:
    sglang.token_by_mode["corrupted"] = "token_id:8"
    assert not verified(sglang.url, corrupt_kv=True, tolerance=None)


def test_a_prompt_of_the_reference_that_was_not_prefilled_remotely_verifies_nothing(sglang: FakeBaton) -> None:
    sglang.num_local = 1
    num = NUM_PROMPTS + NUM_BY_PREFILL
    with pytest.raises(VerifyError, match=f"only {num - 1} of {num} prompts"):
        verified(sglang.url)


@pytest.mark.parametrize(
    ("engine", "named", "tolerance", "passes"),
    [
        ("vllm", {}, None, False),
        ("sglang", {}, None, True),
        ("sglang", {"reference": "alone"}, None, False),
        ("sglang", {}, TOLERANCE, False),
        ("vllm", {}, TOLERANCE_OF_PREFILL, True),
    ],
    ids=["local prefill", "by prefill", "reference", "by prefill, told otherwise", "local, told otherwise"],
)
def test_a_small_logprob_difference_passes_by_prefill_only(
    baton: FakeBaton, engine: str, named: dict[str, Any], tolerance: float | None, passes: bool
) -> None:
    baton.engine = engine
    baton.modes = {"tiny": "disaggregated", "alone": "aggregated"}
    baton.after_transfer = "token_id:7", -1.0 - BETWEEN
    assert verified(baton.url, tolerance=tolerance, **named) is passes


# Right after a start


def test_it_waits_until_prefill_can_be_reached_and_says_so_once(
    baton: FakeBaton, capsys: pytest.CaptureFixture[str]
) -> None:
    baton.ready_after_polls = 3
    assert verified(baton.url)
    said = capsys.readouterr()
    assert f"KV of {NUM_PROMPTS} of {NUM_PROMPTS} prompts moved" in said.out
    assert said.err == f"waiting up to {PATIENCE_S:g} s: {UNREACHABLE.format('prefill', 'tiny')}\n"


def test_it_waits_until_there_is_an_application_and_says_so_once(
    baton: FakeBaton, capsys: pytest.CaptureFixture[str]
) -> None:
    baton.not_yet = [(404, "Path '/v1/models' not found.")] * 2 + [(503, "no frontend")]
    assert verified(baton.url)
    why = f"{baton.url} serves no application (/v1/models answered 404: Path '/v1/models' not found.)"
    assert capsys.readouterr().err == f"waiting up to {PATIENCE_S:g} s: {why}\n"
    assert baton.not_yet == []


def test_without_an_application_it_ends_in_time(baton: FakeBaton) -> None:
    baton.fixed["/v1/models"] = 404, "Not Found"
    with pytest.raises(VerifyError, match=r"serves no application \(/v1/models answered 404: Not Found\), for 0.1 s"):
        verified(baton.url, wait_s=0.1)


def test_nothing_is_said_or_asked_again_when_all_is_ready(baton: FakeBaton, capsys: pytest.CaptureFixture[str]) -> None:
    assert verified(baton.url)
    assert (baton.num_polls, capsys.readouterr().err) == (1, "")


def test_health_is_read_even_if_it_answers_503(baton: FakeBaton) -> None:
    pools = {"prefill": {"reachable": 1}, "decode": {"reachable": 0}}
    baton.fixed["/health"] = 503, json.dumps({"models": [{"name": "tiny", "pools": pools}]})
    with pytest.raises(VerifyError, match=UNREACHABLE.format("decode", "tiny")):
        verified(baton.url, wait_s=0)


@pytest.mark.parametrize(
    ("model", "pool", "named"),
    [("tiny", "prefill", {}), ("tiny", "decode", {}), ("alone", "decode", {"reference": "alone"})],
)
def test_a_pool_that_stays_away_is_named(baton: FakeBaton, model: str, pool: str, named: dict[str, Any]) -> None:
    baton.modes = {"tiny": "disaggregated", "alone": "aggregated"}
    baton.reachable[model][pool] = 0
    with pytest.raises(VerifyError, match=rf"{UNREACHABLE.format(pool, model)}, for 0 s: .*--wait"):
        verified(baton.url, wait_s=0, **named)
    assert baton.completions == []


def test_the_pools_of_other_models_do_not_matter(baton: FakeBaton) -> None:
    baton.modes = {"tiny": "disaggregated", "alone": "aggregated"}
    baton.reachable["alone"]["decode"] = 0
    assert verified(baton.url, wait_s=0)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("corrupt_kv", [False, True])
def test_what_a_frontend_without_a_pool_answered_is_asked_again(
    baton: FakeBaton, engine: str, pool: str, corrupt_kv: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first prompt and one in the middle of the group with a shared prefix, whose first prompt is repeated too."""
    baton.engine, baton.modes = engine, {"tiny": "disaggregated", "alone": "aggregated"}
    in_the_group = SHARED_PREFIX_AT + 1 + (engine == "vllm")  # a prompt that got 503 is not among the completions
    baton.lacking = [(0, pool), (in_the_group, pool)]
    assert verified(baton.url, corrupt_kv, reference="alone")
    said = capsys.readouterr()
    assert f"KV of {NUM_PROMPTS + 1} of {NUM_PROMPTS + 1} prompts moved" in said.out
    assert said.err.count("waiting") == 1
    assert baton.lacking == []


def test_prompts_that_are_served_again_get_another_salt(baton: FakeBaton) -> None:
    baton.lacking = [(SHARED_PREFIX_AT + 1, "prefill")]
    assert verified(baton.url)
    salts = [body["cache_salt"] for body in baton.completions[SHARED_PREFIX_AT:][:5]]
    assert len(set(salts[:2])) == len(set(salts[2:])) == 1
    assert salts[0] != salts[2]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_frontend_that_never_reaches_prefill_is_an_error(baton: FakeBaton, engine: str) -> None:
    baton.engine = engine
    baton.lacking = [(num if engine == "vllm" else 0, "prefill") for num in range(1000)]
    with pytest.raises(VerifyError, match=r"prefill pool .*, for 0.1 s"):
        verified(baton.url, wait_s=0.1)


def test_a_transfer_that_failed_is_not_asked_again(baton: FakeBaton) -> None:
    baton.lacking = [(4, "transfer")]
    num = NUM_PROMPTS
    with pytest.raises(VerifyError, match=f"only {num - 1} of {num} prompts"):
        verified(baton.url)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "http://127.0.0.1:80x"])
def test_a_url_where_nothing_answers_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url = url.format(port=closed_port())
    with pytest.raises(ConfigError) as caught:
        verified(url)
    assert url in str(caught.value)


@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/health", "/v1/completions", "/stats"])
def test_an_error_in_an_answer_is_passed_on_with_its_path(baton: FakeBaton, path: str) -> None:
    baton.fixed[path] = 500, "no engine"
    with pytest.raises(ConfigError, match=f"{path} answered 500: no engine"):
        verified(baton.url)


def test_a_url_where_something_else_answers_is_an_error(baton: FakeBaton) -> None:
    baton.fixed["/v1/models"] = 200, "<html>welcome</html>"
    with pytest.raises(ConfigError, match="/v1/models"):
        verified(baton.url)
