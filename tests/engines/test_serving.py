"""What a client sees of a model with prefill and decode really apart, whichever engine serves it."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletionFunctionToolParam

from app.config import parse
from app.errors import ConfigError
from app.preflight import check_with_sglang
from tests.conftest import wait_until
from tests.engines.conftest import LONG_PROMPT_TOKENS, SGLANG_AGGREGATED, Baton, make_prompt

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]

PROMPTS = ["The quick brown fox", "Once upon a time in a land", "def main(args): return", "In the beginning was"]
SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {"size": {"type": "integer", "maximum": 9, "minimum": 0}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "tag",
        "begin": "<f>",
        "content": {"type": "json_schema", "json_schema": SCHEMA},
        "end": "</f>",
    },
}
TOOL: ChatCompletionFunctionToolParam = {
    "type": "function",
    "function": {"name": "measure", "description": "m", "parameters": SCHEMA, "strict": True},
}


def test_kv_really_moves(baton: Baton) -> None:
    before, remote = baton.stats("decode"), baton.count_prefills("remote")
    baton.complete(random.Random(1).choices(range(300, 2000), k=640))
    after = baton.stats("decode")
    assert baton.count_prefills("remote") == remote + 1
    assert after["num_transfers"] > before["num_transfers"]
    assert after["transferred_bytes"] - before["transferred_bytes"] == 640 * baton.kv_bytes_per_token
    assert after["transport"].startswith(("intra-node", "inter-node", "sim"))


@pytest.mark.parametrize(
    ("fields", "waits"),
    [
        ({"temperature": 0}, False),
        ({"temperature": 0.7, "top_p": 0.9, "logprobs": 2}, False),
        ({"temperature": 0, "vllm_xargs": {"baton_prefill": "remote"}}, False),
        ({"temperature": 0, "max_tokens": 1}, False),
        ({"temperature": 0, "presence_penalty": 1.0}, True),
        ({"temperature": 1.0, "seed": 3}, True),
    ],
)
def test_the_first_token_waits_for_the_kv_only_if_decode_has_to_sample_it(
    vllm: Baton, fields: dict[str, Any], waits: bool
) -> None:
    body = {"model": vllm.model, "prompt": make_prompt(64), "max_tokens": 4, **fields}
    answer = vllm.http.post("/v1/completions", json=body, headers={"x-baton-explain": "1"})
    actual = json.loads(answer.headers["x-baton-explain"])[0]["actual"]
    assert (actual["kind"], actual["waited_for_kv"]) == ("remote", waits)


@pytest.mark.parametrize("num_tokens", [31, 32, 33, 63, 64, 65, 95, 96, 97])
def test_prompts_that_end_at_a_block_are_answered_as_by_decode_alone(vllm: Baton, num_tokens: int) -> None:
    """A block has 32 tokens; prefill's first token is the last one of a block, the first of the next, or neither."""
    prompt = make_prompt(num_tokens)
    apart, together = (
        vllm.complete(prompt, max_tokens=12, extra_body={"cache_salt": mode, "vllm_xargs": {"baton_prefill": mode}})
        for mode in ("remote", "local")
    )
    assert apart.choices[0].text == together.choices[0].text


