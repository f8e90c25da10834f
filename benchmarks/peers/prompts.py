"""The same load as text: prompts for which every tokenizer of the same model gives the same number of tokens.

`app.bench.load` sends token ids.  But sglang-router's /v1/completions takes only text (ids are a 422), and a server
that is given ids need not run its tokenizer.  So the peers get text.  Each of its words, with the space before it, is
one token: tokenizers split text at these places before they merge anything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from random import Random

import msgspec

from app.bench.workload import Request, RequestPlan

WORD = re.compile(r" [A-Za-z]+")
MAX_WORDS = 5000


class TextRequest(Request, frozen=True):
    """A request whose prompt is text of `input_tokens` tokens."""

    tokenizer: str

    def prompt(self, vocabulary: Sequence[int], seed: str) -> str:  # type: ignore[override]
        """Return the text.  It is the same for the same seed in every process."""
        known = words(self.tokenizer)
        return "".join(
            word for number, length in self.pieces for word in Random(f"{seed}/{number}").choices(known, k=length)
        )


def as_text(load: RequestPlan, tokenizer: str) -> RequestPlan:
    """Return the same number of requests, of the same lengths, as text."""
    requests: list[Request] = [
        TextRequest(request.at_s, request.pieces, request.output_tokens, tokenizer) for request in load.requests
    ]
    return msgspec.structs.replace(load, requests=requests)


@functools.cache
def words(tokenizer: str) -> list[str]:
    """Return words that are one token each, in the order of their ids."""
    from vllm.tokenizers import get_tokenizer

    loaded = get_tokenizer(tokenizer)
    found = []
    for token in sorted(set(loaded.get_vocab().values()) - set(loaded.all_special_ids)):
        text = loaded.decode([token])
        if WORD.fullmatch(text) and loaded.encode(text, add_special_tokens=False) == [token]:
            found.append(text)
        if len(found) == MAX_WORDS:
            break
    return found
