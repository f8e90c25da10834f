"""A name of an upstream package that has moved is said at once, with the version and what it was needed for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import msgspec
import pytest

from app.upstream import (
    Patch,
    UpstreamChanged,
    check_attributes,
    check_parameters,
    check_protocol,
    check_uses,
    needed,
)


def test_an_error_names_package_version_name_and_need() -> None:
    with pytest.raises(UpstreamChanged) as caught, needed("ray", "choose a replica"):
        from ray.serve.context import _get_no_client  # noqa: F401
    for part in ("ray", version("ray"), "_get_no_client", "choose a replica"):
        assert part in str(caught.value)


def test_a_package_may_be_installed_under_another_name_or_not_at_all() -> None:
    with pytest.raises(UpstreamChanged, match=r"vllm [\d.]+ lacks"), needed("vllm", "x"):
        raise AttributeError
    with (
        pytest.raises(UpstreamChanged, match=r"no_such_package \(not installed\) lacks"),
        needed("no_such_package", "x"),
    ):
        importlib.import_module("no_such_package")


class Upstream:
    declared: int

    def __init__(self) -> None:
        self.made = "here"

    def method(self, one: int, two: int = 2, *rest: int, **more: int) -> int:
        return self.declared + one


@pytest.mark.parametrize(
    ("check", "problem"),
    [
        (lambda: check_parameters(Upstream.method, "self", "one", "three"), "takes no three"),
        (lambda: check_parameters(Upstream.method, "self"), "also wants one"),
        (lambda: check_attributes(Upstream, "declared", "absent"), "has no absent"),
        (lambda: check_uses(Upstream.__init__, "absent"), "no longer uses absent"),
        (lambda: Patch(Upstream, "absent"), "absent"),
        (lambda: Patch(Upstream, "method", "self"), "also wants one"),
    ],
)
def test_what_does_not_fit_is_named(check: Callable[[], object], problem: str) -> None:
    with pytest.raises(UpstreamChanged, match=re.escape(problem)), needed("ray", "x"):
        check()


def test_what_fits_passes() -> None:
    with needed("ray", "x"):
        check_parameters(Upstream.method, "self", "one", "two")
        check_parameters(Upstream.method, "self", "one")
        check_attributes(Upstream, "declared", "method")
        check_uses(Upstream.__init__, "made")


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


def test_an_object_that_has_what_a_protocol_names_passes() -> None:
    check_protocol(Found(), Used)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (WithoutSize(), "WithoutSize has no size"),
        (OtherKeyword(), "OtherKeyword.ask: got an unexpected keyword argument 'timeout_s'"),
        (OneMoreArgument(), "OneMoreArgument.ask: missing a required argument: 'answer'"),
        (NoLongerAsync(), "NoLongerAsync.wait is no coroutine function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_that_lacks_what_a_protocol_names_does_not(found: Any, problem: str) -> None:
    with pytest.raises(UpstreamChanged, match=re.escape(problem)), needed("ray", "x"):
        check_protocol(found, Used)


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
    check_protocol(found, used)
    with pytest.raises(AttributeError):
        check_protocol(type("Empty", (), {}), used)


def test_a_patch_replaces_and_keeps_the_original() -> None:
    owner: Any = SimpleNamespace(function=lambda one: one)
    patch = Patch(owner, "function", "one")
    assert not patch.is_applied
    patch.apply(lambda one: patch.original(one) + 1)
    assert patch.is_applied
    assert owner.function(1) == 2


def test_cancellation_is_let_through_before_a_router_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.frontend import vllm_surface

    router: Any = ModuleType("vllm.early_router")
    router.with_cancellation = vllm_surface.WITH_CANCELLATION.original
    monkeypatch.setitem(sys.modules, router.__name__, router)
    with pytest.raises(UpstreamChanged, match=r"vllm\.early_router"):
        vllm_surface.let_cancellation_through()
