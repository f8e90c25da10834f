"""Lets a vLLM engine go on with a sequence that another engine has begun.

The adapter gives the engine the prompt with the tokens that were generated, and says by REPLAYED how many those are.
Here they become output again, as they are in a sequence that was preempted and is computed anew, which vLLM can do:
penalties, ``min_tokens``, ``max_tokens``, bad words and thinking budgets then count them.  What a preempted sequence
keeps, and one that comes from another engine lacks, is brought to where it was:

1. its output in the worker's state (model runner V1; V2 gets all tokens anyway),
2. its random numbers: the generator of a sequence with a seed has given one draw for each token,
3. its grammar: the matcher takes the tokens that were generated, after the reasoning if there is any.

Of the local prefix cache it gets no more than its prompt, as vLLM's scheduler asserts of new requests.

vLLM loads this as a general plug-in in each of its processes.  It can go once vLLM takes the output of a new request;
tests/unit/engines/test_vllm_resume.py fails then.  It was still needed with vllm 0.32.0.
"""

from __future__ import annotations

from typing import Any

from app.engines.plugins import begins
from app.upstream import Patch, check_attributes, check_parameters, check_uses, needed

SWITCH = "BATON_RESUME"
ENVIRONMENT = {SWITCH: "1"}
"""The environment variables that switch it on."""
REPLAYED = "baton_num_replayed"
"""The key in ``extra_args`` of how many tokens at the prompt's end are output."""


def register() -> None:
    """vLLM general plug-in; does nothing without ENVIRONMENT.  May be called again.

    Raises UpstreamChanged if what it patches is not there.
    """
    if not begins(SWITCH):
        return
    with needed("vllm", "go on with the sequences of an engine that was lost"):
        _make_output()
        _find_prompt_only()
        _tell_workers()
        _fill_workers_state()
        _advance_grammar()


def num_replayed(params: Any) -> int:
    """Return how many tokens at the end of the prompt are output, by a request's ``SamplingParams`` or None."""
    extra_args = getattr(params, "extra_args", None) or {}
    return int(extra_args.get(REPLAYED, 0))


def _make_output() -> None:
    """Make the replayed tokens the output of the scheduler's request."""
    from vllm.v1.request import Request

    patch = Patch(Request, "__init__", "self", "request_id", "prompt_token_ids", "sampling_params", "pooling_params")

    def init(self: Any, request_id: str, prompt_token_ids: Any, sampling_params: Any, *rest: Any, **named: Any) -> None:
        num = num_replayed(sampling_params)
        prompt = prompt_token_ids[:-num] if num else prompt_token_ids
        patch.original(self, request_id, prompt, sampling_params, *rest, **named)
        if num:
            self.append_output_token_ids(prompt_token_ids[-num:])

    patch.apply(init)


def _find_prompt_only() -> None:
    """Have the scheduler find no more than the prompt of a resumed sequence in its prefix cache."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    find = Patch(Scheduler, "_get_local_prefix_cache_hit", "self", "request")
    check_parameters(KVCacheManager.truncate_computed_blocks, "self", "blocks", "num_computed_tokens")

    def get_local_prefix_cache_hit(self: Any, request: Any) -> Any:
        blocks, num_tokens, *rest = find.original(self, request)
        if num_replayed(request.sampling_params) and num_tokens > request.num_prompt_tokens:
            num_tokens = request.num_prompt_tokens // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        return blocks, num_tokens, *rest

    find.apply(get_local_prefix_cache_hit)


def _tell_workers() -> None:
    """Send the output of new requests along to workers of model runner V1, as V2's get it."""
    from vllm.v1.core.sched.output import NewRequestData

    original = NewRequestData.from_request
    check_parameters(original, "request", "block_ids", "prefill_token_ids")

    def from_request(cls: Any, request: Any, *rest: Any, **named: Any) -> Any:
        data = original(request, *rest, **named)
        if num_replayed(request.sampling_params) and data.prefill_token_ids is None:
            data.prefill_token_ids = list(request.all_token_ids)
        return data

    NewRequestData.from_request = classmethod(from_request)


def _fill_workers_state() -> None:
    """Put the output, and the state of the random numbers after it, into the state that model runner V1 makes."""
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    check_attributes(CachedRequestState, "__post_init__")
    update = Patch(gpu_model_runner.GPUModelRunner, "_update_states", "self", "scheduler_output")
    check_uses(update.original, "CachedRequestState")
    made = Patch(CachedRequestState, "__post_init__", "self")
    outputs: dict[str, list[int]] = {}
    vocab_size = 0

    def update_states(self: Any, scheduler_output: Any) -> Any:
        nonlocal vocab_size
        vocab_size = self.input_batch.vocab_size
        for new in scheduler_output.scheduled_new_reqs:
            if num_replayed(new.sampling_params):
                outputs[new.req_id] = new.prefill_token_ids[len(new.prompt_token_ids) :]
        try:
            return update.original(self, scheduler_output)
        finally:
            outputs.clear()

    def post_init(self: Any) -> None:
        made.original(self)
        if (output := outputs.get(self.req_id)) is not None:
            self.output_token_ids = output
            if self.generator is not None:
                skip_draws(self.generator, len(output), vocab_size)

    update.apply(update_states)
    made.apply(post_init)


def skip_draws(generator: Any, num_tokens: int, vocab_size: int) -> None:
    """Advance a ``torch.Generator`` as vLLM's sampler does for `num_tokens` tokens.

    On a CPU a token takes one integer, elsewhere one number of the exponential distribution for each of the
    vocabulary (``TopKTopPSampler`` of vLLM).
    """
    import torch

    if generator.device.type == "cpu":
        for _ in range(num_tokens):
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        return
    numbers = torch.empty(vocab_size, device=generator.device)
    for _ in range(num_tokens):
        numbers.exponential_(generator=generator)


def _advance_grammar() -> None:
    """Have a new grammar take the tokens that were generated under it."""
    from vllm.v1.structured_output import StructuredOutputManager

    create = Patch(StructuredOutputManager, "_create_grammar", "self", "request")
    for name in ("_get_constraint_bounds", "reasoning_ended"):
        check_uses(StructuredOutputManager.accept_tokens, name)

    def create_grammar(self: Any, request: Any) -> Any:
        grammar = create.original(self, request)
        output = list(request.output_token_ids)
        if not output:
            return grammar
        start = _grammar_start(self, request, output)
        if start < len(output) and not grammar.accept_tokens(request.request_id, output[start:]):
            raise ValueError("the grammar does not take the tokens that were generated under it")
        return grammar

    create.apply(create_grammar)


def _grammar_start(manager: Any, request: Any, output: list[int]) -> int:
    """Return where in `output` the grammar applies from, as ``StructuredOutputManager.accept_tokens`` finds it."""
    start, _ = manager._get_constraint_bounds(request, output, spec_tokens_committed=True)
    if start <= len(output):
        request.structured_output_request.reasoning_ended = True
    return int(start)
