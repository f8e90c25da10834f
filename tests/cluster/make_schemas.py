"""Makes the files in schemas/, from what schemas/README.md names; no test runs this.

    python -m tests.cluster.make_schemas crd ray.io_rayservices.yaml v1
    python -m tests.cluster.make_schemas typescript PACKAGE karpenter.sh/v1/NodePool ...

A custom resource definition is taken as it is, without its descriptions.  The npm packages carry validators that are
compiled from the resources' Go types, and beside them declarations in TypeScript: those are translated, which keeps
names, types, what is required and enumerations, and loses patterns.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.manifests import SCHEMAS, core_definitions, schema_path

Schema = dict[str, Any]
SCALARS = {"string": "string", "number": "number", "boolean": "boolean"}


def from_crd(path: Path, version: str) -> None:
    """The schema of one version of a custom resource definition."""
    crd = yaml.safe_load(path.read_text())
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    (schema,) = (each["schema"]["openAPIV3Schema"] for each in crd["spec"]["versions"] if each["name"] == version)
    schema["properties"]["metadata"] = _core("IIoK8sApimachineryPkgApisMetaV1ObjectMeta")
    _write(f"{group}/{version}", kind, _closed(schema))


def _closed(schema: Any) -> Any:
    """As the API server takes it with strict field validation: what is not among `properties` is unknown."""
    if not isinstance(schema, dict):
        return schema
    closed: Schema = {}
    for key, value in schema.items():
        if key == "properties":
            closed[key] = {name: _closed(each) for name, each in value.items() if name != "status"}
        elif key in ("items", "additionalProperties"):
            closed[key] = _closed(value)
        elif key in ("anyOf", "allOf", "oneOf"):
            closed[key] = [_closed(each) for each in value]
        elif key not in ("description", "default", "x-kubernetes-validations"):
            closed[key] = value
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not keeps_unknown:
        closed["additionalProperties"] = False
    return closed


class Declarations:
    """The TypeScript declarations of one npm package, read as schemas."""

    def __init__(self, package: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in package.rglob("*.d.ts"):
            if exported := re.search(r"^export type \{ I\w+ as (I\w+)", path.read_text(), re.MULTILINE):
                self._files[exported[1]] = path

    def schema_of(self, path: Path) -> Schema:
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        if body := re.search(r"^export declare class [^{]*\{(.*?)^\}", text, re.MULTILINE | re.DOTALL):
            return self._object(_tokens(body[1].split("    constructor(")[0].split("    static ")[0]))
        alias = re.search(r"^export type I\w+ = (.*?);$", text, re.MULTILINE | re.DOTALL)
        if alias is None:
            raise ValueError(f"{path}: neither a class nor a type")
        return self._type(_tokens(alias[1]))

    def _object(self, tokens: Iterator[str]) -> Schema:
        """Fields up to a closing brace: ``"name"?: type;`` or ``[key: string]: type;``."""
        schema: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
        required = []
        for name in tokens:
            if name == "}":
                break
            if name == "[":
                _skip(tokens, "]")
                _skip(tokens, ":")
                schema["additionalProperties"] = self._type(tokens)
                continue
            is_optional = next(tokens) == "?"
            if is_optional:
                _skip(tokens, ":")
            else:
                required.append(json.loads(name))
            schema["properties"][json.loads(name)] = self._type(tokens)
        schema["properties"].pop("status", None)
        return schema | ({"required": required} if required else {})

    def _type(self, tokens: Iterator[str]) -> Schema:
        """One type, up to the semicolon or bracket after it."""
        choices: list[Any] = []
        schema: Schema = {}
        for token in tokens:
            if token in (";", ">"):
                break
            if token == "{":
                schema = self._object(tokens)
            elif token == "Array":
                _skip(tokens, "<")
                schema = {"type": "array", "items": self._type(tokens)}
            elif token[0] in '"0123456789':
                choices.append(json.loads(token))
            elif token in SCALARS:
                schema = {"type": SCALARS[token]}
            elif token != "|":
                schema = self.schema_of(self._files[token]) if token in self._files else _core(token)
        return {"enum": choices} if choices else schema


def _tokens(text: str) -> Iterator[str]:
    return iter(re.findall(r'"(?:[^"\\]|\\.)*"|\w+|[^\s\w]', text))


def _skip(tokens: Iterator[str], until: str) -> None:
    while next(tokens) != until:
        pass


def _core(name: str) -> Schema:
    """A type of Kubernetes itself, out of kubernetes-validate, with what it refers to put in."""
    definitions = core_definitions()
    wanted = name.removeprefix("I").lower()
    found = next((each for key, each in definitions.items() if re.sub(r"[.-]", "", key).lower() == wanted), None)
    if found is None:
        raise ValueError(f"{name}: neither declared in the package nor a type of Kubernetes")

    def resolve(schema: Any) -> Any:
        if isinstance(schema, list):
            return [resolve(each) for each in schema]
        if not isinstance(schema, dict):
            return schema
        if reference := schema.get("$ref"):
            return resolve(definitions[reference.rsplit("/", 1)[1]])
        properties = {field: resolve(each) for field, each in schema.get("properties", {}).items()}
        rest = {
            key: resolve(each)
            for key, each in schema.items()
            if key not in ("properties", "description", "default") and not key.startswith("x-")
        }
        return rest | ({"properties": properties} if properties else {})

    return dict(resolve(found))


def _write(api_version: str, kind: str, schema: Schema) -> None:
    SCHEMAS.mkdir(exist_ok=True)
    schema_path(api_version, kind).write_text(json.dumps(schema, separators=(",", ":"), sort_keys=True) + "\n")


def main(how: str, source: str, *names: str) -> None:
    if how == "crd":
        from_crd(Path(source), *names)
        return
    declarations = Declarations(Path(source))
    for name in names:
        api_version, _, kind = name.rpartition("/")
        _write(api_version, kind, declarations.schema_of(Path(source, f"{name}.d.ts")))


if __name__ == "__main__":
    main(*sys.argv[1:])
