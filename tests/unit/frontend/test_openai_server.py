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


REFUSED: dict[str, dict[str, Any]] = {
    "models.1.server_args.tool_parser": {"server_args": {"tool_parser": "hermes"}},
    "models.1.server_args": {"server_args": {"enable_auto_tool_choice": True}},
}
"""Server arguments that vLLM does not know, or that do not fit, by what `baton check` has to name."""

CHECK_EACH = """
import sys
from app.cli.main import main
for path in sys.argv[1:]:
    sys.argv = ["baton", "check", path]
    try:
        main()
    except SystemExit as end:
        print(f"exit code {end.code}", file=sys.stderr)
"""


def test_what_vllm_refuses_is_named_with_its_model(tmp_path: Path) -> None:
    """In a process of its own, as vLLM changes the environment, and in one, as importing vLLM takes seconds."""
    paths = []
    for number, fields in enumerate(REFUSED.values()):
        models = [model("sim"), {**copy.deepcopy(model("sglang")), "name": "other", **fields}]
        models[1]["decode"]["python"] = sys.executable
        paths.append(tmp_path / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump({"applications": [{"name": "baton", "args": {"models": models}}]}))
    command = [sys.executable, "-c", CHECK_EACH, *map(str, paths)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("baton: ", "exit code"))]
    assert lines[1::2] == ["exit code 2"] * len(REFUSED), done.stderr
    for line, named in zip(lines[::2], REFUSED, strict=True):
        assert line.startswith(f"baton: {named}: ")
