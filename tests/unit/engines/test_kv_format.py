"""Which replicas of two configurations or versions may move KV between them, in either direction."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from app.config import ModelConfig, PoolConfig
from app.engines.base import EngineInfo
from app.engines.kv_format import kv_format, mismatch
from app.messages import KvFormat

ENGINES = ("vllm", "sglang", "sim")


def format_of(
    engine: Any = "vllm",
    role: Any = "decode",
    *,
    source: str = "baton:tiny",
    arguments: dict[str, Any] | None = None,
    version: str = "1",
    block_size: int = 16,
    **pool: Any,
) -> KvFormat:
    """Of a replica of a model both pools of which are configured so."""
    pools = PoolConfig(engine=engine, **pool)
    model = ModelConfig(name="m", source=source, engine_args=arguments or {}, prefill=pools, decode=pools)
    info = EngineInfo(engine=engine, version=version, num_blocks=10, block_size_tokens=block_size, max_model_len=100)
    return kv_format(model, role, info)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_two_pools_of_a_model_fit(engine: Any) -> None:
    assert mismatch(format_of(engine, "prefill"), format_of(engine, "decode")) == ""


CHANGES: dict[str, dict[str, Any]] = {
    "engine_version": {"version": "2"},
    "model": {"source": "baton:small"},
    "dtype": {"arguments": {"dtype": "float16"}},
    "kv_cache_dtype": {"arguments": {"kv_cache_dtype": "fp8"}},
    "revision": {"arguments": {"revision": "main"}},
    "attention_backend": {"arguments": {"attention_backend": "FLASHINFER"}},
    "VLLM_KV_CACHE_LAYOUT": {"environment": {"VLLM_KV_CACHE_LAYOUT": "NHD"}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_replica_with_another_configuration_does_not_fit_in_either_order(name: str) -> None:
    old, new = format_of(), format_of(**CHANGES[name])
    for prefill, decode in ((old, new), (new, old)):
        assert f"KV of another kind: {name} is " in mismatch(prefill, decode)


@pytest.mark.parametrize("engine", ["sglang", "sim"])
def test_another_engine_does_not_fit(engine: Any) -> None:
    assert "engine is" in mismatch(format_of(engine), format_of())
    assert "engine is" in mismatch(format_of(), format_of(engine))


def test_what_a_setting_is_by_default_may_be_said() -> None:
    assert mismatch(format_of(arguments={"dtype": "auto"}), format_of()) == ""


def test_what_does_not_concern_the_kv_may_differ() -> None:
    new = format_of(arguments={"max_num_seqs": 7, "gpu_memory_utilization": 0.5}, environment={"A": "1"})
    assert mismatch(format_of(), new) == mismatch(new, format_of()) == ""


@pytest.mark.parametrize(
    ("prefill", "decode", "fits"), [(1, 2, True), (4, 2, True), (2, 3, False), (3, 2, False), (2, 2, True)]
)
def test_gpus_fit_as_between_the_pools_of_a_configuration(prefill: int, decode: int, fits: bool) -> None:
    found = mismatch(format_of(tensor_parallel_size=prefill), format_of(tensor_parallel_size=decode))
    assert found == (
        "" if fits else f"KV of another kind: tensor_parallel_size is {prefill} at prefill and {decode} at decode"
    )


@pytest.mark.parametrize(
    ("engine", "prefill", "decode", "fits"),
    [("vllm", 16, 32, True), ("vllm", 32, 16, False), ("sglang", 16, 32, False), ("sim", 32, 16, False)],
)
def test_only_vllms_decode_takes_smaller_blocks(engine: Any, prefill: int, decode: int, fits: bool) -> None:
    found = mismatch(format_of(engine, block_size=prefill), format_of(engine, block_size=decode))
    assert found == (
        "" if fits else f"KV of another kind: block_size_tokens is {prefill} at prefill and {decode} at decode"
    )


def test_another_protocol_does_not_fit() -> None:
    new = msgspec.structs.replace(format_of(), protocol=3)
    assert "protocol is 2 at prefill and 3 at decode" in mismatch(format_of(), new)
    assert "protocol is 3 at prefill and 2 at decode" in mismatch(new, format_of())


def test_a_replica_that_does_not_say_it_does_not_fit() -> None:
    assert "older version" in mismatch(None, format_of())
