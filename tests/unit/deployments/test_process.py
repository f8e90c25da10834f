"""The log of a replica's process, when an engine in it sets up logging too, and its garbage collector."""

from __future__ import annotations

import gc
import logging
import logging.config
import sys
from collections.abc import Iterator
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path

import pytest

from deployments.process import adopt_serve_logging, keep_serve_logging, without_collections


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """What Serve writes a replica's log to: a file behind a buffer of one line."""
    path = tmp_path / "replica.log"
    file = logging.FileHandler(path)
    buffer = MemoryHandler(1, target=file)
    loggers = [logging.getLogger("ray.serve"), logging.getLogger("baton")]
    raises = logging.raiseExceptions
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    loggers[0].handlers = [buffer]
    loggers[0].setLevel(logging.INFO)
    adopt_serve_logging()
    yield path
    buffer.close()
    file.close()
    logging.raiseExceptions = raises
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_what_a_replica_logs_is_written_after_its_engine_has_set_up_its_own_log(log: Path) -> None:
    logger = logging.getLogger("baton.worker")
    logger.info("before")
    with keep_serve_logging():
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # as vLLM does
        logger.info("meanwhile")
    logger.info("after")
    assert log.read_text().split() == ["before", "meanwhile", "after"]


class ToLog:
    """What Serve puts in the place of stderr."""

    num_lines = 0

    def write(self, text: str) -> None:
        self.num_lines += 1
        logging.getLogger("ray.serve").error(text)


@pytest.mark.usefixtures("log")
def test_a_full_disk_does_not_end_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = ToLog()
    monkeypatch.setattr(sys, "stderr", stderr)
    buffer = next(each for each in logging.getLogger("ray.serve").handlers if isinstance(each, MemoryHandler))
    with suppress(OSError), Path("/dev/full").open("w") as full:  # closing it fails too
        buffer.setTarget(logging.StreamHandler(full))
        logging.getLogger("baton.worker").warning("this cannot be written")
    assert stderr.num_lines == 0


def test_garbage_is_looked_for_again_after_a_start_that_failed() -> None:
    with suppress(ValueError), without_collections():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
