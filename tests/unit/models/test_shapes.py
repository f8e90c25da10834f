"""Shapes: each is a folder that both engines accept, without weights and without a download."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from app.config import BatonConfig, parse
from app.errors import ConfigError
from app.models.shapes import PREFIX, SHAPES, ensure_shape
from app.models.tiny import VOCAB_SIZE
from app.preflight import check
from tests.conftest import REPOSITORY
from tests.unit.engines import forked

SGLANG_PYTHON = REPOSITORY / ".venv-sglang" / "bin" / "python"

REAL = {
    "llama-8b": (8_030_261_248, 128_256),
    "llama-70b": (70_553_706_496, 128_256),
    "qwen3-0.6b": (596_049_920, 151_936),
    "qwen3-8b": (8_190_735_360, 151_936),
}
"""The published numbers of parameters and of tokens of the real models: Llama 3.1 and 3.3, Qwen3."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def configured(source: str, engine: str = "vllm", **model: Any) -> BatonConfig:
    pool = {"engine": engine}
    pools: dict[str, Any] = {"prefill": pool, "decode": pool}
    return parse({"models": [{"name": "m", "source": source, **pools, **model}], "transfer": {}})


@pytest.mark.parametrize("source", SHAPES)
def test_a_shape_has_the_real_models_layers(source: str, home: Path) -> None:
    config: Any = AutoConfig.from_pretrained(ensure_shape(source, home))
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * heads * config.head_dim + 2 * hidden * kv * config.head_dim
    norms = 2 * hidden + (2 * config.head_dim if config.model_type == "qwen3" else 0)
    layer = attention + 3 * hidden * config.intermediate_size + norms
    parameters, vocabulary = REAL[source.removeprefix(PREFIX)]
    embeddings = vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    assert config.num_hidden_layers * layer + hidden + embeddings == parameters


@pytest.mark.parametrize("source", SHAPES)
def test_a_shape_is_config_and_tokenizer_and_the_same_each_time(source: str, home: Path) -> None:
    folder = ensure_shape(source, home)
    assert folder == ensure_shape(source, home)
    assert not [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    assert len(tokenizer) == config.vocab_size == VOCAB_SIZE
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (config.eos_token_id, config.pad_token_id)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_are_told_that_there_are_no_weights(engine: str) -> None:
    config = configured("baton:shape/llama-8b", engine)
    check(config, [])
    model = config.models[0]
    assert [model.merged_engine_args(pool) for pool in model.pools().values()] == [{"load_format": "dummy"}] * 2


@pytest.mark.parametrize(("source", "engine"), [("baton:tiny", "vllm"), ("baton:shape/llama-8b", "sim")])
def test_no_other_engine_is_told_so(source: str, engine: str) -> None:
    model = configured(source, engine).models[0]
    assert model.merged_engine_args(model.decode) == {}


@pytest.mark.parametrize("section", ["engine_args", "prefill.engine_args", "decode.engine_args"])
def test_weights_cannot_be_read_where_there_are_none(section: str) -> None:
    def with_format(load_format: str) -> BatonConfig:
        arguments: dict[str, Any] = {"engine_args": {"load_format": load_format}}
        return configured(
            "baton:shape/llama-8b", **({section.split(".")[0]: arguments} if "." in section else arguments)
        )

    check(with_format("dummy"), [])
    with pytest.raises(ConfigError, match="'safetensors' reads weights, and baton:shape/llama-8b has none") as caught:
        check(with_format("safetensors"), [])
    assert caught.value.field == f"models.0.{section}.load_format"


def test_an_unknown_shape_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        check(configured("baton:shape/llama-9b"), [])
    assert caught.value.field == "models.0.source"
    assert all(source in caught.value.problem for source in ("'baton:shape/llama-9b'", "baton:tiny", *SHAPES))


EXPECTED = {
    source: [config["max_position_embeddings"], config["num_hidden_layers"], 8, 128, VOCAB_SIZE, "dummy"]
    for source, config in SHAPES.items()
}


def test_vllm_accepts_each_shape_with_its_whole_context(home: Path) -> None:
    code = """
import json
from app.config import parse
from app.engines.base import EngineSpec
from app.engines.vllm import build_engine_args
from app.models.shapes import SHAPES
from app.models.source import local_path

def facts(source):
    model = parse({"models": [{"name": "m", "source": source, "decode": {}}]}).models[0]
    spec = EngineSpec(role="decode", is_disaggregated=False, replica_id="", model_path=local_path(source), device="cpu",
                      tensor_parallel_size=1, engine_args=model.merged_engine_args(model.decode))
    made = build_engine_args(spec).create_engine_config()
    model = made.model_config
    return [model.max_model_len, model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(),
            model.get_head_size(), model.get_vocab_size(), made.load_config.load_format]

print(json.dumps({source: facts(source) for source in SHAPES}))
"""
    assert forked.run(code, {"BATON_HOME": str(home)}) == EXPECTED


def test_blocks_are_large_where_kv_moves_between_gpus_unless_the_attention_needs_its_own(home: Path) -> None:
    latent = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **{"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1},
        **{
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 512,
        },
        **{"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
    }
    (home / "latent").mkdir(parents=True)
    (home / "latent" / "config.json").write_text(json.dumps(latent))
    code = """
import json, os
from app.engines.base import EngineSpec
from app.engines.vllm import build_engine_args
from app.models.source import local_path

def block_size(source, device="cuda", is_disaggregated=True, **engine_args):
    spec = EngineSpec(role="decode", is_disaggregated=is_disaggregated, replica_id="", model_path=source, device=device,
                      tensor_parallel_size=1, engine_args={"skip_tokenizer_init": True, **engine_args})
    return build_engine_args(spec).block_size

llama, latent = local_path("baton:shape/llama-8b"), os.environ["BATON_HOME"] + "/latent"
print(json.dumps({"large": [block_size(llama)],
                  "own": [block_size(llama, block_size=32), block_size(llama, "cpu"),
                          block_size(llama, is_disaggregated=False), block_size(latent)]}))
"""
    assert forked.run(code, {"BATON_HOME": str(home)}) == {"large": [128], "own": [32, None, None, None]}


@pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="there is no environment with SGLang: make setup-sglang")
def test_sglang_accepts_each_shape_with_its_whole_context(home: Path) -> None:
    code = """
import json
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.configs.model_config import ModelConfig
from app.models.shapes import SHAPES
from app.models.source import local_path

def facts(source):
    model = ModelConfig(local_path(source))
    return [model.context_len, model.num_hidden_layers, model.get_total_num_kv_heads(), model.head_dim,
            model.vocab_size, LoadFormat("dummy").value]

print(json.dumps({source: facts(source) for source in SHAPES}))
"""
    environment = {
        **os.environ,
        "BATON_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    done = subprocess.run([SGLANG_PYTHON, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == EXPECTED