def test_chat_streamed_equals_chat_whole(baton: Baton) -> None:
    request: dict[str, Any] = {
        "model": baton.model,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = baton.openai.chat.completions.create(**request)
    chunks = list(baton.openai.chat.completions.create(**request, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24


def test_every_prompt_of_a_list_is_answered_from_its_own_kv(real: Baton) -> None:
    options: dict[str, Any] = {"n": 3, "max_tokens": 24, "extra_body": {"min_tokens": 20}}
    together = [choice.text for choice in real.complete(PROMPTS, **options).choices]
    one_by_one = [real.complete(prompt, max_tokens=24).choices[0].text for prompt in PROMPTS]
    assert len(set(one_by_one)) == len(PROMPTS)
    assert together == [text for text in one_by_one for _ in range(3)]


def test_min_tokens_binds_decode(real: Baton) -> None:
    plain = real.complete(PROMPTS[0], max_tokens=40, extra_body={"return_token_ids": True})
    tokens = plain.choices[0].token_ids
    stopped = real.complete(PROMPTS[0], max_tokens=40, extra_body={"stop_token_ids": tokens[:1]})
    held = real.complete(PROMPTS[0], max_tokens=40, extra_body={"stop_token_ids": tokens, "min_tokens": 20})
    assert stopped.usage.completion_tokens == 1
    assert 20 <= held.usage.completion_tokens <= 40


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 4},
    "seed": {"temperature": 1.0, "seed": 7},
    "top_p top_k min_p": {
        "temperature": 0.8,
        "seed": 7,
        "top_p": 0.9,
        "extra_body": {"top_k": 40, "min_p": 0.01},
    },
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 0.5, "extra_body": {"repetition_penalty": 1.3}},
    "logit_bias": {"logit_bias": {"700": 8, "701": 8}},
    "stop": {"stop": [" 5", "th", "e"]},
    "stop_token_ids": {"extra_body": {"stop_token_ids": list(range(300, 400))}},
    "ignore_eos": {"extra_body": {"ignore_eos": True}},
    "bad_words": {"extra_body": {"bad_words": [" ject", "ing"]}},
    "n": {"n": 2, "temperature": 1.0, "seed": 3},
    "json": {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    "regex": {"extra_body": {"structured_outputs": {"regex": "[a-f]{4}-[0-9]{3}"}}},
    "choice": {"extra_body": {"structured_outputs": {"choice": ["left", "right"]}}},
    "grammar": {"extra_body": {"structured_outputs": {"grammar": 'root ::= ("ab" | "cd")+ "."'}}},
}


# SGLang has no seeds on a CPU, so these settings leave nothing to chance.
SGLANG_SAMPLINGS: dict[str, dict[str, Any]] = {
    **{name: fields for name, fields in SAMPLINGS.items() if "seed" not in fields and name != "bad_words"},
    "top_k": {"temperature": 1.0, "extra_body": {"top_k": 1}},
    "top_p": {"temperature": 1.0, "top_p": 1e-6},
    "min_p": {"temperature": 1.0, "extra_body": {"min_p": 1.0}},
    "n": {"n": 2},
    "structural tag": {"extra_body": {"structured_outputs": {"structural_tag": json.dumps(TAG)}}},
}


OF_ENGINE = {"vllm": SAMPLINGS, "sglang": SGLANG_SAMPLINGS}
DISAGGREGATED: dict[tuple[str, str], list[Any]] = {}
"""The answers that `disaggregated` has got so far."""


def sampled(baton: Baton, name: str, *, is_remote: bool) -> list[Any]:
    """Return what a client gets of each choice."""
    fields = {**OF_ENGINE[baton.engine][name], "max_tokens": 32}
    body = fields.pop("extra_body", {})
    if is_remote:
        answer = baton.complete(PROMPTS[1], extra_body={**body, "cache_salt": f"{name}-apart"}, **fields)
    else:
        answer = baton.complete_without_transfer(PROMPTS[1], salt=f"{name}-together", extra_body=body, **fields)
    return [(c.text, c.finish_reason, c.logprobs and c.logprobs.token_logprobs) for c in answer.choices]


def disaggregated(baton: Baton, name: str) -> list[Any]:
    """Return the answer from prefill and decode apart, which is requested only once."""
    if (baton.engine, name) not in DISAGGREGATED:
        remote = baton.count_prefills("remote")
        DISAGGREGATED[baton.engine, name] = sampled(baton, name, is_remote=True)
        assert baton.count_prefills("remote") > remote
    return DISAGGREGATED[baton.engine, name]


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, names in OF_ENGINE.items() for name in names])
def test_sampling_is_the_same_with_and_without_disaggregation(
    request: pytest.FixtureRequest, engine: str, name: str
) -> None:
    baton: Baton = request.getfixturevalue(engine)
    assert disaggregated(baton, name) == sampled(baton, name, is_remote=False)


def test_sampling_parameters_have_an_effect(vllm: Baton, sglang: Baton) -> None:
    """Without this, the test above could pass with parameters that nobody reads."""
    different = {
        baton.engine: {json.dumps(disaggregated(baton, name)) for name in OF_ENGINE[baton.engine] if name != "greedy"}
        for baton in (vllm, sglang)
    }
    # ignore_eos, bad_words and logprobs may leave the text alone
    assert len(different["vllm"]) >= len(SAMPLINGS) - 3
    # the same here; top_k, top_p and min_p are set so that they are greedy
    assert len(different["sglang"]) >= len(SGLANG_SAMPLINGS) - 5


