"""The ``baton`` command: what is wrong is one line that names the field, and exit code 2."""

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from app.cli.check import check_document, http_options
from app.cli.run import _say_dashboard, _say_ready, describe_device
from app.serve_document import load_document
from app.tenants import digest, parse_tenants
from tests.conftest import REPOSITORY

VALID: dict[str, Any] = {
    "applications": [
        {
            "name": "baton",
            "import_path": "deployments.build:build",
            "args": {
                "models": [{"name": "tiny", "source": "baton:tiny", "prefill": {}, "decode": {}}],
                "transfer": {},
            },
        }
    ]
}


@pytest.fixture(autouse=True)
def without_a_model_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)


@pytest.fixture
def run(baton_command: Any) -> Any:
    """Run the command in this process; returns its exit code and what it wrote to stderr."""

    def run(*arguments: str) -> tuple[object, str]:
        code, _, said = baton_command(*arguments)
        return code, said

    return run


def model_with(**changes: Any) -> str:
    document = copy.deepcopy(VALID)
    document["applications"][0]["args"]["models"][0].update(changes)
    return yaml.safe_dump(document)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (model_with(decode={"replica": 1}), "models.0.decode.replica"),
        (model_with(decode={"tensor_parallel_size": 512}), "models.0.decode.tensor_parallel_size"),
        (model_with(source="/there/is/no/model"), "models.0.source"),
        (model_with(source="llama"), "models.0.source"),
        ("applications: [{name: baton}]", "models"),
        ("applications: [{name: baton, args: 5}]", "args"),
    ],
)
def test_a_configuration_that_cannot_work_is_one_line_that_names_the_field(
    run: Any, tmp_path: Path, text: str, field: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    code, said = run("check", str(path))
    assert code == 2
    assert said.startswith(f"baton: {field}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"applications: [", "is not YAML"),
        (b"\xff\xfe\x00", "config.yaml"),
        (b"", "has no `applications`"),
        (b"[1, 2]", "has no `applications`"),
        (b"applications: []", "has no `applications`"),
        (b"applications: [5]", "applications"),
        (b"applications: {name: baton}", "applications"),
    ],
    ids=["missing", "no YAML", "no text", "empty", "a list", "no application", "a number", "a mapping"],
)
def test_a_file_that_is_no_serve_config_is_one_line_that_names_the_file(
    run: Any, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    code, said = run("check", str(path))
    assert code == 2
    assert said.startswith(f"baton: {path}: ")
    assert words in said
    assert said.count("\n") == 1


def test_model_in_the_environment_replaces_the_configured_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(VALID))
    monkeypatch.setenv("MODEL", "/there/is/no/model")
    code, said = run("check", str(path))
    assert code == 2
    assert "models.0.source: the folder '/there/is/no/model' does not exist" in said


@pytest.mark.parametrize(
    "text",
    ["applications: [{name: baton}]", "applications: [{name: baton, args: {models: []}}]"],
    ids=["no args", "no model"],
)
def test_model_in_the_environment_needs_a_configuration_with_a_model(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    monkeypatch.setenv("MODEL", "baton:tiny")
    code, said = run("check", str(path))
    assert code == 2
    assert "models" in said


def several_models() -> str:
    document = copy.deepcopy(VALID)
    models = document["applications"][0]["args"]["models"]
    models.append({"name": "other", "source": "baton:tiny", "decode": {}})
    return yaml.safe_dump(document)


def test_model_in_the_environment_needs_a_configuration_with_one_model(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(several_models())
    monkeypatch.setenv("MODEL", "baton:tiny")
    code, said = run("check", str(path))
    assert code == 2
    assert (
        said == "baton: models: MODEL=baton:tiny replaces the model of a configuration that has one, and here are 2\n"
    )


def test_all_models_are_named_when_they_serve() -> None:
    said = io.StringIO()
    document = yaml.safe_load(several_models())
    _say_ready(document, http_options(document, port=8123), Console(file=said, width=200), 5.0)
    assert "Baton serves tiny, other at http://127.0.0.1:8123" in said.getvalue()
    assert '"model": "tiny"' in said.getvalue()


@pytest.mark.parametrize(("mode", "asks"), [("token", True), ("disabled", False)])
def test_run_says_how_to_get_into_rays_dashboard(mode: str, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    said = io.StringIO()
    _say_dashboard("127.0.0.1:8265", Console(file=said, width=20))
    assert "http://127.0.0.1:8265" in said.getvalue()
    assert ("ray get-auth-token" in said.getvalue()) is asks


@pytest.mark.parametrize(
    ("dtype", "engine_args", "said"),
    [
        ("float32", {}, "cpu with float32: this CPU emulates bfloat16 (no GPU found)"),
        ("bfloat16", {}, "cpu with bfloat16 (no GPU found)"),
        ("float32", {"dtype": "bfloat16"}, "cpu (no GPU found)"),
    ],
)
def test_run_says_what_engines_compute_in(
    monkeypatch: pytest.MonkeyPatch, dtype: str, engine_args: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("app.cli.run.cpu_dtype", lambda: dtype)
    assert describe_device(yaml.safe_load(model_with(engine_args=engine_args)), "cpu") == said


# baton environments


@pytest.mark.parametrize(("engine", "printed"), [("vllm", ""), ("sim", ""), ("sglang", "sglang\n")])
def test_environments_names_what_the_engines_need(
    baton_command: Any, tmp_path: Path, engine: str, printed: str
) -> None:
    document = yaml.safe_load(several_models())
    document["applications"][0]["args"]["models"][1]["decode"]["engine"] = engine
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    assert baton_command("environments", path) == (0, printed, "")


def test_environments_imports_neither_ray_nor_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(model_with(prefill={"engine": "sglang"}, decode={"engine": "sglang"}))
    command = [sys.executable, "-X", "importtime", "-m", "app.cli.main", "environments", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "sglang\n"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "app.cli.run" in imported
    assert not imported & {"ray", "torch", "transformers", "vllm", "sglang"}


def test_environments_refuses_a_broken_configuration(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(model_with(decode={"engines": "sglang"}))
    code, said = run("environments", str(path))
    assert code == 2
    assert said == "baton: models.0.decode.engines: unknown key; see app/config.py for those that exist\n"


def test_check_wants_the_python_of_sglang_unless_another_cluster_has_it(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    pool = {"engine": "sglang", "python": "/there/is/no/python"}
    path.write_text(model_with(prefill=pool, decode=pool))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, said = run("check", str(path))
    assert code == 2
    assert said.startswith("baton: models.0.prefill.python: /there/is/no/python does not exist")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    check_document(load_document(path))


@pytest.mark.parametrize("command", ["run", "check"])
def test_whoever_comes_is_served_only_if_the_configuration_says_so(run: Any, tmp_path: Path, command: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(model_with())
    code, said = run(command, str(path), "--host", "0.0.0.0")
    assert code == 2
    assert said.startswith("baton: security.keys: missing, but Baton would listen at 0.0.0.0")


def test_where_serve_listens() -> None:
    document = {"http_options": {"host": "0.0.0.0", "port": 1, "root_path": "/x"}}
    assert http_options({}) == {"host": "127.0.0.1", "port": 8000}
    assert http_options(document) == document["http_options"]
    assert http_options(document, "::1", 2) == {"host": "::1", "port": 2, "root_path": "/x"}


def test_a_key_and_its_entry_are_made(baton_command: Any) -> None:
    code, entry, said = baton_command("key", "ops", "--admin")
    assert code == 0
    (tenant,) = parse_tenants(f"tenants:\n{entry}")
    assert (tenant.name, tenant.admin) == ("ops", True)
    assert tenant.keys == [digest(said.split()[-1].encode()).hex()]


def test_a_key_for_nobody_is_refused(run: Any) -> None:
    assert run("key", "a b") == (2, "baton: TENANT: 'a b' is no name: 1 to 64 letters, digits and . _ -\n")


@pytest.mark.parametrize("command", ["run", "check", "environments", "verify", "key"])
def test_an_unknown_option_is_refused(run: Any, command: str) -> None:
    code, said = run(command, "--no-such-option")
    assert code == 2
    assert "--no-such-option" in said


def test_verify_says_that_nothing_answers(run: Any) -> None:
    code, said = run("verify", "--url", "http://127.0.0.1:1")
    assert code == 2
    assert "http://127.0.0.1:1 does not answer" in said


def test_it_runs_as_a_module_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli.main", "check", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == f"baton: {tmp_path / 'none.yaml'}: No such file or directory\n"
