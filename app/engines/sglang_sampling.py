"""Translates sampling parameters from vLLM's names, which the frontend uses, to SGLang's.

A parameter that SGLang lacks or would understand differently is refused, and the error names it.  An answer that
ignored the parameter would look like one that obeyed it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import msgspec

from app.errors import CannotResume, InvalidRequest
from app.messages import COUNTS_OUTPUT

DEFAULT_MAX_TOKENS = 16
"""vLLM's default: a request leaves out what is at vLLM's default."""

MAX_TOP_LOGPROBS_TRANSFERRED = 128
"""Candidates of the first token for which SGLang's transfer of a prefill's result has room (``MetadataBuffers``)."""

RENAMED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "stream_interval": "stream_interval",
}
"""vLLM's names to SGLang's, for parameters that mean the same in both."""

WITHOUT_EFFECT = frozenset(
    {"flat_logprobs", "skip_reading_prefix_cache", "skip_special_tokens", "spaces_between_special_tokens"}
)
"""What concerns the frontend's detokenizer only, or what SGLang does by itself (it recomputes a prompt whose
log probabilities are asked for)."""


class Translation(msgspec.Struct, frozen=True, kw_only=True):
    """What SGLang's ``async_generate`` takes for one sequence."""

    sampling_params: dict[str, Any]
    num_logprobs: int | None
    """Candidates for each output token besides the token itself; None for no log probabilities."""
    num_prompt_logprobs: int | None
    require_reasoning: bool
    """Whether the grammar binds only after the model's reasoning has ended."""

    def logprob_arguments(self) -> dict[str, Any]:
        """The arguments that ask for log probabilities.  Prompt and output share one number of candidates in SGLang."""
        if self.num_logprobs is None and self.num_prompt_logprobs is None:
            return {}
        return {
            "return_logprob": True,
            "logprob_start_len": -1 if self.num_prompt_logprobs is None else 0,
            "top_logprobs_num": max(self.num_logprobs or 0, self.num_prompt_logprobs or 0),
        }


def rest_of(sampling: dict[str, Any], num_replayed: int) -> dict[str, Any]:
    """Return the parameters for what is left of a sequence after `num_replayed` tokens, which SGLang takes for prompt.

    Raises CannotResume for those that would not go on where they were.
    """
    if not num_replayed:
        return sampling
    for name in COUNTS_OUTPUT:
        if sampling.get(name):
            raise CannotResume(f"{name}: SGLang would count from the first token after the loss")
    rest = {**sampling, "min_tokens": max(0, sampling.get("min_tokens", 0) - num_replayed)}
    if (max_tokens := sampling.get("max_tokens", DEFAULT_MAX_TOKENS)) is not None:
        rest["max_tokens"] = max_tokens - num_replayed
    return rest


def translate(
    sampling: dict[str, Any],
    *,
    reasoning_ended: bool | None,
    is_disaggregated: bool,
    is_deterministic: bool,
    has_reasoning_parser: bool,
) -> Translation:
    """Return SGLang's arguments for `sampling`, which has vLLM's names and leaves defaults out.

    Raises InvalidRequest, which names the parameter, if SGLang cannot do what a parameter asks for.
    """
    rest = dict(sampling)
    params = {RENAMED[name]: rest.pop(name) for name in list(rest) if name in RENAMED}
    params.setdefault("max_new_tokens", DEFAULT_MAX_TOKENS)
    _refuse_combinations(sampling)
    _add_seed(params, rest.pop("seed", None), is_deterministic)
    if bias := rest.pop("logit_bias", None):
        params["logit_bias"] = {str(token): value for token, value in bias.items()}
    structured = rest.pop("structured_outputs", None)
    if structured:
        params |= _grammar(structured)
    num_logprobs, num_prompt_logprobs = rest.pop("logprobs", None), rest.pop("prompt_logprobs", None)
    _check_logprobs(num_logprobs, num_prompt_logprobs, is_disaggregated)
    for name, value in rest.items():
        if name not in WITHOUT_EFFECT and value is not False and value not in (None, [], {}):
            raise InvalidRequest(f"{name} is not supported by SGLang, which serves this model")
    return Translation(
        sampling_params=params,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        require_reasoning=_binds_after_reasoning(bool(structured), reasoning_ended, has_reasoning_parser),
    )


