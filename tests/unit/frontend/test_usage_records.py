"""The record of what sequences used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.errors import ConfigError
from app.frontend.usage_records import UsageLine, UsageRecords, record_usage
from tests.conftest import wait_until


def line(tenant: str) -> UsageLine:
    return UsageLine(tenant, "tiny", "cmpl-1", "stop", 10, 4, 7)


def read(path: Path) -> list[str]:
    return [json.loads(text)["tenant"] for text in path.read_text().splitlines()]


def test_lines_are_appended_until_it_is_closed(tmp_path: Path) -> None:
    record_usage(line("before"))
    records = UsageRecords(str(tmp_path / "usage"), "frontend-1")
    record_usage(line("a"))
    record_usage(UsageLine("refused", "tiny", "cmpl-2", "LimitReached", 0, 0, 0))
    records.close()
    again = UsageRecords(str(tmp_path / "usage"), "frontend-1")
    record_usage(line("b"))
    again.close()
    record_usage(line("after"))
    assert records.path == tmp_path / "usage" / "frontend-1.jsonl"
    assert read(records.path) == ["a", "b"]
    first = json.loads(records.path.read_text().splitlines()[0])
    assert first["at"].startswith("20")
    assert (first["prompt_tokens"], first["cached_tokens"], first["output_tokens"]) == (10, 4, 7)


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    records = UsageRecords(str(tmp_path), "f")
    record_usage(line("a"))
    wait_until(records.path.read_text, 10, "the first line is written")
    records.path.rename(tmp_path / "old")
    record_usage(line("b"))
    records.close()
    assert read(tmp_path / "old") == ["a"]
    assert read(records.path) == ["b"]


def test_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        UsageRecords(str(tmp_path / "file"), "f")
    assert caught.value.field == "security.usage_records"
