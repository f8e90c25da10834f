"""Ends an engine's process when one of the engine's own threads has died of an error, or its main thread has ended.

Engines leave to threads what a step does not wait for: vLLM's engine core reads and writes its sockets in two and
answers NIXL's handshakes in a third, and SGLang's schedulers move KV in others.  When a thread dies Python prints why
and the process goes on.  It looks well, and what the thread did is done no more: without vLLM's third a prefill replica
computes KV that nobody can read, for as long as it lives.  An engine that has ended is noticed and replaced, so that is
what such a one does.

Python also waits at a process's end for threads that are no daemons.  A scheduler of SGLang's that hit an exception
would be kept alive by the thread that its prefill bootstraps in, and do nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

ENGINES = ("vllm", "sglang")
"""The packages whose threads count."""
DISPENSABLE = ("vllm.usage",)
"""Of these, what serves nobody: vLLM's usage statistics are a thread that may fail on a full disk."""
LAST_S = 10.0
"""How long a process may take to end once its main thread has."""
SAY_S = 1.0
"""How long a process may take to say why it ends.  What it writes to may be full, or a pipe that nobody reads."""


def register() -> None:
    """End this process, and those that it forks, with the next of its threads that dies.  May be called again."""
    if threading.excepthook is not _on_death:
        threading.excepthook = _on_death
        os.register_at_fork(after_in_child=_watch_main_thread)
        _watch_main_thread()


def _watch_main_thread() -> None:
    threading.Thread(target=_end_with_main_thread, name="baton-thread-watch", daemon=True).start()


def _end_with_main_thread() -> None:
    threading.main_thread().join()
    time.sleep(LAST_S)  # mostly the process ends meanwhile
    _end(lambda: _say("The main thread of the engine has ended"))


def _on_death(death: threading.ExceptHookArgs) -> None:
    def say() -> None:
        threading.__excepthook__(death)
        _say("A thread of the engine has died")

    if issubclass(death.exc_type, SystemExit) or not is_needed(origin(death.exc_traceback)):
        threading.__excepthook__(death)
    else:
        _end(say)


def _say(why: str) -> None:
    print(f"{why}, and the process ends with it.", file=sys.stderr, flush=True)


def _end(say: Callable[[], None]) -> None:
    """Kill this process, once it has said why or cannot."""
    saying = threading.Thread(target=say, daemon=True)
    try:
        saying.start()
        saying.join(SAY_S)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def origin(trace: TracebackType | None) -> str:
    """Return the name of the module of the function that a thread ran."""
    for frame, _ in traceback.walk_tb(trace):
        if (module := str(frame.f_globals.get("__name__"))) != threading.__name__:
            return module
    return ""


def is_needed(module: str) -> bool:
    """Whether an engine cannot do without the threads of a module."""
    return _is_within(module, ENGINES) and not _is_within(module, DISPENSABLE)


def _is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
