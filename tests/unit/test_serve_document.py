"""`baton edit`: single values of a Serve config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ConfigError
from app.serve_document import configs, edited, parse_change

DOCUMENT: dict[str, Any] = {
    "http_options": {"port": 8000},
    "applications": [
        {
            "name": "baton",
            "import_path": "deployments.build:build",
            "args": {
                "device": "cuda",  # where this is edited there is none
                "models": [
                    {"name": "tiny", "source": "baton:tiny", "prefill": {}, "decode": {"tensor_parallel_size": 8}}
                ],
                "transfer": None,
            },
        }
    ],
}


def args_after(*changes: str) -> dict[str, Any]:
    found: dict[str, Any] = edited(DOCUMENT, [parse_change(change) for change in changes])["applications"][0]["args"]
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "serve config.yaml"
    path.write_text("# not kept\n" + yaml.safe_dump(DOCUMENT))
    return path


def test_values_are_replaced_and_added() -> None:
    args = args_after(
        "models.0.decode.replicas=2", "models.0.source=Qwen/Qwen3-0.6B", "frontend.resources.num_cpus=0.5", "device=cpu"
    )
    (model,) = args["models"]
    assert model == {**DOCUMENT["applications"][0]["args"]["models"][0], **model}
    assert (model["source"], model["decode"]) == ("Qwen/Qwen3-0.6B", {"tensor_parallel_size": 8, "replicas": 2})
    assert args["frontend"] == {"resources": {"num_cpus": 0.5}}
    assert args["device"] == "cpu"


def test_a_section_that_is_null_becomes_one() -> None:
    assert args_after("transfer.backends=[UCX, GDS]")["transfer"] == {"backends": ["UCX", "GDS"]}


def test_values_are_yaml_and_may_have_anything_in_them() -> None:
    changes = {"a=null": None, "a=": None, "a='1'": "1", "a=x=y": "x=y", "a={b: [1, é]}": {"b": [1, "é"]}}
    assert {change: args_after(change)["a"] for change in changes} == changes


def test_the_document_stays_as_it_was() -> None:
    before = copy.deepcopy(DOCUMENT)
    args_after("models.0.decode.replicas=2", "transfer={}")
    assert before == DOCUMENT


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ("models.1.name=x", "models.1", "has 1 entries, counted from 0"),
        ("models.1=x", "models.1", "has 1 entries, counted from 0"),
        ("models.-1.name=x", "models.-1", "counted from 0"),
        ("models.first.name=x", "models.first", "counted from 0"),
        ("models.0.name.first=x", "models.0.name.first", "a value above it"),
        ("models.0.name.first.of=x", "models.0.name.first", "a value above it"),
        ("models", "models", "say PATH=VALUE"),
        ("=3", "=3", "say PATH=VALUE"),
        ("device=[", "device", "'[' is not YAML"),
    ],
)
def test_a_path_that_leads_nowhere(change: str, field: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        args_after(change)
    assert caught.value.field == field
    assert words in caught.value.problem


def test_with_several_applications_which_one_is_not_known() -> None:
    with pytest.raises(ConfigError, match="applications: there are 2"):
        edited({"applications": [{}, {}]}, [("device", "cpu")])


def test_the_whole_configuration_is_printed(baton_command: Any, path: Path) -> None:
    before = path.read_text()
    code, said, _ = baton_command("edit", path, "models.0.decode.replicas=2", "transfer={}")
    assert code == 0
    document = yaml.safe_load(said)
    assert document["http_options"] == DOCUMENT["http_options"]
    assert document["applications"][0]["args"]["models"][0]["decode"]["replicas"] == 2
    assert list(document["applications"][0]) == list(yaml.safe_load(before)["applications"][0])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("transfer={}", "models.0.decode.replica=2"), "models.0.decode.replica: unknown key"),
        (("models.0.decode.replicas=2",), "transfer: missing, but models.0.prefill is set"),
        (
            ("transfer={}", "models.0.decode.autoscaling={min_replicas: 3, max_replicas: 2}"),
            "models.0.decode.autoscaling: max_replicas (2)",
        ),
    ],
)
def test_what_cannot_work_is_not_printed(baton_command: Any, path: Path, changes: tuple[str, ...], words: str) -> None:
    code, out, said = baton_command("edit", path, *changes)
    assert (code, out) == (2, "")
    assert said.startswith(f"baton: {words}")
    assert said.count("\n") == 1


def test_an_import_path_from_before_0_1_0_is_named() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["applications"][0]["import_path"] = "app.build:build"
    with pytest.raises(ConfigError, match=r"applications\.0\.import_path: is deployments\.build:build now"):
        configs(document)
