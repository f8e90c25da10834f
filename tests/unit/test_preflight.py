"""What is refused before any engine starts, given what the nodes have."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from app import preflight
from app.config import BatonConfig, PoolConfig, parse
from app.errors import ConfigError
from app.preflight import (
    check,
    check_address,
    check_interpreters,
    check_keys,
    choose_device,
    is_loopback,
    python_of_replica,
)


def configured(device: str = "auto", source: str = "baton:tiny", **pools: Any) -> BatonConfig:
    model = {"name": "tiny", "source": source, "prefill": {}, "decode": {}, **pools}
    return parse({"device": device, "models": [model], "transfer": {}})


@pytest.mark.parametrize(
    ("device", "gpus_per_node", "chosen"),
    [
        ("auto", [], "cpu"),
        ("auto", [0, 0], "cpu"),
        ("auto", [0, 4], "cuda"),
        ("cpu", [4], "cpu"),
        ("cuda", [], "cuda"),
        ("cuda", [0], "cuda"),
    ],
)
def test_the_device_is_what_is_configured_or_cuda_where_a_gpu_is(
    device: str, gpus_per_node: list[int], chosen: str
) -> None:
    assert choose_device(configured(device), gpus_per_node) == chosen
    assert check(configured(device), gpus_per_node) == chosen


@pytest.mark.parametrize("role", ["prefill", "decode", "aggregated"])
@pytest.mark.parametrize(
    ("device", "gpus_per_node", "wanted", "words"),
    [
        ("auto", [], 2, "2 GPUs are wanted, but the engines run on CPUs"),
        ("cpu", [8], 2, "set it to 1"),
        ("cuda", [1, 4, 4], 8, "8 GPUs are wanted, but no node has more than 4"),
    ],
)
def test_more_gpus_than_a_node_has_are_refused(
    role: str, device: str, gpus_per_node: list[int], wanted: int, words: str
) -> None:
    pools: dict[str, Any] = {role: {"tensor_parallel_size": wanted}}
    config = configured(device, **pools)
    with pytest.raises(ConfigError, match=words) as caught:
        check(config, gpus_per_node)
    assert caught.value.field == f"models.0.{role}.tensor_parallel_size"


@pytest.mark.parametrize("gpus_per_node", [[8], [], [0]], ids=["fits", "no node yet", "no GPU node yet"])
def test_gpus_that_fit_or_are_still_to_come_are_accepted(gpus_per_node: list[int]) -> None:
    config = configured("cuda", "baton:shape/llama-8b", decode={"tensor_parallel_size": 8})
    assert check(config, gpus_per_node) == "cuda"


def test_an_aggregated_configuration_is_checked_too() -> None:
    config = parse({"models": [{"name": "tiny", "source": "baton:tiny", "decode": {"tensor_parallel_size": 2}}]})
    with pytest.raises(ConfigError) as caught:
        check(config, [])
    assert caught.value.field == "models.0.decode.tensor_parallel_size"


@pytest.mark.parametrize("source", ["baton:tiny", "Qwen/Qwen3-0.6B"])
def test_the_tiny_model_and_hugging_face_ids_are_accepted(source: str) -> None:
    check(configured(source=source), [])


@pytest.mark.parametrize("source", ["{tmp}/model", "./model", "owner/model", "model", "~/model"])
def test_a_folder_with_a_model_is_accepted(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "model", tmp_path / "owner" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    check(configured(source=source.format(tmp=tmp_path)), [])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{tmp}/nothing", "does not exist"),
        ("./nothing", "does not exist"),
        ("~/nothing", "does not exist"),
        ("~nobody-has-this-name/model", "does not exist"),
        ("{tmp}/file", "does not exist"),
        ("{tmp}", "holds no config.json"),
        ("llama", "neither a folder, nor a Hugging Face id"),
        ("owner/name/more", "neither a folder, nor a Hugging Face id"),
        ("baton:large", "baton:tiny"),
    ],
)
def test_a_source_without_a_model_is_refused(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        check(configured(source=source.format(tmp=tmp_path)), [])
    assert caught.value.field == "models.0.source"


def test_the_error_names_the_model_that_cannot_work() -> None:
    models: list[dict[str, Any]] = [{"name": name, "source": "baton:tiny", "decode": {}} for name in ("a", "b", "c")]
    models[1]["decode"] = {"tensor_parallel_size": 2}
    with pytest.raises(ConfigError) as caught:
        check(parse({"models": models}), [])
    assert caught.value.field == "models.1.decode.tensor_parallel_size"


def test_the_gpus_of_all_pools_are_counted() -> None:
    check(configured(aggregated={}), [3])
    with pytest.raises(ConfigError, match="want 3 GPUs, but there are 2"):
        check(configured(aggregated={}), [2])


def test_the_gpus_of_all_models_are_counted() -> None:
    models: list[dict[str, Any]] = [{"name": name, "source": "baton:tiny", "decode": {}} for name in ("a", "b")]
    check(parse({"models": models}), [2])
    with pytest.raises(ConfigError, match="want 2 GPUs, but there are 1"):
        check(parse({"models": models}), [1])


def test_prefill_and_decode_compute_in_one_dtype() -> None:
    model = {"name": "m", "source": "baton:tiny", "engine_args": {"dtype": "float32"}, "prefill": {}, "decode": {}}
    check(parse({"models": [model], "transfer": {}}), [])
    model["decode"] = {"engine_args": {"dtype": "bfloat16"}}
    with pytest.raises(ConfigError, match="prefill has float32 and decode bfloat16") as caught:
        check(parse({"models": [model], "transfer": {}}), [])
    assert caught.value.field == "models.0.engine_args.dtype"


# Interpreters


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository without any environment, and a Python without SGLang."""
    monkeypatch.setattr(preflight, "REPOSITORY", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path


def make_python(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.chmod(mode)
    return path


def test_a_relative_python_counts_from_the_repository(repository: Path) -> None:
    assert python_of_replica(PoolConfig(python="env/bin/python")) == str(repository / "env/bin/python")
    assert python_of_replica(PoolConfig(python="/opt/bin/python")) == "/opt/bin/python"


@pytest.mark.parametrize("engine", ["vllm", "sim", "sglang"])
def test_by_default_only_sglang_runs_in_another_python_and_only_in_one_that_is_there(
    engine: Any, repository: Path
) -> None:
    pool = PoolConfig(engine=engine)
    assert python_of_replica(pool) is None
    python = make_python(repository / ".venv-sglang/bin/python")
    assert python_of_replica(pool) == (str(python) if engine == "sglang" else None)


@pytest.mark.parametrize("role", ["prefill", "decode", "aggregated"])
@pytest.mark.parametrize("python", [None, "env/bin/python", "/there/is/no/python", "env"])
def test_sglang_without_its_python_is_refused_with_how_to_make_it(
    role: str, python: str | None, repository: Path
) -> None:
    (repository / "env").mkdir()
    make_python(repository / "good/python")
    pools: dict[str, Any] = {
        name: {"engine": "sglang", "python": "good/python"} for name in ("prefill", "decode", "aggregated")
    }
    pools[role]["python"] = python
    with pytest.raises(ConfigError, match=r"`bash scripts/setup\.sh sglang` makes it") as caught:
        check_interpreters(configured(**pools))
    assert caught.value.field == f"models.0.{role}.python"
    assert (python or ".venv-sglang/bin/python") in caught.value.problem


def test_a_python_that_cannot_be_run_is_refused(repository: Path) -> None:
    make_python(repository / "python", 0o644)
    with pytest.raises(ConfigError, match="cannot be run") as caught:
        check_interpreters(configured(decode={"python": "python"}))
    assert "sglang" not in str(caught.value)


def test_a_python_that_is_there_is_accepted(repository: Path) -> None:
    make_python(repository / ".venv-sglang/bin/python")
    check_interpreters(configured(prefill={"engine": "sglang"}, decode={"engine": "sglang"}))
    check_interpreters(configured(decode={"python": str(make_python(repository / "other"))}))


def test_sglang_may_be_in_this_very_environment(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "sglang" else None)
    check_interpreters(configured(prefill={"engine": "sglang"}, decode={"engine": "sglang"}))


# Reasoning


def reasoning(engine: str, **engine_args: Any) -> BatonConfig:
    pool = {"engine": engine}
    return configured(prefill=pool, decode=pool, engine_args=engine_args, server_args={"reasoning_parser": "qwen3"})


def test_sglang_must_be_told_of_the_reasoning_parser_too() -> None:
    with pytest.raises(ConfigError, match="structured output would not wait") as caught:
        check(reasoning("sglang"), [])
    assert caught.value.field == "models.0.engine_args.reasoning_parser"


def test_each_sglang_pool_that_decodes_must_be_told() -> None:
    told = {"engine": "sglang", "engine_args": {"reasoning_parser": "qwen3"}}
    pools: dict[str, Any] = {
        "prefill": {"engine": "sglang"},
        "decode": told,
        "server_args": {"reasoning_parser": "qwen3"},
    }
    check(configured(**pools), [])
    check(configured(**pools, aggregated=told), [])
    with pytest.raises(ConfigError, match="structured output would not wait"):
        check(configured(**pools, aggregated={"engine": "sglang"}), [])


def test_arguments_of_an_aggregated_sim_engine_are_checked_too() -> None:
    pool = {"engine": "sim"}
    with pytest.raises(ConfigError) as caught:
        check(configured(prefill=pool, decode=pool, aggregated={**pool, "engine_args": {"blocks": 3}}), [])
    assert caught.value.field == "models.0.aggregated.engine_args.blocks"


def test_names_of_an_aggregated_engines_arguments_are_checked_too() -> None:
    model = configured(aggregated={"engine_args": {"max_model_len": 9, "max_model_length": 9}}).models[0]
    with pytest.raises(ConfigError, match="vLLM knows no such engine argument") as caught:
        preflight._check_names(0, model, {"max_model_len"}, "vLLM")
    assert caught.value.field == "models.0.aggregated.engine_args.max_model_length"


@pytest.mark.parametrize(("engine", "engine_args"), [("sglang", {"reasoning_parser": "qwen3"}), ("vllm", {})])
def test_a_reasoning_parser_that_the_engine_knows_is_accepted(engine: str, engine_args: dict[str, Any]) -> None:
    check(reasoning(engine, **engine_args), [])


def test_sglang_takes_one_nixl_backend() -> None:
    pool = {"engine": "sglang"}
    models: list[dict[str, Any]] = [{"name": "m", "source": "baton:tiny", "prefill": pool, "decode": pool}]
    with pytest.raises(ConfigError, match=r"transfer\.backends: SGLang takes one, and models\.0 runs it"):
        check(parse({"models": models, "transfer": {"backends": ["UCX", "GDS"]}}), [])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_on_loopback_no_keys_are_needed(host: str) -> None:
    assert is_loopback(host)
    check_address(configured(), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "baton.example", ""])
def test_where_others_reach_it_keys_are_needed_or_the_word_that_it_is_open(host: str) -> None:
    with pytest.raises(ConfigError, match=r"other machines reach it: .* security.open: true") as caught:
        check_address(configured(), host)
    assert caught.value.field == "security.keys"
    args = configured().model_dump(exclude_unset=True)
    check_address(parse({**args, "security": {"open": True}}), host)
    check_address(parse({**args, "security": {"keys": "keys.yaml"}}), host)


def test_without_http_nobody_reaches_it() -> None:
    check_address(configured(), None)


def test_keys_that_cannot_be_read_are_found_before_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    config = parse({**configured().model_dump(exclude_unset=True), "security": {"keys": str(path)}})
    with pytest.raises(ConfigError, match="No such file"):
        check_keys(config)
    path.write_text("tenants: [{name: a, keys: [x]}]")
    with pytest.raises(ConfigError, match=r"tenants\.0\.keys"):
        check_keys(config)
    path.write_text("tenants: [{name: a}]")
    check_keys(config)
    check_keys(configured())