def test_an_engine_argument_that_sglang_does_not_know_is_found_before_it_starts() -> None:
    pool = {"engine": "sglang", "engine_args": {"page_size": 16, "page_sise": 16}}
    config = parse({"models": [{"name": "m", "source": "baton:tiny", "decode": pool}]})
    with pytest.raises(ConfigError, match=r"models\.0\.decode\.engine_args\.page_sise: SGLang knows no such"):
        check_with_sglang(config)


LACKING: dict[str, dict[str, Any]] = {
    "seed": {"seed": 7, "temperature": 1.0},
    "bad_words": {"bad_words": [" ject"]},
    "allowed_token_ids": {"allowed_token_ids": [300, 301]},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "priority": {"priority": 1},
    "baton_prefill": {"vllm_xargs": {"baton_prefill": "local"}},
}


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("stream", [False, True])
def test_what_sglang_lacks_is_a_400_that_names_it(sglang: Baton, name: str, stream: bool) -> None:
    response = sglang.post("/v1/completions", prompt="Hello", max_tokens=4, stream=stream, **LACKING[name])
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]


def test_structured_output_obeys_its_schema(real: Baton) -> None:
    for _ in range(10):  # a model of noise may fill an answer with whitespace, which JSON allows
        answer = real.openai.chat.completions.create(
            model=real.model,
            messages=[{"role": "user", "content": "How big?"}],
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}},
        )
        if answer.choices[0].finish_reason == "stop":
            break
    assert set(json.loads(answer.choices[0].message.content or "")) == {"size", "ok"}


def test_tool_call(real: Baton) -> None:
    """The request names the tool.  If it could choose, a model of noise would call it until its tokens run out."""
    answer = real.openai.chat.completions.create(
        model=real.model,
        messages=[{"role": "user", "content": "Measure it"}],
        max_tokens=400,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "measure"}},
    )
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert call.type == "function"
    assert call.function.name == "measure"
    assert set(json.loads(call.function.arguments)) == {"size", "ok"}


def test_prompt_logprobs_are_served_without_disaggregation(vllm: Baton) -> None:
    baton = vllm
    before = baton.count_prefills("local", "prompt_logprobs")
    answer = baton.complete([400, 500, 600, 700], extra_body={"prompt_logprobs": 1})
    rows = answer.choices[0].prompt_logprobs
    assert rows[0] is None
    assert [str(token) in row for token, row in zip((500, 600, 700), rows[1:], strict=True)] == [True] * 3
    assert baton.count_prefills("local", "prompt_logprobs") == before + 1


def test_sglang_has_prompt_logprobs_where_one_engine_does_it_all(sglang: Baton) -> None:
    options: dict[str, Any] = {"model": SGLANG_AGGREGATED, "extra_body": {"prompt_logprobs": 1}}
    rows = sglang.complete([400, 500, 600, 700], **options).choices[0].prompt_logprobs
    assert rows[0] is None
    assert [str(token) in row for token, row in zip((500, 600, 700), rows[1:], strict=True)] == [True] * 3


def test_usage_reports_cached_tokens(baton: Baton) -> None:
    prompt = random.Random(2).choices(range(300, 2000), k=512)
    first, second = baton.complete(prompt), baton.complete(prompt)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 480


def test_other_apis(baton: Baton) -> None:
    assert baton.openai.responses.create(model=baton.model, input="Hello", max_output_tokens=8).output_text
    message = baton.post("/v1/messages", max_tokens=8, messages=[{"role": "user", "content": "Hello"}]).json()
    assert message["usage"]["output_tokens"] == 8
    tokens = baton.post("/tokenize", prompt="Hello world").json()["tokens"]
    assert baton.post("/detokenize", tokens=tokens).json()["prompt"] == "Hello world"
    assert baton.model in [model.id for model in baton.openai.models.list()]
    assert baton.http.get("/version").json()["version"]
    assert baton.http.get("/docs").status_code == 200
    assert "baton_time_to_first_token_seconds_bucket" in baton.http.get("/metrics").text


def test_models_tell_engine_mode_and_state(baton: Baton) -> None:
    cards = {card["id"]: card for card in baton.http.get("/v1/models").json()["data"]}
    card = cards[baton.model]
    assert (card["engine"], card["mode"], card["state"]) == (baton.engine, "disaggregated", "ready")
    assert card["max_model_len"] == 4096


def test_health_names_every_endpoint(baton: Baton) -> None:
    assert baton.health()["pools"] == {"prefill": {"ready": 1, "reachable": 1}, "decode": {"ready": 1, "reachable": 1}}
    assert {endpoint["role"] for endpoint in baton.endpoints()} == {"prefill", "decode"}
    addresses = {endpoint["kv_address"] for endpoint in baton.endpoints()}
    assert len(addresses) == 2, "two replicas share a side channel"


