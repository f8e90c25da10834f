"""The plug-in that lets vLLM go on with another engine's sequences; a real engine: tests/engine_contract.py."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from app.engines.plugins import vllm_resume
from tests.unit.engines.forked import run

PROGRAM = """
import json
from types import SimpleNamespace
import torch
from app.engines.plugins import vllm_resume
vllm_resume.register()
vllm_resume.register()
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_model_runner

def new(num_replayed, **more):
    extra_args = {vllm_resume.REPLAYED: num_replayed} if num_replayed else None
    return Request("r", [1, 2, 3, 4, 5], SamplingParams(max_tokens=9, extra_args=extra_args, **more), None)

def output(num_replayed):
    request = new(num_replayed)
    data = NewRequestData.from_request(request, ([0],))
    return [data.prompt_token_ids, list(request.output_token_ids), request.num_tokens, data.prefill_token_ids]

class Grammar:
    def __init__(self, takes):
        self.taken, self.takes = [], takes
    def accept_tokens(self, request_id, tokens):
        self.taken += tokens
        return self.takes

def grammar(num_replayed, start=0, takes=True):
    manager = SimpleNamespace(
        backend=SimpleNamespace(compile_grammar=lambda *arguments, **more: Grammar(takes)),
        _get_constraint_bounds=lambda request, tokens, **more: (start, start),
    )
    request = new(num_replayed)
    request.structured_output_request = SimpleNamespace(structured_output_key=("json", "{}"), reasoning_ended=None)
    made = StructuredOutputManager._create_grammar(manager, request)
    return [made.taken, request.structured_output_request.reasoning_ended]

try:
    grammar(2, takes=False)
    refused = ""
except ValueError as error:
    refused = str(error)

def draws(num, num_skipped):
    generator = torch.Generator().manual_seed(7)
    vllm_resume.skip_draws(generator, num_skipped, 50)
    return [torch.randint(0, 2**31, (1,), generator=generator).item() for _ in range(num)]

print(json.dumps({
    "output": [output(0), output(2)],
    "grammar": [grammar(0), grammar(3), grammar(3, start=2), grammar(3, start=4)],
    "refused": refused,
    "draws": [draws(5, 0), draws(2, 3)],
}))
"""


@pytest.fixture(scope="module")
def patched() -> Any:
    """What the program says with the plug-in loaded."""
    return run(PROGRAM, vllm_resume.ENVIRONMENT)


def test_replayed_tokens_are_output_for_the_scheduler_and_for_workers(patched: Any) -> None:
    assert patched["output"] == [[[1, 2, 3, 4, 5], [], 5, None], [[1, 2, 3], [4, 5], 5, [1, 2, 3, 4, 5]]]


def test_a_grammar_takes_what_was_generated_under_it_and_not_the_reasoning_before(patched: Any) -> None:
    assert patched["grammar"] == [[[], None], [[3, 4, 5], True], [[5], True], [[], None]]


def test_a_grammar_that_does_not_take_it_fails_the_request(patched: Any) -> None:
    assert "does not take" in patched["refused"]


def test_random_numbers_go_on_where_they_were(patched: Any) -> None:
    whole, rest = patched["draws"]
    assert whole[3:] == rest


def test_the_installed_vllm_does_not_do_it_by_itself() -> None:
    """If this fails, see whether a new request may bring its output; then the plug-in can go."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    assert not {"output_token_ids", "num_output_tokens"} & set(EngineCoreRequest.__struct_fields__)
    assert "output_token_ids" not in inspect.signature(Request.__init__).parameters
