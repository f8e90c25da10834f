"""What the process of every replica sets up once: its log and its garbage collector."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


def adopt_serve_logging() -> None:
    """Give the ``baton`` loggers the handlers and the level that Serve gave its own in this replica.

    A line that cannot be written is lost without a word from now on.  Python would tell of it on stderr, Serve makes
    lines of this log of what comes there, and these cannot be written either: on a full disk that never ended, and the
    replica with it.
    """
    logging.raiseExceptions = False
    serve = logging.getLogger("ray.serve")
    baton = logging.getLogger("baton")
    baton.handlers = serve.handlers
    baton.setLevel(serve.level)
    baton.propagate = False


@contextmanager
def keep_serve_logging() -> Generator[None, None, None]:
    """Keep Serve's log working through a block in which others set up logging for the whole process, as engines do.

    ``logging.config.dictConfig`` closes all handlers.  A file opens again with its next line, but the buffer that Serve
    puts before it has then lost its target: it would take every further line of this replica and write none.
    """
    buffers = [handler for handler in logging.getLogger("ray.serve").handlers if isinstance(handler, MemoryHandler)]
    targets = [buffer.target for buffer in buffers]
    try:
        yield
    finally:
        for buffer, target in zip(buffers, targets, strict=True):
            buffer.setTarget(target)


@contextmanager
def without_collections() -> Generator[None, None, None]:
    """Look for no garbage in a block that imports an engine or a server.

    What that makes stays.  The collector would walk it again and again: with it
    ``import vllm.entrypoints.openai.api_server`` took 8.8 to 13.0 s of CPU, and without it 7.0 to 7.4 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_heap() -> None:
    """Make the garbage collector skip all objects that start-up made.

    These are some 600,000 objects, most of them from vLLM's and torch's modules, which live as long as the process.  A
    full collection would walk them for a third of a second, in which no token moves.
    """
    gc.collect()
    gc.freeze()
