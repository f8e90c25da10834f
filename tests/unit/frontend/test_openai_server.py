"""What vLLM's server is told of a model, and which field is named when it refuses it."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import parse
from app.frontend.openai_server import _args_of_server
from app.preflight import REPOSITORY


def model(engine: str, **fields: Any) -> dict[str, Any]:
    return {"name": "tiny", "source": "baton:tiny", "decode": {"engine": engine}, **fields}


@pytest.mark.parametrize(
    ("engine", "engine_args", "told"),
    [
        ("vllm", {"max_model_len": 512, "block_size": 32}, {"max_model_len": 512, "block_size": 32}),
        ("sim", {"max_model_len": 512, "num_blocks": 8}, {"max_model_len": 512}),
        ("sim", {"max_model_len": None, "trust_remote_code": True}, {}),
        (
            "sglang",
            {"context_length": 512, "trust_remote_code": True, "page_size": 16},
            {"max_model_len": 512, "trust_remote_code": True},
        ),
        ("sglang", {"context_length": None, "max_model_len": 512}, {}),
    ],
)
def test_the_server_is_told_what_it_has_to_know(engine: str, engine_args: dict[str, Any], told: dict[str, Any]) -> None:
    (parsed,) = parse({"models": [model(engine, engine_args=engine_args)]}).models
    assert _args_of_server(parsed) == told


def test_the_decode_pools_arguments_count() -> None:
    fields = model("sglang", engine_args={"context_length": 512})
    fields["decode"]["engine_args"] = {"context_length": 256}
    assert _args_of_server(parse({"models": [fields]}).models[0]) == {"max_model_len": 256}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"server_args": {"tool_parser": "hermes"}}, "models.1.server_args.tool_parser"),
        ({"server_args": {"enable_auto_tool_choice": True}}, "models.1.server_args"),
    ],
    ids=["an unknown argument", "arguments that do not fit"],
)
def test_what_vllm_refuses_is_named_with_its_model(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    """In processes of their own, as vLLM changes the environment."""
    models = [model("sim"), {**copy.deepcopy(model("sglang")), "name": "other", **fields}]
    models[1]["decode"]["python"] = sys.executable
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [{"name": "baton", "args": {"models": models}}]}))
    command = [sys.executable, "-m", "app.cli.main", "check", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"baton: {named}: ")
