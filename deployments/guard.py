"""Kills a replica's process whose event loop stands still, even if the process was stopped.

Serve notices such a replica by its health checks and starts another one, but Ray asks the old process to exit and does
not look whether it does.  One that was stopped (SIGSTOP, a debugger) or hangs lives on, with its GPU; so did one that
went on later and had then drained in order, as Ray's word to exit came while it stood still.  So each replica has a
guard: a process of its own that waits for a sign of life on its standard input, and does nothing else.  It is no child
of the replica's: SGLang, as it stops, kills all of those, and the replica may hang after that.  Whom it has killed it
says on the replica's standard error, which Ray keeps in a file (worker-*.err).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

NAME = "baton-guard"
"""An argument of a guard, for those who look at the node's processes."""
BEAT_S = 1.0
STILL_S = 60.0
"""After so long without a sign of life the process is killed.  Serve has given it up after three failed checks (36 s by
default), and no loop of Baton's is held up for nearly as long."""

_GUARD = """
import os, select, signal, sys
still_s, process = float(sys.argv[2]), os.pidfd_open(int(sys.argv[1]))
if os.fork():
    os._exit(0)
while select.select([0], [], [], still_s)[0]:
    if not os.read(0, 4096):
        sys.exit()  # the process has ended
try:
    signal.pidfd_send_signal(process, signal.SIGKILL)
except ProcessLookupError:
    sys.exit()
os.write(2, f"baton guard: process {sys.argv[1]} gave no sign of life for {still_s:g} s and was killed\\n".encode())
"""
_guards: list[subprocess.Popen[bytes]] = []
"""Kept for as long as this process lives: their ends would close with them, and an end is taken for this process's."""


async def be_guarded(still_s: float = STILL_S) -> None:
    """Start a guard and give it signs of life until cancelled; it then kills this process unless it ends in time.

    Raises BrokenPipeError if the guard has ended, and what else went wrong.  Call this again then: the guard is gone.
    """
    # Without site-packages and the environment's settings it takes 9 MB.  A session of its own keeps Ctrl-C from it.
    command = [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpid()), str(still_s), NAME]
    guard = await asyncio.to_thread(subprocess.Popen, command, stdin=subprocess.PIPE, start_new_session=True)
    _guards.append(guard)
    assert guard.stdin is not None
    try:
        await asyncio.to_thread(guard.wait)  # the guard is its child, and goes on
        while True:
            os.write(guard.stdin.fileno(), b".")
            await asyncio.sleep(min(BEAT_S, still_s / 4))
    except Exception:
        guard.stdin.close()  # which ends it.  It gets no more signs of life, but the one that is started next does
        raise
