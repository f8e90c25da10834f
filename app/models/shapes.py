"""Shapes: models with the dimensions of real ones but without weights, for measuring without a download.

A shape is a folder with a ``config.json`` and the tokenizer of the tiny model. Engines fill in weights of their own
(``load_format: dummy``, which `ModelConfig.merged_engine_args` sets), so layers, KV and transfers are as large and take
as long as the real model's. Two things differ. The vocabulary is the tokenizer's 2048 tokens, so that nobody needs
another tokenizer: embeddings and the matrix that makes logits are smaller than the real model's. And the text means
nothing: vLLM draws dummy weights evenly from -0.001 to 0.001, so near zero that wrong KV may give the same tokens.
Shapes are for timing; whether output is right is tested with ``baton:tiny``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.models import tiny

PREFIX = "baton:shape/"

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": tiny.VOCAB_SIZE,
    "eos_token_id": tiny.EOS_ID,
    "pad_token_id": tiny.PAD_ID,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
_LLAMA: dict[str, Any] = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131_072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "rms_norm_eps": 1e-5,
    "mlp_bias": False,
}
_QWEN3: dict[str, Any] = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}


def _size(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    f"{PREFIX}llama-8b": _LLAMA | _size(4096, 14336, 32, 32),
    f"{PREFIX}llama-70b": _LLAMA | _size(8192, 28672, 80, 64),
    f"{PREFIX}qwen3-0.6b": _QWEN3 | _size(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    f"{PREFIX}qwen3-8b": _QWEN3 | _size(4096, 12288, 36, 32),
}
"""The ``config.json`` of each shape, by what a configuration gives as the `source`."""


def ensure_shape(source: str, directory: Path | None = None) -> Path:
    """Return the folder of the shape `source`, a key of `SHAPES`; make it if it is missing.

    `directory` is as for `app.models.tiny.make_once`. Raises ``ImportError`` where no engine is installed
    (transformers comes with it), and ``OSError`` where the folder cannot be written.
    """
    config = SHAPES[source]

    def build(folder: Path) -> None:
        tiny.save_tokenizer(folder, config["max_position_embeddings"])
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    recipe = tiny.recipe_hash(Path(__file__), Path(tiny.__file__), tiny.CORPUS)
    return tiny.make_once(f"shape-{source.removeprefix(PREFIX)}-{recipe}", build, directory)