def _refuse_combinations(sampling: dict[str, Any]) -> None:
    if sampling.get("ignore_eos") and sampling.get("stop_token_ids"):
        raise InvalidRequest("ignore_eos: SGLang would ignore stop_token_ids as well; leave one of the two out")
    if not 0.0 < sampling.get("repetition_penalty", 1.0) <= 2.0:
        raise InvalidRequest("repetition_penalty must be above 0 and at most 2 for SGLang, which serves this model")


def _add_seed(params: dict[str, Any], seed: int | None, is_deterministic: bool) -> None:
    if not is_deterministic:
        if seed is not None and params.get("temperature", 1.0):  # greedy output has no seed
            raise InvalidRequest(
                "seed: SGLang samples by seed only where the pool's engine_args have enable_deterministic_inference"
            )
        return
    if params.get("min_p"):
        raise InvalidRequest("min_p is not supported by SGLang with enable_deterministic_inference")
    # By itself SGLang would give every request the same seed, and n sequences would all be the same.
    params["sampling_seed"] = random.getrandbits(63) if seed is None else seed


def _grammar(structured: dict[str, Any]) -> dict[str, Any]:
    """Return the one constraint of vLLM's ``structured_outputs`` as SGLang's parameter."""
    constraints: dict[str, Callable[[Any], dict[str, Any]]] = {
        "json": lambda schema: {"json_schema": schema if isinstance(schema, str) else json.dumps(schema)},
        "json_object": lambda _: {"json_schema": '{"type": "object"}'},
        "regex": lambda pattern: {"regex": pattern},
        "choice": lambda choices: {"ebnf": _one_of(choices)},
        "grammar": lambda grammar: {"ebnf": grammar},
        "structural_tag": lambda tag: {"structural_tag": tag if isinstance(tag, str) else json.dumps(tag)},
    }
    given = {name: value for name, value in structured.items() if value not in (None, False)}
    for name, value in given.items():
        if name not in constraints:
            raise InvalidRequest(
                f"structured_outputs.{name}: SGLang has it for all requests of a pool or not at all "
                "(engine_args.constrained_json_disable_any_whitespace, constrained_json_whitespace_pattern)"
            )
        if value == "":
            raise InvalidRequest(f"structured_outputs.{name} is empty, which SGLang takes for none")
    if len(given) > 1:
        raise InvalidRequest("structured_outputs: only one of json, regex, choice, grammar and structural_tag")
    return {key: text for name, value in given.items() for key, text in constraints[name](value).items()}


def _one_of(choices: list[str]) -> str:
    """Return a grammar that derives exactly `choices`.  Strings in its notation are written as in JSON."""
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _check_logprobs(num_logprobs: int | None, num_prompt_logprobs: int | None, is_disaggregated: bool) -> None:
    for name, num in (("logprobs", num_logprobs), ("prompt_logprobs", num_prompt_logprobs)):
        if num is not None and num < 0:
            raise InvalidRequest(f"{name}: SGLang has no log probabilities of the whole vocabulary")
    if not is_disaggregated:
        return
    if num_prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs: SGLang does not hand them from prefill to decode; ask without them")
    if (num_logprobs or 0) > MAX_TOP_LOGPROBS_TRANSFERRED:
        raise InvalidRequest(f"logprobs: at most {MAX_TOP_LOGPROBS_TRANSFERRED} with SGLang, disaggregated")


def _binds_after_reasoning(is_structured: bool, reasoning_ended: bool | None, has_reasoning_parser: bool) -> bool:
    if not is_structured or reasoning_ended is not False:
        return False
    if not has_reasoning_parser:
        raise InvalidRequest(
            "structured_outputs: the model reasons first, and SGLang does not know when that ends: the pool's "
            "engine_args lack reasoning_parser"
        )
    return True
