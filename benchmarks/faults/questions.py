"""What a campaign asks for: greedy completions, and on real engines also what depends on the tokens before.

Each request has a cache salt of its own: its KV is computed and moved anew, and the answer stays the same.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

VOCABULARY = range(300, 2000)
PROMPT_TOKENS, OUTPUT_TOKENS = (40, 700), (8, 48)
"""The shortest and the longest."""
STRUCTURED_TOKENS = 96
"""The most tokens of an answer that a grammar ends."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(ab|cd){4,9}-[0-9]{5}"
FUNCTION = {"name": "remember", "description": "Remember a person", "parameters": SCHEMA}
UNTIL_END = {"ignore_eos": False, "max_tokens": STRUCTURED_TOKENS}


class Question(msgspec.Struct, frozen=True):
    """One request, as `path` takes it."""

    path: str
    fields: dict[str, Any]

    def body(self, model: str) -> dict[str, Any]:
        """Return what to send."""
        common = {"model": model, "temperature": 0, "stream": True, "cache_salt": uuid.uuid4().hex}
        return {**common, **self.fields}


def _completion(**options: Any) -> Callable[[Random], Question]:
    def make(random: Random) -> Question:
        prompt = random.choices(VOCABULARY, k=random.randint(*PROMPT_TOKENS))
        fields = {"prompt": prompt, "max_tokens": random.randint(*OUTPUT_TOKENS), "ignore_eos": True}
        return Question("/v1/completions", {**fields, **options})

    return make


def _tool_call(random: Random) -> Question:
    words = " ".join(str(random.randrange(10_000)) for _ in range(random.randint(10, 150)))
    fields = {
        "messages": [{"role": "user", "content": words}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": FUNCTION["name"]}},
        "max_tokens": STRUCTURED_TOKENS,
    }
    return Question("/v1/chat/completions", fields)


PLAIN = _completion()
SORTS: dict[str, Callable[[Random], Question]] = {
    "plain": PLAIN,
    "JSON schema": _completion(**UNTIL_END, structured_outputs={"json": SCHEMA}),
    "regex": _completion(**UNTIL_END, structured_outputs={"regex": REGEX}),
    "three at once": _completion(n=3),
    "log probabilities": _completion(logprobs=3),
    "tool call": _tool_call,
    "penalties": _completion(repetition_penalty=1.7, frequency_penalty=1.5, presence_penalty=0.7),
    "bad words": _completion(bad_words=["the", " a"], min_tokens=4),
}
"""What a real engine is asked for.  To generate "a" again would change what penalties, grammars and the rest allow."""


def sorts_of(engine: str) -> list[Callable[[Random], Question]]:
    """Return what an application on `engine` can be asked: sim has no text, and SGLang no bad words."""
    if engine == "sim":
        return [PLAIN]
    return [make for name, make in SORTS.items() if (engine, name) != ("sglang", "bad words")]


def draw_questions(num: int, seed: int, sorts: Sequence[Callable[[Random], Question]] = (PLAIN,)) -> list[Question]:
    """Draw questions, of each sort in turn."""
    random = Random(seed)
    return [sorts[number % len(sorts)](random) for number in range(num)]
