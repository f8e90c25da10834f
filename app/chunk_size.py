"""How many prompt tokens one step computes where sequences decode, unless ``engine_args`` says so.

A step of a decode engine that computes a chunk of a prompt makes all its sequences wait for that chunk.  So the chunk
is the largest for which they wait no longer than the model's ``slo.itl_ms``.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from app.config import BatonConfig, ModelConfig, PoolConfig
from app.messages import EngineName
from app.models.source import read_config

logger = logging.getLogger("baton.chunk_size")

ARGUMENT: dict[EngineName, str] = {"vllm": "max_num_batched_tokens", "sglang": "chunked_prefill_size"}
"""The engines' names for it."""
TOKENS_PER_MS, MEASURED_PARAMETERS = 45.0, 8e9
"""How fast prompts are computed, and the size of the model of which this is known: vLLM with the shape of Llama-8B on
one H200 takes 45.8 ms for 2,048 tokens (app/engines/sim/profiles/h200-llama-8b.yaml)."""
SMALLEST, LARGEST = 1024, 8192
"""Each step has a fixed time, 18 ms in that profile.  So smaller chunks take longer in all: decode then prefills less
within the ITL.  Larger ones hardly save any time (docs/benchmarks/2026-11-28-goodput.md compares)."""
SIZE_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)b(?![A-Za-z0-9])", re.IGNORECASE)
EXPERTS_IN_NAME = re.compile(r"-a\d+(?:\.\d+)?b(?![A-Za-z0-9])", re.IGNORECASE)
DIMENSIONS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def with_chunk_sizes(config: BatonConfig, device: str) -> BatonConfig:
    """Return `config` with chunk sizes for the pools that decode and compute prompts, where a model has an ``slo``.

    The estimate is for GPUs.  Pools that set a size themselves, and models of unknown size, stay as they are.  So do
    models without a prefill pool: all of their prompts are computed where they are decoded, and larger chunks cost less
    time in all than they make anybody wait.
    """
    if device != "cuda":
        return config
    return config.model_copy(update={"models": [_with_chunk_sizes(model) for model in config.models]})


def _with_chunk_sizes(model: ModelConfig) -> ModelConfig:
    name = ARGUMENT.get(model.engine)
    applies = name is not None and model.is_disaggregated and "slo" in model.model_fields_set
    parameters = count_parameters(model.source) if applies else None
    if name is None or parameters is None:
        return model
    pools: dict[str, PoolConfig] = {}
    for role, pool in model.pools().items():
        arguments = model.merged_engine_args(pool)
        is_free = name not in arguments and arguments.get("enable_chunked_prefill") is not False
        if role != "prefill" and model.runs_whole_sequences(role) and is_free:
            size = _as_the_engine_needs(chunk_size(model.slo.itl_ms, parameters, pool.tensor_parallel_size), arguments)
            logger.info("model=%s role=%s %s=%d as slo.itl_ms=%g", model.name, role, name, size, model.slo.itl_ms)
            pools[role] = _with_argument(pool, name, size)
    return model.model_copy(update=pools)


def _with_argument(pool: PoolConfig, name: str, value: int) -> PoolConfig:
    return pool.model_copy(update={"engine_args": {**pool.engine_args, name: value}})


def chunk_size(itl_ms: float, parameters: float, num_gpus: int) -> int:
    """Return the largest power of two of prompt tokens that `num_gpus` GPUs compute within `itl_ms`."""
    num_tokens = itl_ms * TOKENS_PER_MS * MEASURED_PARAMETERS / parameters * num_gpus
    return 1 << math.floor(math.log2(min(LARGEST, max(SMALLEST, num_tokens))))


def _as_the_engine_needs(size: int, arguments: Mapping[str, Any]) -> int:
    """Return `size`, enlarged to a token for each sequence of a full batch (vLLM) and to whole blocks (SGLang)."""
    block_size = int(arguments.get("page_size") or arguments.get("block_size") or 1)
    return -(-max(size, int(arguments.get("max_num_seqs") or 0)) // block_size) * block_size


def count_parameters(source: str) -> float | None:
    """Return about how many parameters a token is multiplied by.

    It goes by the model's ``config.json``, or by the name (``Llama-3.3-70B``) if that is not on this node.  Returns
    None if neither tells, and for mixtures of experts, which use a part of their parameters for each token.
    """
    config = read_config("source", source)
    if config is not None:
        return _count_by_dimensions(config.get("text_config") or config)
    found = SIZE_IN_NAME.search(source)
    return float(found[1]) * 1e9 if found and not EXPERTS_IN_NAME.search(source) else None


def _count_by_dimensions(config: Mapping[str, Any]) -> float | None:
    """Count the matrices of all layers, which have queries, keys, values, their output, and an MLP of three."""
    if not all(isinstance(config.get(name), int) for name in DIMENSIONS) or any(map(config.get, EXPERTS)):
        return None
    hidden, intermediate, layers, heads = (config[name] for name in DIMENSIONS)
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    return float(layers * hidden * (2 * head_dim * (heads + kv_heads) + 3 * intermediate))
