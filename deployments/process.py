"""What the process of every replica sets up once: its log and its garbage collector."""

from __future__ import annotations

import gc
import logging


def adopt_serve_logging() -> None:
    """Give the ``baton`` loggers the handlers and the level that Serve gave its own in this replica."""
    serve = logging.getLogger("ray.serve")
    baton = logging.getLogger("baton")
    baton.handlers = serve.handlers
    baton.setLevel(serve.level)
    baton.propagate = False


def freeze_heap() -> None:
    """Make the garbage collector skip all objects that start-up made.

    These are some 600,000 objects, most of them from vLLM's and torch's modules, which live as long as the process.  A
    full collection would walk them for a third of a second, in which no token moves.
    """
    gc.collect()
    gc.freeze()
