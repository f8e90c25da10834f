"""Who imports whom, and where an upstream's private names stand: mostly read from the source.

A violation is a line of this product's code: the message names file and line, and the rule says what to do instead.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PRODUCT = ("app", "deployments", "cluster")
UPSTREAM = ("ray", "vllm", "sglang", "nixl", "nixl_cu12", "nixl_cu13", "prometheus_fastapi_instrumentator")

ADAPTERS = (
    "app/engines/vllm.py",
    "app/engines/sglang.py",
    "app/engines/sglang_sampling.py",
    "app/engines/*_surface.py",
    "app/engines/plugins/*.py",
)
SURFACES = (
    *ADAPTERS,
    "app/engines/ucx.py",
    "app/frontend/*_surface.py",
    "app/bench/vllm_client.py",
    "deployments/serve_hooks.py",
)
"""Where private names of an upstream may stand, and its modules may be changed."""


@cache
def parse(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(), path)


@cache
def files(*roots: str) -> tuple[str, ...]:
    found = (path for root in roots for path in sorted((REPOSITORY / root).rglob("*.py")))
    return tuple(path.relative_to(REPOSITORY).as_posix() for path in found)


def is_one_of(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


# Private names


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of everything that reaches into another package or object, or changes one."""
    upstream = names_from_upstream(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                private = [alias.name for alias in names if any(map(is_private, alias.name.split(".")))]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                where = module.split(".")
                private = [f"{module}.{alias.name}" for alias in names if any(map(is_private, (*where, alias.name)))]
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                private = []
            case ast.Attribute(attr=attribute) if is_private(attribute):
                private = [ast.unparse(node)]
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" as name), args=[target, key, *_]):
                by_name = isinstance(key, ast.Constant) and is_private(str(key.value)) and not is_own(target)
                changed = name == "setattr" and root(target) in upstream
                private = [ast.unparse(node)] if by_name or changed else []
            case ast.Assign(targets=targets):
                private = [ast.unparse(target) for target in targets if is_change(target, upstream)]
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                private = [ast.unparse(target)] if is_change(target, upstream) else []
            case _:
                private = []
        if isinstance(node, ast.Call):
            private += [f"{keyword.arg}=" for keyword in node.keywords if keyword.arg and is_private(keyword.arg)]
        yield from ((getattr(node, "lineno", 0), text) for text in private)
    yield from inherited_private_uses(tree)


def inherited_private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private attributes of ``self`` that no class of the product defines: a base class of an upstream has them."""
    own = own_private_names() | private_definitions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_own(node.value) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, ast.unparse(node)


@cache
def own_private_names() -> frozenset[str]:
    return frozenset().union(*(private_definitions(parse(path)) for path in files("app", "deployments")))


def private_definitions(tree: ast.Module) -> frozenset[str]:
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return frozenset(filter(is_private, names))


def names_from_upstream(tree: ast.Module) -> set[str]:
    """What the module's imports from an upstream package are called in it."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found = [alias for alias in aliases if alias.name.split(".")[0] in UPSTREAM]
                names |= {alias.asname or alias.name.split(".")[0] for alias in found}
            case ast.ImportFrom(module=str(module), names=aliases) if module.split(".")[0] in UPSTREAM:
                names |= {alias.asname or alias.name for alias in aliases}
    return names


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root(node: ast.expr) -> str:
    """The name that an expression like ``a.b[c].d`` begins with; empty if it begins with something else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_change(target: ast.expr, upstream: set[str]) -> bool:
    return isinstance(target, ast.Attribute | ast.Subscript) and root(target) in upstream


def test_private_names_of_upstreams_stand_in_one_module_for_each() -> None:
    """Give it a name of its own in the module of SURFACES for that upstream, with a check there and a canary."""
    found = [
        f"{path}:{line}: {text}"
        for path in files(*PRODUCT)
        if not is_one_of(path, SURFACES)
        for line, text in private_uses(parse(path))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "from ray.serve.context import _get_global_client",
        "from ray.serve._private.common import DeploymentID",
        "import ray._raylet",
        "def f(handle): return handle.options(_by_reference=True)",
        "def f(client): return client._controller",
        "def f(deployment): deployment._deployment_config = 1",
        "def f(x): return getattr(x, '_controller')",
        "from vllm.parser import metrics\nmetrics.model_name = 'tiny'",
        "from vllm.benchmarks import serve as client\nclient.FUNCTIONS['mine'] = len",
        "import vllm\nsetattr(vllm.envs, 'NAME', 1)",
        "class Router(RequestRouter):\n    def f(self): return self._deployment_id",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert list(private_uses(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def __init__(self): self._x = self.__class__.__name__\n    def y(self): return self._x",
        "from app.routing.router import Router\nRouter.limit = 1",
        "def f(_): return getattr(_, 'name')",
    ],
)
def test_what_is_no_private_name_of_others_is_not_reported(source: str) -> None:
    assert not list(private_uses(ast.parse(source)))


# Imports


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def modules() -> frozenset[str]:
    return frozenset(map(module_name, files("app", "deployments", "benchmarks", "cluster", "tests")))


@cache
def imports(path: str) -> tuple[tuple[int, str], ...]:
    """Line and name of each module that a file imports, in functions too, but not for type checkers alone."""
    return tuple(imports_of(parse(path)))


def imports_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                continue
            case ast.Import(names=aliases):
                yield from ((child.lineno, alias.name) for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases, level=0):
                for alias in aliases:
                    submodule = f"{module}.{alias.name}"
                    yield child.lineno, submodule if submodule in modules() else module
            case _:
                yield from imports_of(child)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def violations(importers: tuple[str, ...], imported: tuple[str, ...], but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path}:{line}: {module}"
        for path in files(*PRODUCT)
        if is_one_of(path, importers) and not is_one_of(path, but)
        for line, module in imports(path)
        if is_in(module, *imported)
    ]


@pytest.mark.parametrize(
    ("importers", "imported", "but"),
    [
        (("app/frontend/*",), ("app.engines",), ()),
        (("app/engines/*", "app/routing/*"), ("app.frontend",), ()),
        (("app/*",), ("ray", "deployments"), ("app/cli/*",)),
        (("app/routing/*", "app/kv_cache/*", "app/channel/*", "app/autoscaling/*"), ("app.engines",), ()),
        (("*",), ("benchmarks", "tests"), ()),
        (
            ("*",),
            ("vllm",),
            (*ADAPTERS, "app/frontend/*_surface.py", "app/bench/vllm_client.py", "app/preflight.py"),
        ),
        (("*",), ("sglang",), ADAPTERS),
        (("*",), ("nixl", "nixl_cu12", "nixl_cu13"), ADAPTERS),
    ],
    ids=[
        "the frontend knows no engine",
        "engines and routing know no frontend",
        "app runs without Ray",
        "what both sides share knows no engine",
        "the product needs no experiment and no test",
        "vLLM",
        "SGLang",
        "NIXL",
    ],
)
def test_who_may_not_import_what(importers: tuple[str, ...], imported: tuple[str, ...], but: tuple[str, ...]) -> None:
    """Move what both sides need into app/messages.py, app/config.py or a module beside them."""
    assert not violations(importers, imported, but)


def test_no_two_modules_need_each_other() -> None:
    """Not even through an import in a function: split off what both need."""
    paths = {module_name(path): path for path in files("app", "deployments", "benchmarks", "cluster")}
    graph = {
        module: {imported for _, imported in imports(path) if imported in paths and imported != module}
        for module, path in paths.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "slow"),
    [("deployments.cluster", "ray"), ("deployments.build", "vllm"), ("deployments.frontend.deployment", "vllm")],
)
def test_what_may_not_be_imported_yet(module: str, slow: str) -> None:
    """Ray reads its flags when it is imported, which deployments/cluster.py sets before; and Serve imports what it
    builds the application from in a process that serves nothing, where vLLM would cost seconds of each start."""
    code = f"import sys, {module}; sys.exit({slow!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
