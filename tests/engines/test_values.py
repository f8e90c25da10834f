"""No value of any field of the API ends an engine: real engines live through whatever Hypothesis thinks of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.messages import GenerateRequest
from tests.conftest import wait_until
from tests.engines.conftest import Baton, make_prompt

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "hi"}]
EDGES = [2**power + step for power in (7, 15, 16, 31, 32, 53, 63, 64) for step in (-1, 0, 1)]
OWN = {"model", "prompt", "messages"}
"""Fields without which there is no request."""
TOKEN_COUNTS = {"max_tokens", "min_tokens", "max_completion_tokens", "n", "best_of"}
"""Fields whose large values are either refused as all others', or mean a long answer, for which this has no time."""

whole = (
    st.sampled_from([*EDGES, *(-edge for edge in EDGES), 10**30, -(10**30)]) | st.integers(-3, 50) | st.integers(1, 50)
)
real = st.floats() | st.floats(0, 2) | st.floats(0.1, 1) | st.sampled_from([1e-320, 1e38, 1e39, 1e308])
text = st.text(max_size=5) | st.sampled_from(["\ud800", "\x00", "1", "a" * 5000])
many = st.sampled_from([127, 128, 129, 1023, 1024, 1025, 5000])
json_value = st.recursive(
    st.none() | st.booleans() | whole | real | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
tokens = st.lists(whole, max_size=3) | many.map(lambda size: [number % 2000 for number in range(size)])
biases = st.dictionaries(whole.map(str), real, max_size=3) | many.map(
    lambda size: {str(token): 1.0 for token in range(size)}
)
constraint = st.sampled_from(
    [
        {"json": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 10**30}}}},
        {"json": {"$ref": "#"}},
        {"regex": "(a{1,200}){1,200}"},
        {"regex": "("},
        {"regex": "a{99999999}"},
        {"grammar": 'root ::= root "a" | root'},
        {"choice": ["\ud800"]},
        {"choice": ["a"] * 5000},
        {"structural_tag": "{}"},
        {"json_object": True},
        {"whitespace_pattern": "("},
    ]
)
anything = st.one_of(whole, real, text, tokens, biases, constraint, json_value)
count = st.integers(-3, 4) | real.filter(lambda value: not value > 4) | text
ODD = [
    {"top_k": 2**31},
    {"top_k": 2**31 - 1},
    {"repetition_penalty": 1e-320},
    {"logit_bias": {str(token): 1.0 for token in range(1025)}},
    {"stop_token_ids": list(range(129)), "min_tokens": 2},
    {"seed": 2**63 - 1, "n": 2, "temperature": 1.0},
    {"stream_interval": 10**30, "stream": True},
    {"priority": 2**63 - 1},
    {"logprobs": 2**31 - 1},
]


SUITED = {
    "StructuredOutputsParams": constraint,
    "list[int]": tokens,
    "dict[str, float]": biases,
    "list[str]": st.lists(text, max_size=3) | many.map(lambda size: ["a"] * size),
    "StopParam": st.lists(text, max_size=3),
    "dict": st.dictionaries(st.text("ab", min_size=1), json_value, max_size=3),
    "bool": st.booleans(),
    "int": whole,
    "float": real,
    "str": text,
}
"""What suits a field by what its annotation says, the first that is found: most other values are refused for their
type, and an engine never sees them."""


def suited(annotation: str) -> st.SearchStrategy[Any]:
    return next((values for name, values in SUITED.items() if name in annotation), anything)


def fields(chat: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Some fields of a request, by their names."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    model = ChatCompletionRequest if chat else CompletionRequest
    annotations = {name: str(field.annotation) for name, field in model.model_fields.items() if name not in OWN}

    def of(name: str) -> st.SearchStrategy[dict[str, Any]]:
        fitting = suited(annotations[name])
        values = count if name in TOKEN_COUNTS else st.one_of(*[fitting] * 7, anything)
        return values.map(lambda value: {name: value})

    one = st.sampled_from(sorted(annotations)).flatmap(of)
    return st.lists(one, min_size=1, max_size=3).map(lambda chosen: {k: v for each in chosen for k, v in each.items()})


def post(baton: Baton, path: str, odd: dict[str, Any]) -> httpx.Response:
    usual = {"prompt": [300, 301]} if path == "/v1/completions" else {"messages": MESSAGES}
    body = {"model": baton.model, **usual, "max_tokens": 2, "temperature": 0, **odd}
    return baton.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_value_of_a_field_ends_an_engine(real: Baton, path: str) -> None:
    """Each request is served or refused as the client's fault, and the engines are the same ones afterwards."""
    real.wait_until_quiet()
    replicas = {role: real.replica_process(role) for role in ("prefill", "decode")}
    prompt = make_prompt(50)
    before = real.complete(prompt).choices[0].text
    failed: list[tuple[dict[str, Any], str]] = []
    until = time.monotonic() + 12.0

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(fields(chat=path != "/v1/completions"))
    def drive(odd: dict[str, Any]) -> None:
        if time.monotonic() > until:
            return
        answer = post(real, path, odd)
        if answer.status_code >= 500:
            failed.append((odd, answer.text))

    run: Callable[[], None] = drive
    for odd in ODD:
        run = example(odd)(run)
    run()
    assert not failed
    assert real.complete(prompt).choices[0].text == before
    assert {role: real.replica_process(role) for role in replicas} == replicas
    assert all(process.is_running() for process in replicas.values())
    wait_until(real.is_idle, 30, "nothing left of any request")


@pytest.mark.parametrize(
    "sampling", [{"top_k": 2**31}, {"logprobs": 10**6}, {"logit_bias": {10**6: 1.0}}, {"repetition_penalty": 1e-320}]
)
async def test_an_engine_does_not_rely_on_the_frontend(real: Baton, sampling: dict[str, Any]) -> None:
    """The frontend would have refused these."""
    request = GenerateRequest(request_id="odd", prompt_token_ids=make_prompt(8), sampling=sampling)
    with pytest.raises(InvalidRequest):
        await real.engine_of("prefill").prefill(request)
