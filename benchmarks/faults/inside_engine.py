"""What the campaign does inside processes of real engines, in the thread of agent/sitecustomize.py."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import reduce
from typing import Any

from benchmarks.faults.inside import Thrown

_waiting: set[str] = set()


def break_call(function: str) -> None:
    """Make the next call of ``module:name`` or ``module:Class.name`` raise Thrown, and those after it go on as before.

    Raises LookupError if this process has not loaded it.
    """
    module, _, path = function.partition(":")
    *outer, name = path.split(".")
    if module not in sys.modules:
        raise LookupError(f"this process has not loaded {module}")
    owner: Any = reduce(getattr, outer, sys.modules[module])
    original = vars(owner)[name]

    def broken(*_: Any, **__: Any) -> Any:
        setattr(owner, name, original)
        _waiting.discard(function)
        raise Thrown(f"thrown by the campaign into {function}")

    _waiting.add(function)
    setattr(owner, name, broken)


def is_waiting(function: str) -> bool:
    """Return whether a call that `break_call` has prepared has not come yet."""
    return function in _waiting


def throw_into_thread(name: str) -> str:
    """Raise Thrown in the first thread whose name contains `name`, once it runs Python; return its whole name.

    Raises LookupError if there is none.
    """
    for thread in threading.enumerate():
        if name in thread.name and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Thrown))
            return thread.name
    raise LookupError(f"this process has no thread {name}")
