"""Ends an engine's processes when the replica that owns them is gone, or when a thread of theirs is (thread_watch.py).

A replica that is killed (SIGKILL, out of memory) cannot stop its engine.  The engine's processes would live on with
their GPU memory, KV cache and ports.  So the replica puts its process id into the engine's environment, and each
process of the engine waits for that process to end.  A plug-in of vLLM and SGLang starts the wait, because no other
code of ours runs there.

In a process that is stopped (SIGSTOP) nothing waits.  So each also asks the kernel to end it with its parent
(PR_SET_PDEATHSIG), which reaches a stopped process too, and from one generation to the next.  It is not enough by
itself: it does not reach a process whose parent had ended before.  And it goes by the *thread* that started the
process.  vLLM starts its workers from the main thread of the engine core; the core itself, and all of SGLang's
processes, are started from a thread of the event loop's executor, which lasts as long as the replica's process.
SGLang's own processes rely on the same.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

from app.engines.plugins import thread_watch

OWNER_VARIABLE = "BATON_ENGINE_OWNER_PID"

PR_SET_PDEATHSIG = 1
"""From ``linux/prctl.h``."""


def owner_environment() -> dict[str, str]:
    """Return the environment variables that mark this process as the owner of the engine that it starts next."""
    return {OWNER_VARIABLE: str(os.getpid())}


def register() -> None:
    """General plug-in of vLLM and SGLang: a process of an owned engine ends with its owner and with any of its threads.

    May be called again.
    """
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is None or int(owner) == os.getpid() or _is_watching():
        return
    try:
        owner_fd = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    _die_with_parent()
    thread_watch.register()
    threading.Thread(target=_die_with, args=(owner_fd,), name=_THREAD, daemon=True).start()


def _die_with_parent() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


_THREAD = "baton-owner-watch"


def _is_watching() -> bool:
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _die_with(owner_fd: int) -> None:
    select.select([owner_fd], [], [])  # a process's descriptor becomes readable when it ends
    os.kill(os.getpid(), signal.SIGKILL)
