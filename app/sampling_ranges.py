"""The values that engines can take, for every field of a request that is handed on to one.

Engines check some of them.  What they miss ends up in a tensor or a message that cannot hold it, and then the engine
dies with everybody's requests: SGLang's scheduler did of ``top_k: 2147483648``, vLLM's workers do of more than 128 stop
tokens.  So the frontend checks a request before it is sent, which also keeps what msgpack cannot encode off the
channel, and each adapter checks it again before its engine sees it: a frontend may be of another version.

The bounds are those of the narrowest place in any engine, so that a request does not depend on which engine serves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from app.errors import InvalidRequest
from app.messages import GenerateRequest

INT32_MAX = 2**31 - 1
INT64 = (-(2**63), 2**63 - 1)
MSGPACK_INT = (-(2**63), 2**64 - 1)

MAX_TOKENS = 2**30
"""The most tokens that a field may count.  Engines add such a number to a prompt's length, in 32 bits."""

FLOAT32_TINY = 2.0**-126
"""The smallest positive number that a float32 holds in full.  What must be above 0 would be 0 below it."""

MAX_BIASED_TOKENS = 1024
"""Entries of ``logit_bias`` and of ``allowed_token_ids``: vLLM's ``MAX_NUM_LOGIT_BIAS_TOKENS`` and
``MAX_NUM_ALLOWED_TOKEN_IDS`` (v1/worker/gpu/sample/logit_bias.py), the width of its workers' tensors."""

MAX_STOP_TOKENS = 128
"""Stop tokens, the model's own included: vLLM's ``MAX_NUM_STOP_TOKEN_IDS`` in the same module."""

MAX_LOGPROB_TOKENS = 128
"""vLLM's ``MAX_LOGPROB_TOKEN_IDS`` (vllm/sampling_params.py)."""

MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 1024
"""Tokens of all ``bad_words`` together.  Both are the defaults of vLLM's ``VLLM_MAX_NUM_BAD_WORDS`` and
``VLLM_MAX_BAD_WORDS_TOTAL_TOKENS``."""

MAX_CHOICES = 10_000
"""Strings of ``structured_outputs.choice``, which become one rule of a grammar."""

MAX_PATTERN_TOKENS = 1024
"""vLLM's scheduler tries every length of a repeated pattern, after each token, while all its sequences wait."""

MAX_DEPTH = 100
"""How deep lists and objects may be nested: msgpack's decoders are recursive."""


class Whole(msgspec.Struct, frozen=True):
    """A whole number."""

    low: int
    high: int

    def problem(self, value: Any, vocab_size: int) -> str:
        is_held = isinstance(value, int) and self.low <= value <= self.high
        return "" if is_held else f"must be a whole number from {self.low} to {self.high}"


class Real(msgspec.Struct, frozen=True):
    """A number that is neither NaN nor infinite."""

    low: float
    high: float

    def problem(self, value: Any, vocab_size: int) -> str:
        is_held = isinstance(value, int | float) and self.low <= value <= self.high
        return "" if is_held else f"must be a number from {self.low:g} to {self.high:g}"


class Flag(msgspec.Struct, frozen=True):
    def problem(self, value: Any, vocab_size: int) -> str:
        return "" if isinstance(value, bool) else "must be true or false"


class Candidates(msgspec.Struct, frozen=True):
    """How many of the likeliest tokens are wanted, or -1 for the whole vocabulary."""

    def problem(self, value: Any, vocab_size: int) -> str:
        return Whole(-1, vocab_size).problem(value, vocab_size)


class TokenIds(msgspec.Struct, frozen=True):
    """A list of tokens."""

    max_items: int

    def problem(self, value: Any, vocab_size: int) -> str:
        if not isinstance(value, list) or len(value) > self.max_items:
            return f"must be a list of at most {self.max_items} token ids"
        return _problem_of_tokens(value, vocab_size)