LONG = random.Random(3).choices(range(300, 2000), k=LONG_PROMPT_TOKENS)


def test_a_client_that_goes_away_during_prefill_leaves_nothing_behind(baton: Baton) -> None:
    wait_until(baton.is_idle, 40, "idle before")
    during_prefill = 0.4 * baton.pace.prompt_s
    with pytest.raises(httpx.ReadTimeout):
        baton.http.post("/v1/completions", json={"model": baton.model, "prompt": LONG}, timeout=during_prefill)
    wait_until(baton.is_idle, baton.pace.settle_s, "both engines idle and without blocks")


def test_a_client_that_goes_away_from_a_whole_answer_leaves_nothing_behind(baton: Baton) -> None:
    wait_until(baton.is_idle, 40, "idle before")
    body = {"model": baton.model, "prompt": LONG[100:], "max_tokens": 500, "ignore_eos": True}
    during_decode = baton.pace.prompt_s + 100 * baton.pace.token_s
    with pytest.raises(httpx.ReadTimeout):
        baton.http.post("/v1/completions", json=body, timeout=during_decode)
    wait_until(baton.is_idle, baton.pace.settle_s, "both engines idle and without blocks")


@pytest.mark.parametrize("after_chunks", [1, 5])
def test_a_client_that_goes_away_during_decode_leaves_nothing_behind(baton: Baton, after_chunks: int) -> None:
    wait_until(baton.is_idle, 40, "idle before")
    body = {"model": baton.model, "prompt": LONG[after_chunks:], "max_tokens": 500, "ignore_eos": True, "stream": True}
    with baton.http.stream("POST", "/v1/completions", json=body) as response:
        chunks = (line for line in response.iter_lines() if line.startswith("data: {"))
        received = [next(chunks) for _ in range(after_chunks)]
    assert len(received) == after_chunks
    wait_until(baton.is_idle, baton.pace.settle_s, "both engines idle and without blocks")


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": ({"model": "other"}, 404, "other"),
    "too long a prompt": ({"prompt": [5] * 5000}, 400, "4096"),
    "too long a prompt, streamed": ({"prompt": [5] * 5000, "stream": True}, 400, "4096"),
    "negative max_tokens": ({"max_tokens": -3}, 400, "max_tokens"),
    "wrong type": ({"temperature": "hot"}, 400, "temperature"),
    "bad JSON schema": ({"structured_outputs": {"json": {"type": "nonsense"}}}, 400, "nonsense"),
    "bad JSON schema, streamed": (
        {"structured_outputs": {"json": {"type": "nonsense"}}, "stream": True},
        400,
        "nonsense",
    ),
    "bad regex": ({"structured_outputs": {"regex": "(((("}}, 400, "regex"),
    "token id out of the vocabulary": ({"prompt": [999999]}, 400, "999999"),
    "kv_transfer_params": ({"kv_transfer_params": {"do_remote_prefill": True}}, 400, "kv_transfer_params"),
    "kv_transfer_params, streamed": (
        {"kv_transfer_params": {"do_remote_decode": True}, "stream": True},
        400,
        "kv_transfer_params",
    ),
    "kv_transfer_params by the back door": ({"vllm_xargs": {"kv_transfer_params": "x"}}, 400, "kv_transfer_params"),
    "unknown prefill mode": ({"vllm_xargs": {"baton_prefill": "x"}}, 400, "baton_prefill"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_harms_nothing(real: Baton, name: str) -> None:
    fields, status, named = BAD[name]
    good = {"prompt": "Hello", "max_tokens": 4}
    response = real.post("/v1/completions", **{**good, **fields})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert named in json.dumps(error)
    assert "Traceback" not in response.text
    assert real.post("/v1/completions", **good).status_code == 200


def test_malformed_and_huge_bodies(baton: Baton) -> None:
    headers = {"content-type": "application/json"}
    assert baton.http.post("/v1/completions", content="{nope", headers=headers).status_code == 400
    huge = f'{{"model": "{baton.model}", "prompt": "{"x" * 50_000_000}"}}'.encode()
    assert baton.http.post("/v1/completions", content=huge, headers=headers).status_code == 413
    assert baton.post("/v1/completions", prompt="Hello", max_tokens=4).status_code == 200
