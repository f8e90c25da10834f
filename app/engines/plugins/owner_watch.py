"""Ends an engine's processes when the replica that owns them is gone.

A replica that is killed (SIGKILL, out of memory) cannot stop its engine, whose processes would live on with its GPU
memory, its KV cache and its ports.  The replica puts its process id into the environment of the engine, and each
process of the engine waits for that process to end: a plug-in of vLLM and SGLang starts the wait, because nothing
else of ours runs there.
"""

from __future__ import annotations

import os
import select
import signal
import threading

OWNER_VARIABLE = "BATON_ENGINE_OWNER_PID"


def owner_environment() -> dict[str, str]:
    """What marks this process as the owner of the engine that it starts next."""
    return {OWNER_VARIABLE: str(os.getpid())}


def register() -> None:
    """General plug-in of vLLM and SGLang: in a process of an owned engine, die with the owner.  May be called again."""
    owner = os.environ.get(OWNER_VARIABLE)
    if owner is None or int(owner) == os.getpid() or _is_watching():
        return
    try:
        owner_fd = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_die_with, args=(owner_fd,), name=_THREAD, daemon=True).start()


_THREAD = "baton-owner-watch"


def _is_watching() -> bool:
    return any(thread.name == _THREAD for thread in threading.enumerate())


def _die_with(owner_fd: int) -> None:
    select.select([owner_fd], [], [])  # a process's descriptor becomes readable when it ends
    os.kill(os.getpid(), signal.SIGKILL)
