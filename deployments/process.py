"""What every replica's process does once: where its log goes, and what its garbage collector looks at."""

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
    """Have the garbage collector leave alone what start-up made.

    Some 600,000 objects, most of them vLLM's and torch's modules, that live as long as the process: each full
    collection walks them for a third of a second, in which no token moves.
    """
    gc.collect()
    gc.freeze()
