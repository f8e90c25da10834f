"""What is refused before any engine starts, given what the nodes have."""

from pathlib import Path
from typing import Any

import pytest

from app.config import BatonConfig, parse
from app.errors import ConfigError
from app.preflight import check, choose_device


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
def test_the_device_is_what_is_configured_or_cuda_where_a_gpu_is(device: str, gpus_per_node: list[int], chosen: str):
    assert choose_device(configured(device), gpus_per_node) == chosen
    assert check(configured(device), gpus_per_node) == chosen


@pytest.mark.parametrize("role", ["prefill", "decode"])
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
):
    config = configured(device, **{role: {"tensor_parallel_size": wanted}})
    with pytest.raises(ConfigError, match=words) as caught:
        check(config, gpus_per_node)
    assert caught.value.field == f"models.0.{role}.tensor_parallel_size"


@pytest.mark.parametrize("gpus_per_node", [[8], [], [0]], ids=["fits", "no node yet", "no GPU node yet"])
def test_gpus_that_fit_or_are_still_to_come_are_accepted(gpus_per_node: list[int]):
    assert check(configured("cuda", decode={"tensor_parallel_size": 8}), gpus_per_node) == "cuda"


def test_an_aggregated_configuration_is_checked_too():
    config = parse({"models": [{"name": "tiny", "source": "baton:tiny", "decode": {"tensor_parallel_size": 2}}]})
    with pytest.raises(ConfigError) as caught:
        check(config, [])
    assert caught.value.field == "models.0.decode.tensor_parallel_size"


@pytest.mark.parametrize("source", ["baton:tiny", "Qwen/Qwen3-0.6B"])
def test_the_tiny_model_and_hugging_face_ids_are_accepted(source: str):
    check(configured(source=source), [])


@pytest.mark.parametrize("source", ["{tmp}/model", "./model", "owner/model", "model", "~/model"])
def test_a_folder_with_a_model_is_accepted(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
def test_a_source_without_a_model_is_refused(source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=words) as caught:
        check(configured(source=source.format(tmp=tmp_path)), [])
    assert caught.value.field == "models.0.source"
