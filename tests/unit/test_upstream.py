"""What Baton uses of other packages is compared with what they have."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import pytest

from app.errors import UpstreamChanged
from app.upstream import check, imports, replace


class Used(Protocol):
    size: int

    def ask(self, what: str, *, timeout_s: float) -> str: ...

    async def wait(self) -> None: ...


class Found:
    def __init__(self) -> None:
        self.size = 1

    def ask(self, question: str, more: int = 0, timeout_s: float = 1.0) -> str:
        return question

    async def wait(self) -> None: ...


class WithoutSize(Found):
    def __init__(self) -> None: ...


class OtherKeyword(Found):
    def ask(self, question: str, deadline_s: float = 1.0) -> str:  # type: ignore[override]
        return question


class OneMoreArgument(Found):
    def ask(self, question: str, answer: str, timeout_s: float = 1.0) -> str:  # type: ignore[override]
        return question


class NoLongerAsync(Found):
    def wait(self) -> None: ...  # type: ignore[override]


def test_what_has_all_names_and_takes_the_arguments_passes() -> None:
    check("pytest", Found(), Used)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (WithoutSize(), "WithoutSize has no size"),
        (OtherKeyword(), "OtherKeyword.ask: got an unexpected keyword argument 'timeout_s'"),
        (OneMoreArgument(), "OneMoreArgument.ask: missing a required argument: 'answer'"),
        (NoLongerAsync(), "NoLongerAsync.wait is not a coroutine function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_name_that_moved_or_changed_is_said_with_the_package_and_its_version(found: Any, problem: str) -> None:
    with pytest.raises(UpstreamChanged) as caught:
        check("pytest", found, Used)
    assert str(caught.value).startswith(f"pytest {pytest.__version__} ")
    assert problem in str(caught.value)


class Fields(Protocol):
    plain: int
    made: list[int]


@dataclass
class DataClass:
    plain: int
    made: list[int] = field(default_factory=list)


class Struct(msgspec.Struct):
    plain: int
    made: list[int] = []


class Methods(Protocol):
    def of_object(self, what: int) -> None: ...

    def of_class(self, what: int) -> None: ...


class HasMethods:
    def of_object(self, what: int) -> None: ...

    @staticmethod
    def of_class(what: int) -> None: ...


@pytest.mark.parametrize(
    ("found", "used"), [(DataClass, Fields), (Struct, Fields), (HasMethods, Methods), (HasMethods(), Methods)]
)
def test_a_class_passes_for_what_its_objects_have(found: Any, used: type) -> None:
    check("pytest", found, used)
    with pytest.raises(UpstreamChanged):
        check("pytest", type("Empty", (), {}), used)


def test_a_patch_needs_its_target() -> None:
    module = types.ModuleType("package.module")
    with pytest.raises(UpstreamChanged, match=r"package\.module has no target to patch"):
        replace("pytest", module, "target", 1)
    module.target = 0  # type: ignore[attr-defined]
    replace("pytest", module, "target", 1)
    assert module.target == 1


def test_a_module_that_moved_is_said_too() -> None:
    with (
        pytest.raises(UpstreamChanged, match=r"^not_there \(not installed\) .*No module named 'not_there'"),
        imports("not_there"),
    ):
        import not_there  # type: ignore[import-not-found]  # noqa: F401
