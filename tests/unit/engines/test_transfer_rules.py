"""Which pools KV can move between: the rules, real models' shapes, and what the engines' own checks say."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import parse
from app.engines import transfer_rules
from app.engines.transfer_rules import KvShape, check_heads, check_transfer, kv_shape
from app.errors import ConfigError
from app.models.shapes import SHAPES
from app.preflight import check
from tests.conftest import REPOSITORY

LLAMA_8B = "baton:shape/llama-8b"
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

Pool = dict[str, Any]


def pool(tensor_parallel_size: int = 1, environment: dict[str, str] | None = None, **engine_args: Any) -> Pool:
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "engine_args": engine_args,
        "environment": environment or {},
    }


def layout(name: str, tensor_parallel_size: int = 1) -> Pool:
    return pool(tensor_parallel_size, {"VLLM_KV_CACHE_LAYOUT": name})


def checked(
    prefill: Pool, decode: Pool, engine: str = "vllm", source: str = LLAMA_8B, **engine_args: Any
) -> ConfigError | None:
    """Return what ``baton check`` says, on a cluster whose nodes are still to come."""
    pools = {"prefill": {"engine": engine, **prefill}, "decode": {"engine": engine, **decode}}
    model = {"name": "m", "source": source, "engine_args": engine_args, **pools}
    config = parse({"device": "cuda", "models": [model], "transfer": {}})
    try:
        check(config, [])
    except ConfigError as error:
        return error
    return None


def folder_of(config: dict[str, Any], tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


# Shapes


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (SHAPES[LLAMA_8B], KvShape(32, 8, is_mla=False, has_states=False)),
        (DEEPSEEK_V3, KvShape(128, 128, is_mla=True, has_states=False)),
        (QWEN3_NEXT, KvShape(16, 2, is_mla=False, has_states=True)),
        ({**QWEN3_NEXT, "layer_types": None}, KvShape(16, 2, is_mla=False, has_states=True)),
        (GEMMA3, KvShape(32, 16, is_mla=False, has_states=False)),
        ({"num_attention_heads": 16}, None),
        ({"num_attention_heads": 16, "num_key_value_heads": [4, 8]}, None),
        ({}, None),
    ],
)
def test_the_shape_is_read_from_the_models_config(config: dict[str, Any], shape: KvShape | None) -> None:
    assert kv_shape(config) == shape


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    said = checked(pool(), pool(), source=str(tmp_path))
    assert said is not None
    assert (said.field, "config.json" in said.problem) == ("models.0.source", True)


# Each pool by itself


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (SHAPES[LLAMA_8B], 3, "32 attention heads"),
        (SHAPES["baton:shape/qwen3-0.6b"], 32, "16 attention heads"),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, 4, "divides 6 or is a multiple"),
        ({"num_attention_heads": 24, "num_key_value_heads": 4}, 6, "divides 4 or is a multiple"),
    ],
)
def test_heads_that_cannot_be_spread_are_refused(
    engine: str, config: dict[str, Any], size: int, words: str, tmp_path: Path
) -> None:
    said = checked(pool(size), pool(size), engine, folder_of(config, tmp_path))
    assert said is not None
    assert (said.field, words in said.problem) == ("models.0.prefill.tensor_parallel_size", True)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SHAPES[LLAMA_8B], 16),  # each KV head on two GPUs
        ({**DEEPSEEK_V3, "num_key_value_heads": 6}, 4),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, 12),
        ({}, 3),
    ],
)
def test_heads_that_can_be_spread_are_accepted(config: dict[str, Any], size: int) -> None:
    check_heads("field", size, kv_shape(config))


# The two pools

VLLM, SGLANG = ("vllm",), ("sglang",)
BOTH = VLLM + SGLANG
MTP = {"method": "mtp", "num_speculative_tokens": 1}


@pytest.mark.parametrize(
    ("engines", "prefill", "decode", "field", "words"),
    [
        (VLLM, pool(16), pool(4), "prefill.tensor_parallel_size", "16 GPUs that share 8 KV heads .* set at most 8"),
        (VLLM, pool(32), pool(16), "prefill.tensor_parallel_size", "set at most 16"),
        (SGLANG, pool(16), pool(32), "decode.tensor_parallel_size", "set prefill's 16, or at most 8"),
        (BOTH, pool(kv_cache_dtype="fp8"), pool(), "engine_args.kv_cache_dtype", "prefill has fp8 and decode none"),
        (BOTH, pool(dtype="half"), pool(dtype="bfloat16"), "engine_args.dtype", "set it here rather than in a pool"),
        (
            VLLM,
            pool(),
            pool(disable_hybrid_kv_cache_manager=True),
            "engine_args.disable_hybrid_kv_cache_manager",
            "decode True",
        ),
        (
            VLLM,
            pool(attention_backend="FLASHINFER"),
            pool(attention_backend="FLASH_ATTN"),
            "engine_args.attention_backend",
            "laid out alike",
        ),
        (SGLANG, pool(page_size=64), pool(page_size=1), "engine_args.page_size", "laid out alike"),
        (VLLM, pool(block_size=32), pool(block_size=16), "decode.engine_args.block_size", "multiple of 32"),
        (VLLM, pool(), pool(block_size=32), "decode.engine_args.block_size", "set it in the model's engine_args"),
        (VLLM, pool(4, block_size=16), pool(2, block_size=32), "decode.engine_args.block_size", "must be the same"),
        (VLLM, layout("NHD"), pool(), "prefill.environment.VLLM_KV_CACHE_LAYOUT", "LBNHC and decode's LBHNC"),
        (VLLM, layout("NHD", 2), layout("NHD", 4), "decode.environment.VLLM_KV_CACHE_LAYOUT", "cannot be split"),
        (VLLM, pool(), pool(pipeline_parallel_size=2), "decode.engine_args.pipeline_parallel_size", "1 only"),
        (SGLANG, pool(pp_size=4), pool(pp_size=2), "decode.engine_args.pp_size", "set 1 or prefill's 4"),
        (
            VLLM,
            pool(max_model_len=1024),
            pool(max_model_len=4096),
            "prefill.engine_args.max_model_len",
            "set at least 4096",
        ),
        (
            SGLANG,
            pool(context_length=1024),
            pool(context_length=4096),
            "prefill.engine_args.context_length",
            "set at least 4096",
        ),
        (VLLM, pool(speculative_config=MTP), pool(), "engine_args.speculative_config", "drafts"),
    ],
)
def test_pools_between_which_kv_cannot_move_are_refused(
    engines: tuple[str, ...], prefill: Pool, decode: Pool, field: str, words: str
) -> None:
    for engine in engines:
        said = checked(prefill, decode, engine)
        assert said is not None
        assert said.field == f"models.0.{field}"
        assert re.search(words, said.problem)


def test_scales_of_blocks_cannot_be_split() -> None:
    said = checked(pool(4), pool(2), "sglang", kv_cache_dtype="mxfp8")
    assert said is not None
    assert said.field == "models.0.prefill.tensor_parallel_size"
    assert "set decode's 2" in said.problem
    assert checked(pool(4), pool(4), "sglang", kv_cache_dtype="mxfp8") is None


@pytest.mark.parametrize("engine", BOTH)
def test_numbers_of_gpus_that_do_not_fit_are_refused(engine: str, tmp_path: Path) -> None:
    source = folder_of({"num_attention_heads": 24, "num_key_value_heads": 12}, tmp_path)
    for sizes in ((6, 4), (4, 6)):
        said = checked(pool(sizes[0]), pool(sizes[1]), engine, source)
        assert said is not None
        assert said.field == "models.0.prefill.tensor_parallel_size"
        assert "one is a multiple of the other" in said.problem


@pytest.mark.parametrize(
    ("engines", "prefill", "decode"),
    [
        (BOTH, pool(8), pool(8)),
        (BOTH, pool(2), pool(8)),
        (BOTH, pool(8), pool(2)),
        (BOTH, pool(1), pool(16)),
        (SGLANG, pool(16), pool(4)),
        (VLLM, pool(16), pool(32)),
        (BOTH, pool(kv_cache_dtype="auto"), pool()),
        (BOTH, pool(dtype="auto"), pool()),
        (VLLM, pool(disable_hybrid_kv_cache_manager=False), pool()),
        (VLLM, pool(attention_backend="FLASHINFER"), pool(attention_backend="flashinfer")),
        (VLLM, pool(attention_backend="FLASHINFER"), pool()),
        (SGLANG, pool(page_size=64), pool()),
        (VLLM, pool(block_size=16), pool(block_size=32)),
        (VLLM, pool(block_size=32), pool()),
        (VLLM, layout("HND", 2), pool(4)),
        (VLLM, layout("NHD", 2), layout("LBNHC", 2)),
        (VLLM, pool(pipeline_parallel_size=2), pool()),
        (SGLANG, pool(pp_size=2), pool(pp_size=2)),
        (SGLANG, pool(pp_size=2), pool()),
        (VLLM, pool(max_model_len=4096), pool(max_model_len=1024)),
        (VLLM, pool(max_model_len=1024), pool()),
        (VLLM, pool(speculative_config={"method": "ngram"}), pool()),
        (VLLM, pool(speculative_config=MTP), pool(speculative_config={**MTP, "num_speculative_tokens": 3})),
    ],
)
def test_pools_between_which_kv_can_move_are_accepted(engines: tuple[str, ...], prefill: Pool, decode: Pool) -> None:
    for engine in engines:
        assert checked(prefill, decode, engine) is None


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("sizes", [(16, 4), (4, 16), (1, 8), (8, 1)])
def test_latent_attention_has_no_heads_to_split(engine: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    environment = {"VLLM_KV_CACHE_LAYOUT": "NHD"}
    prefill, decode = (pool(size, environment) for size in sizes)
    assert checked(prefill, decode, engine, folder_of(DEEPSEEK_V3, tmp_path)) is None


def test_vllm_moves_copies_of_heads_beside_states(tmp_path: Path) -> None:
    assert checked(pool(8), pool(4), source=folder_of(QWEN3_NEXT, tmp_path)) is None


@pytest.mark.parametrize("engine", BOTH)
def test_without_the_model_at_hand_only_what_needs_no_shape_is_refused(engine: str) -> None:
    source = "meta-llama/Llama-3.1-8B"
    assert checked(pool(16), pool(4), engine, source) is None
    assert checked(pool(6), pool(4), engine, source) is not None


def test_an_aggregated_model_has_no_pair() -> None:
    (model,) = parse({"models": [{"name": "m", "source": LLAMA_8B, "decode": pool(4, dtype="float16")}]}).models
    check_transfer("field", model, None)


# What the engines themselves say

SIZES = (1, 2, 3, 4, 6, 8, 16, 32)


def pairs(shape: KvShape) -> Iterator[tuple[int, int]]:
    """Return the sizes of prefill and decode pools that can each start with the model."""
    for prefill, decode in product(SIZES, SIZES):
        try:
            check_heads("field", prefill, shape)
            check_heads("field", decode, shape)
        except ConfigError:
            continue
        yield prefill, decode


def refuses(engine: str, shape: KvShape, prefill: Pool, decode: Pool) -> bool:
    pools = {"prefill": {"engine": engine, **prefill}, "decode": {"engine": engine, **decode}}
    (model,) = parse({"models": [{"name": "m", "source": "a/b", **pools}], "transfer": {}}).models
    try:
        check_transfer("field", model, shape)
    except ConfigError:
        return True
    return False


def vllm_refuses(shape: KvShape, sizes: tuple[int, int], blocks: tuple[int, int], layouts: tuple[str, str]) -> bool:
    """Ask the check that vLLM's decode makes of the KV that a prefill engine offers."""
    from vllm.distributed.kv_transfer.kv_connector.utils import EngineTransferInfo, TransferTopology
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker

    def block_bytes(size: int, block: int) -> int:
        return block * 256 * (1 if shape.is_mla else max(1, shape.num_kv_heads // size))

    topology = TransferTopology(
        tp_rank=0,
        tp_size=sizes[1],
        block_size=blocks[1],
        engine_id="decode",
        is_mla=shape.is_mla,
        is_mamba=shape.has_states,
        total_num_kv_heads=shape.num_kv_heads,
        attn_backends=[],
    )
    remote_bytes = block_bytes(sizes[0], blocks[0])
    topology.register_remote_engine("prefill", EngineTransferInfo(sizes[0], remote_bytes, blocks[0], 1))
    worker = SimpleNamespace(
        transfer_topo=topology,
        dcp_size=1,
        use_mla=shape.is_mla,
        _has_mamba=shape.has_states,
        region_group_ids=[],
        _physical_blocks_per_logical_kv_block=1,
        use_host_buffer=False,
        kv_cache_layout=layouts[1],
        kv_transfer_config=SimpleNamespace(enable_permute_local_kv=False),
        enable_permute_local_kv=False,
        backend_name="FLASH_ATTN",
        _transfer_layer_region_indices=(),
        block_len_per_layer=[block_bytes(sizes[1], blocks[1])],
        _is_region_replicated=lambda index: False,
        dst_num_blocks={"prefill": 10},
    )
    offer = SimpleNamespace(
        engine_id="prefill",
        block_size=blocks[0],
        physical_blocks_per_logical_kv_block=1,
        kv_cache_layout=layouts[0],
        attn_backend_name="FLASH_ATTN",
        block_lens=[remote_bytes],
        block_strides=[remote_bytes],
        num_blocks=10,
        kv_caches_base_addr=[0],
        region_num_blocks=None,
        region_group_ids=None,
        region_names=None,
        region_mem_types=None,
    )
    try:
        topology.handshake_target_ranks(sizes[0])
        NixlBaseConnectorWorker._validate_remote_agent_handshake(worker, offer, sizes[0])
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("kind", ["heads", "mla", "states"])
def test_vllm_refuses_the_same_pairs(kind: str, num_kv_heads: int) -> None:
    shape = KvShape(96, num_kv_heads, is_mla=kind == "mla", has_states=kind == "states")
    blocks = ((16, 16), (16, 32), (32, 16))
    layouts = (("LBHNC", "LBHNC"), ("LBNHC", "LBNHC"), ("LBNHC", "LBHNC"), ("LHBNC", "LHBNC"), ("BLHNC", "BLHNC"))
    seen = set()
    for sizes, block, names in product(pairs(shape), blocks, layouts):
        sides = [
            pool(size, {"VLLM_KV_CACHE_LAYOUT": name}, block_size=tokens)
            for size, tokens, name in zip(sizes, block, names, strict=True)
        ]
        theirs = vllm_refuses(shape, sizes, block, names)
        assert refuses("vllm", shape, sides[0], sides[1]) == theirs, (sizes, block, names)
        seen.add(theirs)
    assert seen == {True, False}


def test_the_layouts_and_methods_are_vllms() -> None:
    from vllm.config.speculative import SpeculativeConfig
    from vllm.v1.kv_cache_layout import KVCacheLayout

    assert {each.name for each in KVCacheLayout if each.is_block_contiguous} == set(transfer_rules.SPLITTABLE_LAYOUTS)
    for method in (*transfer_rules.HIDDEN_STATE_METHODS, "ngram", "draft_model", "medusa"):
        has_kv = SpeculativeConfig.use_eagle(SimpleNamespace(method=method))
        assert has_kv == (method in transfer_rules.HIDDEN_STATE_METHODS), method


SGLANG_PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"
SGLANG_PROGRAM = """
import json, sys
from types import SimpleNamespace
from sglang.srt.disaggregation.common.conn import CommonKVManager
from sglang.srt.disaggregation.nixl.conn import NixlKVManager

PAGE, BYTES = 16, 256

def refuses(heads, is_mla, prefill, decode):
    reached = set()
    for rank in range(decode):
        info = SimpleNamespace(attn_tp_size=prefill, attn_cp_size=1, pp_size=1, enable_kv_cache_sharding=False)
        receiver = SimpleNamespace(attn_tp_size=decode, is_mla_backend=is_mla, is_hybrid_mla_backend=False, pp_size=1,
                                   kv_args=SimpleNamespace(engine_rank=rank), attn_cp_size=1, attn_cp_rank=0, pp_rank=0)
        CommonKVManager._resolve_rank_mapping(receiver, info)
        reached.update(info.target_tp_ranks)
    if reached != set(range(prefill)):
        return True
    if is_mla or prefill == decode:
        return False
    item = [PAGE * BYTES * max(1, heads // size) for size in (prefill, decode)]
    sender = SimpleNamespace(
        attn_tp_size=prefill, prep_handle_slice_src=None, prep_handles_slice_dst={},
        kv_args=SimpleNamespace(page_size=PAGE, total_kv_head_num=heads, engine_rank=0, kv_item_lens=[item[0]],
                                kv_data_ptrs=[0, 1], kv_data_lens=[item[0] * 4], gpu_id=0),
        get_mha_kv_ptrs_with_pp=lambda src, dst: ([0], [1], [0], [1], 1),
        _prep_xfer_dlist=lambda *_: None, _pack_stride_descs=lambda runs: runs)
    peer = SimpleNamespace(decode_tp_size=decode, decode_tp_rank=0, dst_kv_item_len=item[1], dst_kv_ptrs=[0, 1],
                           dst_num_slots=4, gpu_id=0)
    try:
        NixlKVManager._init_hetero_tp_prep_handle(sender, "peer", peer)
    except AssertionError:
        return True
    return False

print(json.dumps([refuses(*case) for case in json.load(sys.stdin)]))
"""


@pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="there is no environment with SGLang: make setup-sglang")
def test_sglang_refuses_the_same_pairs_or_gets_them_wrong() -> None:
    shapes = [KvShape(96, heads, is_mla=is_mla, has_states=False) for heads in (1, 2, 8) for is_mla in (False, True)]
    cases = [(shape, sizes) for shape in shapes for sizes in pairs(shape)]
    done = subprocess.run(
        [SGLANG_PYTHON, "-c", SGLANG_PROGRAM],
        input=json.dumps([(shape.num_kv_heads, shape.is_mla, *sizes) for shape, sizes in cases]),
        env={**os.environ, "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [refuses("sglang", shape, pool(sizes[0]), pool(sizes[1])) for shape, sizes in cases]
    assert [case for case, our, their in zip(cases, ours, theirs, strict=True) if our != their] == []
    assert set(theirs) == {True, False}
