"""Frames come out as they went in, however they were cut on their way, at a cost that grows with their length alone."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.channel import protocol
from app.channel.protocol import MAX_SUBMIT_BYTES, READ_BYTES, read_frames

PART_BYTES = 16 * 1024


class Parts:
    """A connection on which these parts arrive, one with each read."""

    def __init__(self, content: bytes, size: int) -> None:
        self._parts = iter([content[start : start + size] for start in range(0, len(content), size)])

    async def read(self, longest: int) -> bytes:
        return next(self._parts, b"")


def frame(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


async def read(reader: Any, longest: int = MAX_SUBMIT_BYTES) -> list[bytes]:
    return [bytes(each) async for frames in read_frames(reader, longest) for each in frames]


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 50))
def test_frames_come_out_as_they_went_in(contents: list[bytes], size: int) -> None:
    assert asyncio.run(read(Parts(b"".join(map(frame, contents)), size))) == contents


def test_half_a_frame_at_the_end_is_none() -> None:
    assert asyncio.run(read(Parts(frame(b"whole") + frame(b"half")[:-1], 3))) == [b"whole"]


def test_no_byte_is_copied_more_than_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the copies that the code says; CPU time tells little, as memory that is new to the process costs more."""
    num_copied = 0

    class Counting(bytearray):
        def __init__(self, content: Any = b"") -> None:
            nonlocal num_copied
            super().__init__(content)
            num_copied += len(self)

        def __iadd__(self, content: Any) -> Any:  # type: ignore[misc]
            nonlocal num_copied
            num_copied += len(content)
            return super().__iadd__(content)

    def counting_bytes(content: Any) -> bytes:
        nonlocal num_copied
        num_copied += len(content)
        return bytes(content)

    monkeypatch.setattr(protocol, "bytearray", Counting, raising=False)
    monkeypatch.setattr(protocol, "bytes", counting_bytes, raising=False)
    content = frame(bytes(4 << 20)) + 1000 * frame(bytes(100)) + frame(bytes(1 << 20))
    asyncio.run(read(Parts(content, PART_BYTES)))
    assert len(content) <= num_copied <= 2 * len(content)


async def test_a_frame_that_is_longer_than_allowed_is_not_waited_for() -> None:
    reader = asyncio.StreamReader(limit=READ_BYTES)
    reader.feed_data(struct.pack("<I", 1001))
    with pytest.raises(ConnectionError, match="a frame of 1001 bytes, where 1000 are the most"):
        await read(reader, 1000)
