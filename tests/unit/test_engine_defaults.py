"""The dtype of engines on a CPU: what the CPU can do, the same for all pools, and the user's word above it."""

from typing import Any

import pytest

from app.config import parse
from app.engine_defaults import cpu_dtype, takes_default_dtype, with_dtype


def cpuinfo(line: str) -> str:
    return f"processor\t: 0\nmodel name\t: Some CPU\n{line}\n\nprocessor\t: 1\n{line}\n"


@pytest.mark.parametrize(
    ("line", "dtype"),
    [
        ("flags\t\t: fpu sse4_2 avx2 fma", "float32"),
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni", "float32"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd i8mm bf16", "bfloat16"),
        ("Features\t: fp asimd", "float32"),
        ("bugs\t\t: avx512_bf16", "float32"),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(line: str, dtype: str) -> None:
    assert cpu_dtype(cpuinfo(line), {}) == dtype


def test_what_torch_may_not_use_does_not_count() -> None:
    able = cpuinfo("flags\t\t: avx512f avx512_bf16")
    assert cpu_dtype(able, {"ONEDNN_MAX_CPU_ISA": "avx2"}) == "float32"
    assert cpu_dtype(able, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}) == "bfloat16"


def model(engine: str = "vllm", **engine_args: Any) -> dict[str, Any]:
    pool = {"engine": engine}
    return {"name": engine, "source": "baton:tiny", "engine_args": engine_args, "prefill": pool, "decode": pool}


def test_all_pools_of_a_real_engine_get_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine_defaults.cpu_dtype", lambda: "float32")
    config = with_dtype(parse({"models": [model("vllm"), model("sglang"), model("sim")], "transfer": {}}), "cpu")
    found = [
        {model.merged_engine_args(pool).get("dtype") for pool in model.pools().values()} for model in config.models
    ]
    assert found == [{"float32"}, {"float32"}, {None}]


def test_a_gpu_and_engine_args_choose_for_themselves() -> None:
    config = parse({"models": [model(dtype="float16")], "transfer": {}})
    assert with_dtype(config, "cpu").models[0].engine_args == {"dtype": "float16"}
    config = parse({"models": [model()], "transfer": {}})
    assert with_dtype(config, "cuda") == config


@pytest.mark.parametrize(
    ("given", "expected"),
    [(model(), True), (model("sglang"), True), (model(dtype="auto"), False), (model("sim"), False)],
)
def test_whether_there_is_a_choice(given: dict[str, Any], expected: bool) -> None:
    assert takes_default_dtype(parse({"models": [given], "transfer": {}})) == expected
