"""What a sim engine knows of its model: the tokens of ordinary text, and how long a sequence may be.

It reads the model's files itself.  Importing transformers takes seconds, and an engine without weights needs only two
numbers and a list from them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from app.errors import ConfigError
from app.messages import Logprobs

ORDINARY = re.compile(r"[Ġ▁]?[!-;=?-~]+")
"""Tokens of plain ASCII, with or without the space before them (Ġ or ▁) and without the characters of markup.  Each is
text by itself; a token that has only some bytes of a longer character is not."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What config.json and tokenizer.json say."""

    max_model_len: int
    """The number of positions that the model was made for."""
    vocabulary: list[int]
    """Ids of ordinary text tokens."""


class _AddedToken(msgspec.Struct):
    id: int


class _TokenizerModel(msgspec.Struct):
    vocab: Any = None


class _Tokenizer(msgspec.Struct):
    model: _TokenizerModel
    added_tokens: list[_AddedToken] = []


def read_model_facts(model_path: str) -> ModelFacts:
    """Return the facts of the model in a folder or, if it is an id, on Hugging Face's hub.  Raises ConfigError."""
    try:
        config = msgspec.json.decode(_find(model_path, "config.json").read_bytes(), type=dict[str, Any])
        text_config = {**config, **(config.get("text_config") or {})}
        vocab_size, max_model_len = int(text_config["vocab_size"]), int(text_config["max_position_embeddings"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError("source", f"{model_path}: no use of its config.json: {error!r}") from error
    vocabulary = [token for token in _ordinary_tokens(model_path) if token < vocab_size]
    if not vocabulary:
        special = _ids(text_config, "bos_token_id", "eos_token_id", "pad_token_id")
        vocabulary = [token for token in range(vocab_size) if token not in special]
    return ModelFacts(max_model_len, vocabulary)


def _find(model_path: str, name: str) -> Path:
    if Path(model_path).is_dir():
        return Path(model_path) / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_path, name))


def _ordinary_tokens(model_path: str) -> list[int]:
    """Return the ids in order; none if the tokenizer's file is missing or of a kind that is not supported here."""
    try:
        tokenizer = msgspec.json.decode(_find(model_path, "tokenizer.json").read_bytes(), type=_Tokenizer)
    except (OSError, msgspec.DecodeError):
        return []
    vocab = tokenizer.model.vocab
    if isinstance(vocab, list):  # Unigram: [token, score] by id
        vocab = {entry[0]: token_id for token_id, entry in enumerate(vocab)}
    if not isinstance(vocab, dict):
        return []
    added = {token.id for token in tokenizer.added_tokens}
    return sorted(token for text, token in vocab.items() if token not in added and ORDINARY.fullmatch(text))


def _ids(config: dict[str, Any], *names: str) -> set[int]:
    """Return the token ids that a configuration has under `names`; each may be missing, a number or a list."""
    ids: set[int] = set()
    for name in names:
        value = config.get(name)
        ids.update(value if isinstance(value, list) else [value] if isinstance(value, int) else [])
    return ids


def make_logprobs(vocabulary: list[int], token: int, num_candidates: int, stream: int, position: int) -> Logprobs:
    """Return the log probabilities of one token and of the `num_candidates` likeliest, of which it is the first.

    They come from a hash, like the token.  The token has 55 % to 95 % of the probability, and each further candidate
    has half of what is left.
    """
    draw = hash((stream, position, 0))
    probability = 0.55 + draw % 4001 / 10_000
    ids, logprobs = [token], [math.log(probability)]
    if num_candidates:
        size = len(vocabulary)
        near = (vocabulary[(draw + offset) % size] for offset in range(min(num_candidates, size)))
        others = [candidate for candidate in near if candidate != token][: num_candidates - 1]
        ids += [token, *others]
        rest = math.log(1 - probability)
        logprobs += [logprobs[0], *(rest - rank * math.log(2) for rank in range(1, len(others) + 1))]
    return Logprobs([ids], [logprobs], [1])
