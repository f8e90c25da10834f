"""Lets the campaign call functions in this process: runs in every Python process with this folder in PYTHONPATH.

It listens at an abstract Unix socket, which only processes of the same user on this machine may use, and runs each call
in a thread of its own.  benchmarks/faults/agent_calls.py has the other side.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress


def _serve(server: socket.socket) -> None:
    import importlib
    import json

    while True:
        connection, _ = server.accept()
        with suppress(BrokenPipeError), connection, connection.makefile("rwb") as stream:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", peer)[1] != os.getuid():
                continue
            try:
                module, name, arguments = json.loads(stream.readline())
                answer = {"result": getattr(importlib.import_module(module), name)(**arguments)}
            except LookupError as error:  # what was to be struck is not there
                answer = {"missing": str(error)}
            except Exception as error:  # noqa: BLE001  the campaign is told, and this process goes on
                answer = {"error": repr(error)}
            stream.write(json.dumps(answer).encode())


_server = socket.socket(socket.AF_UNIX)
_server.bind(f"\0baton-faults-{os.getpid()}")
_server.listen()
threading.Thread(target=_serve, args=(_server,), name="baton-faults", daemon=True).start()
