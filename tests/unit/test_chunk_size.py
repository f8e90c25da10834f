"""The chunks in which decode computes prompts: by the ITL and the model's size, and the user's word above it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.chunk_size import chunk_size, count_parameters, with_chunk_sizes
from app.config import BatonConfig, parse


def config(engine: str = "vllm", *, source: str = "owner/Some-8B", **fields: Any) -> BatonConfig:
    pool = {"engine": engine, "tensor_parallel_size": fields.pop("tensor_parallel_size", 1)}
    decode = {**pool, "engine_args": fields.pop("decode_args", {})}
    model = {"name": "m", "source": source, "prefill": pool, "decode": decode, "aggregated": pool, **fields}
    return parse({"models": [model], "transfer": {}})


def sizes(given: BatonConfig, device: str = "cuda") -> dict[str, int | None]:
    """What each pool's engine is given as its chunk size."""
    (model,) = with_chunk_sizes(given, device).models
    name = "max_num_batched_tokens" if model.engine == "vllm" else "chunked_prefill_size"
    return {role: model.merged_engine_args(pool).get(name) for role, pool in model.pools().items()}


@pytest.mark.parametrize(
    ("itl_ms", "parameters", "num_gpus", "size"),
    [
        (50, 8e9, 1, 2048),
        (45, 8e9, 1, 1024),  # 2,025 tokens
        (20, 8e9, 1, 1024),
        (5, 8e9, 1, 1024),
        (50, 70e9, 4, 1024),
        (50, 70e9, 8, 2048),
        (50, 0.6e9, 1, 8192),
    ],
)
def test_a_chunk_is_what_is_computed_within_the_itl(itl_ms: float, parameters: float, num_gpus: int, size: int) -> None:
    assert chunk_size(itl_ms, parameters, num_gpus) == size


def test_the_pools_that_decode_get_it_and_prefill_does_not() -> None:
    assert sizes(config(slo={"itl_ms": 50})) == {"prefill": None, "decode": 2048, "aggregated": 2048}
    assert sizes(config(slo={"itl_ms": 25})) == {"prefill": None, "decode": 1024, "aggregated": 1024}
    assert sizes(config(slo={"ttft_ms": 900}))["decode"] == 2048
    assert sizes(config(slo={"itl_ms": 50}, source="o/Some-70B", tensor_parallel_size=4))["decode"] == 1024


def test_an_engine_that_computes_no_prompts_gets_none() -> None:
    assert sizes(config("sglang", slo={"itl_ms": 50})) == {"prefill": None, "decode": None, "aggregated": 2048}


@pytest.mark.parametrize(
    ("given", "device"),
    [
        (config(), "cuda"),
        (config(slo={"itl_ms": 50}), "cpu"),
        (config("sim", slo={"itl_ms": 50}), "cuda"),
        (config(slo={"itl_ms": 50}, source="owner/nameless"), "cuda"),
        (config(slo={"itl_ms": 50}, engine_args={"enable_chunked_prefill": False}), "cuda"),
        (config(slo={"itl_ms": 50}, prefill=None, aggregated=None), "cuda"),
    ],
    ids=["no slo", "a CPU", "no real engine", "unknown size", "no chunks", "no prefill pool"],
)
def test_where_the_engines_default_stays(given: BatonConfig, device: str) -> None:
    assert with_chunk_sizes(given, device) == given


@pytest.mark.parametrize("where", ["engine_args", "decode_args"])
def test_engine_args_say_it_themselves(where: str) -> None:
    own: dict[str, Any] = {where: {"max_num_batched_tokens": 4096}}
    assert sizes(config(slo={"itl_ms": 50}, **own))["decode"] == 4096


def test_a_chunk_has_room_for_a_full_batch_and_whole_blocks() -> None:
    assert sizes(config(slo={"itl_ms": 10}, engine_args={"max_num_seqs": 1500}))["decode"] == 1500
    assert sizes(config(slo={"itl_ms": 10}, engine_args={"block_size": 1024}))["decode"] == 1024
    assert sizes(config("sglang", slo={"itl_ms": 10}, engine_args={"page_size": 96}))["aggregated"] == 1056


@pytest.mark.parametrize(
    ("source", "parameters"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8e9),
        ("nvidia/Llama-3.3-70B-Instruct-FP8", 70e9),
        ("Qwen/Qwen3-0.6B", 0.6e9),
        ("Qwen/Qwen3-30B-A3B", None),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("deepseek-ai/DeepSeek-V3", None),
        ("baton:shape/llama-8b", pytest.approx(7.0e9, rel=0.01)),  # without embeddings
        ("baton:shape/llama-70b", pytest.approx(68.5e9, rel=0.01)),
    ],
)
def test_the_number_of_parameters_is_found(source: str, parameters: float | None) -> None:
    assert count_parameters(source) == parameters


def test_a_folder_tells_by_its_dimensions_unless_it_has_experts(tmp_path: Path) -> None:
    dimensions = {"hidden_size": 4, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}

    def found(**fields: Any) -> float | None:
        (tmp_path / "config.json").write_text(json.dumps({**dimensions, **fields}))
        return count_parameters(str(tmp_path))

    assert found() == 2 * (4 * 4 * 4 + 3 * 4 * 10)
    assert found(num_key_value_heads=1, head_dim=8) == 2 * (4 * (2 * 8 + 2 * 8 + 2 * 8) + 3 * 4 * 10)
    assert found(num_experts=8) is None
    assert found(hidden_size=None) is None
