"""Baton's log lines go where Serve writes a replica's own: its log file and the dashboard."""

from __future__ import annotations

import logging


def adopt_serve_logging() -> None:
    """Give the ``baton`` loggers the handlers and the level that Serve gave its own in this replica."""
    serve = logging.getLogger("ray.serve")
    baton = logging.getLogger("baton")
    baton.handlers = serve.handlers
    baton.setLevel(serve.level)
    baton.propagate = False