class Biases(msgspec.Struct, frozen=True):
    """What is added to the logits of some tokens, by token."""

    max_items: int
    bias: Real

    def problem(self, value: Any, vocab_size: int) -> str:
        if not isinstance(value, dict) or len(value) > self.max_items:
            return f"must be an object of at most {self.max_items} token ids and their biases"
        if found := _problem_of_tokens(value, vocab_size):
            return found
        found = next(filter(None, (self.bias.problem(bias, vocab_size) for bias in value.values())), "")
        return found and f"has a bias that {found}"


class Words(msgspec.Struct, frozen=True):
    """A list of strings."""

    max_items: int

    def problem(self, value: Any, vocab_size: int) -> str:
        if not isinstance(value, list) or len(value) > self.max_items or not all(isinstance(w, str) for w in value):
            return f"must be a list of at most {self.max_items} strings"
        return _problem_of_data(value)


class Text(msgspec.Struct, frozen=True):
    def problem(self, value: Any, vocab_size: int) -> str:
        return _problem_of_data(value) if isinstance(value, str) else "must be text"


class Parts(msgspec.Struct, frozen=True):
    """An object whose parts have ranges of their own."""

    ranges: dict[str, Any]

    def problem(self, value: Any, vocab_size: int) -> str:
        if not isinstance(value, dict) or not self.ranges.keys() >= value.keys():
            return f"must be an object of {', '.join(self.ranges)}"
        problems = ((name, self.ranges[name].problem(part, vocab_size)) for name, part in value.items())
        return next((f".{name} {found}" for name, found in problems if found), "")


class Object(msgspec.Struct, frozen=True):
    """Any object that JSON can say and msgpack can hold."""

    def problem(self, value: Any, vocab_size: int) -> str:
        return _problem_of_data(value) if isinstance(value, dict) else "must be an object"


class TextOrObject(msgspec.Struct, frozen=True):
    def problem(self, value: Any, vocab_size: int) -> str:
        return _problem_of_data(value) if isinstance(value, str | dict) else "must be text or an object"


class NotOffered(msgspec.Struct, frozen=True):
    """A field for which there is no way from a client to an engine."""

    def problem(self, value: Any, vocab_size: int) -> str:
        return "is not offered by this server"


Range = Whole | Real | Flag | Candidates | TokenIds | Biases | Words | Text | Parts | Object | TextOrObject | NotOffered

RANGES: dict[str, Range] = {
    "presence_penalty": Real(-2, 2),
    "frequency_penalty": Real(-2, 2),
    # Logits are divided by it.  Beyond these they can become infinite, and probabilities NaN, which no sampler takes.
    "repetition_penalty": Real(0.01, 100),
    "temperature": Real(0, 2),
    "watermarking": Flag(),
    "top_p": Real(FLOAT32_TINY, 1),
    "top_k": Whole(-1, INT32_MAX),
    "min_p": Real(0, 1),
    "seed": Whole(*INT64),
    "stop_token_ids": TokenIds(MAX_STOP_TOKENS),
    "ignore_eos": Flag(),
    "max_tokens": Whole(1, MAX_TOKENS),
    "min_tokens": Whole(0, MAX_TOKENS),
    "logprobs": Candidates(),
    "prompt_logprobs": Candidates(),
    "prompt_logprob_token_ids": NotOffered(),
    "prompt_logprob_start": NotOffered(),
    "logprob_token_ids": TokenIds(MAX_LOGPROB_TOKENS),
    "flat_logprobs": Flag(),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "stream_interval": Whole(1, MAX_TOKENS),
    "structured_outputs": Parts(
        {
            "json": TextOrObject(),
            "regex": Text(),
            "choice": Words(MAX_CHOICES),
            "grammar": Text(),
            "json_object": Flag(),
            "disable_any_whitespace": Flag(),
            "disable_additional_properties": Flag(),
            "whitespace_pattern": Text(),
            "structural_tag": TextOrObject(),
        }
    ),
    "logit_bias": Biases(MAX_BIASED_TOKENS, Real(-100, 100)),
    "allowed_token_ids": TokenIds(MAX_BIASED_TOKENS),
    "extra_args": Object(),
    "bad_words": Words(MAX_BAD_WORDS),
    "skip_reading_prefix_cache": Flag(),
    "thinking_token_budget": Whole(0, MAX_TOKENS),
    "repetition_detection": Parts(
        {
            "max_pattern_size": Whole(0, MAX_PATTERN_TOKENS),
            "min_pattern_size": Whole(0, MAX_PATTERN_TOKENS),
            "min_count": Whole(0, MAX_TOKENS),
        }
    ),
    "routed_experts_prompt_start": Whole(0, MAX_TOKENS),
    "trace_decode_token_ids": NotOffered(),
}
"""Every sampling parameter that reaches an engine, under vLLM's name.  One that is not here is refused."""

