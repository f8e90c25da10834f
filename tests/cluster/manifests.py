"""Renders the manifests under cluster/ and validates each object as a Kubernetes API server would.

Strictly: a field that the API does not know is an error.  Not checked: rules in CEL, and what admission webhooks say.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend
from referencing import Registry, Resource

CLUSTER = Path(__file__).parents[2] / "cluster"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "v1.33.0"
"""Whose schemas of the core objects are taken; what cluster/ uses has been there since 1.29."""

Object = dict[str, Any]


def render(folder: Path) -> list[Object]:
    """What ``kubectl apply -k`` would send."""
    return load(kustomize(folder))


def kustomize(folder: Path) -> str:
    """What ``kubectl kustomize`` prints.  Fails the test if it refuses, or is not there."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.fail("kubectl is not installed, and it renders cluster/: install it (1.30 or newer; Debian: kubectl)")
    command = [kubectl, "kustomize", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if answer.returncode or answer.stderr:  # it warns there of what is deprecated
        pytest.fail(f"kubectl kustomize {folder}: {answer.stderr.strip()}")
    return answer.stdout


def load(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def validate(thing: Object) -> list[str]:
    """What an API server would refuse of one object, a line each: kind, name, field and what is wrong with it."""
    about = f"{thing.get('kind')} {thing.get('metadata', {}).get('name')}"
    try:
        validator = _validator(thing["apiVersion"], thing["kind"])
    except KeyError as error:
        return [f"{about}: {error.args[0]} is missing"]
    except FileNotFoundError:
        return [f"{about}: no schema of {thing['apiVersion']} {thing['kind']} in tests/cluster/schemas"]
    problems = validator.iter_errors(thing)
    return sorted({f"{about}: {_field(leaf)}: {_message(leaf)}" for each in problems for leaf in _leaves(each)})


def schema_path(api_version: str, kind: str) -> Path:
    """Where the schema of a custom resource is kept."""
    return SCHEMAS / f"{api_version.replace('/', '_')}_{kind}.json"


@functools.cache
def core_definitions() -> dict[str, Any]:
    """The types of Kubernetes' own objects, by name."""
    return dict(_core_schema("_definitions")["$defs"])


def _field(error: ValidationError) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return path.lstrip(".") or "(object)"


def _message(error: ValidationError) -> str:
    if error.validator != "additionalProperties":
        return str(error.message)
    unknown = sorted(set(error.instance) - set(error.schema["properties"]))
    return f"unknown field {', '.join(unknown)}"


def _leaves(error: ValidationError) -> Iterator[ValidationError]:
    """Of a choice between schemas, the complaints of the one that got furthest."""
    if not error.context:
        yield error
        return
    deepest = max(len(inner.absolute_path) for inner in error.context)
    for inner in error.context:
        if len(inner.absolute_path) == deepest:
            yield from _leaves(inner)


@functools.cache
def _validator(api_version: str, kind: str) -> Any:
    if (path := schema_path(api_version, kind)).is_file():
        return _Validator(json.loads(path.read_text()))
    group, _, version = api_version.rpartition("/")
    schema = _core_schema("-".join([kind.lower(), *filter(None, [group.split(".")[0]]), version]))
    definitions = Resource.from_contents(_core_schema("_definitions"))
    return _Validator(schema, registry=definitions @ Registry())


@functools.cache
def _core_schema(name: str) -> Any:
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    return json.loads((folder / f"{name}.json").read_text())


def _unique_by_keys(_: Any, keys: list[str], items: Any, schema: Object) -> Iterator[ValidationError]:
    """Lists that are maps to the API server, e.g. of ports: it refuses two entries with the same keys."""
    seen: set[tuple[Any, ...]] = set()
    for item in items if isinstance(items, list) else []:
        key = tuple(item.get(name) for name in keys)
        if key in seen:
            yield ValidationError(f"there twice: {dict(zip(keys, key, strict=True))}")
        seen.add(key)


_Validator = extend(Draft202012Validator, {"x-kubernetes-list-map-keys": _unique_by_keys})
