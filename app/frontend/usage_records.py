"""The record of what each sequence used, for billing: a file of JSON lines that is only appended to.

A line is written in another thread, within milliseconds of the sequence's end.  A file that is moved away (logrotate)
is begun anew.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, WatchedFileHandler
from pathlib import Path
from queue import SimpleQueue

import msgspec

from app.errors import ConfigError

logger = logging.getLogger("baton.usage")
logger.propagate = False
logger.setLevel(logging.CRITICAL + 1)


class UsageLine(msgspec.Struct):
    """What one sequence used."""

    tenant: str
    model: str
    request_id: str
    end: str
    """How it ended, as in ``baton_sequences_total``."""
    prompt_tokens: int
    """0 if its prompt was never computed."""
    cached_tokens: int
    """Those of them that no engine had to compute."""
    output_tokens: int
    at: str = ""
    """When it ended, in RFC 3339."""


class UsageRecords:
    """The file of one frontend in `folder`."""

    def __init__(self, folder: str, frontend: str) -> None:
        """Raises ConfigError if nothing can be written there."""
        self.path = Path(folder).expanduser() / f"{frontend}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = WatchedFileHandler(self.path, encoding="utf-8")
        except OSError as error:
            raise ConfigError("security.usage_records", f"{self.path} cannot be written: {error.strerror}") from None
        lines: SimpleQueue[logging.LogRecord] = SimpleQueue()
        self._queue = QueueHandler(lines)
        self._listener = QueueListener(lines, self._file)
        self._listener.start()
        logger.addHandler(self._queue)
        logger.setLevel(logging.INFO)

    def close(self) -> None:
        """Write what is left.  This blocks until it is in the file."""
        logger.removeHandler(self._queue)
        logger.setLevel(logging.CRITICAL + 1)
        self._listener.stop()
        self._file.close()


def records_usage() -> bool:
    """Whether this process records usage."""
    return logger.isEnabledFor(logging.INFO)


def record_usage(line: UsageLine) -> None:
    """Write a line if there was any usage."""
    if line.prompt_tokens or line.output_tokens:
        line.at = datetime.now(UTC).isoformat(timespec="milliseconds")
        logger.info(msgspec.json.encode(line).decode())