MAY_BE_NONE = frozenset({"max_tokens"})
"""The only parameter that is None where that is not its default; what is at its default is left out of a request."""

REQUEST_RANGES: dict[str, Range] = {
    "priority": Whole(*INT64),
    "cache_salt": Text(),
    "reasoning_parser_kwargs": Object(),
}
"""The other fields of a `GenerateRequest` that come from a client; prompts are checked by the engines' own code."""


def check_request(request: GenerateRequest, vocab_size: int) -> None:
    """Raise InvalidRequest, which names the field and its bounds, unless any engine can hold what `request` says.

    `vocab_size` is the number of tokens that the model knows.
    """
    for name, value in request.sampling.items():
        if value is None and name in MAY_BE_NONE:
            continue
        _refuse(name, RANGES.get(name, NotOffered()).problem(value, vocab_size))
    for name, values in REQUEST_RANGES.items():
        if (value := getattr(request, name)) is not None:
            _refuse(name, values.problem(value, vocab_size))


def check_tokenized(stop_token_ids: Iterable[int], bad_words: Iterable[list[int]] | None) -> None:
    """Raise InvalidRequest if there are too many stop tokens or tokens of bad words for vLLM's workers.

    How many there are is known only when the model's own stop tokens were added and the words were tokenized.
    """
    if len(set(stop_token_ids)) > MAX_STOP_TOKENS:
        _refuse("stop_token_ids", f"must be at most {MAX_STOP_TOKENS} token ids, those of the model included")
    if sum(map(len, bad_words or ())) > MAX_BAD_WORD_TOKENS:
        _refuse("bad_words", f"must be at most {MAX_BAD_WORD_TOKENS} tokens in all, with and without a space before")


def check_seeds(seed: int | None, num_sequences: int) -> None:
    """Raise InvalidRequest if the last of the sequences, whose seeds are numbered on from `seed`, would have none."""
    if seed is not None:
        _refuse("seed", Whole(INT64[0], INT64[1] - num_sequences + 1).problem(seed, 0))


def _refuse(name: str, problem: str) -> None:
    if problem:
        raise InvalidRequest(f"{name}{'' if problem.startswith('.') else ' '}{problem}")


def _problem_of_tokens(token_ids: Iterable[Any], vocab_size: int) -> str:
    # bool is an int for Python, but not for the tensors in which these are indices.
    are_held = all(type(token) is int and 0 <= token < vocab_size for token in token_ids)
    return "" if are_held else f"must have token ids from 0 to {vocab_size - 1} only"


def _problem_of_data(value: Any) -> str:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            return f"must not be nested more than {MAX_DEPTH} levels deep"
        if found := next(filter(None, map(_problem_of_leaf, level)), ""):
            return found
        level = [child for each in level for child in _children(each)]
        depth += 1
    return ""


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    return value if isinstance(value, list | tuple) else ()


def _problem_of_leaf(value: Any) -> str:
    if isinstance(value, int):
        low, high = MSGPACK_INT
        return "" if low <= value <= high else f"must have whole numbers from {low} to {high} only"
    if isinstance(value, str):
        return "" if _is_utf8(value) else "must be text that UTF-8 can encode, without lone surrogates"
    is_known = value is None or isinstance(value, float | Mapping | list | tuple)
    return "" if is_known else "must be what JSON can say"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
