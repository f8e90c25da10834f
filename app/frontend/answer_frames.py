"""An answer as bytes with gaps, cut out of what vLLM's own code makes of an example: events, or one piece of JSON.

So no token and no answer needs a response model, and what is sent is what vLLM would send, whatever it puts into it.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

ID, TEXT = uuid.uuid4().hex, uuid.uuid4().hex
"""In the place of an answer's id and text.  Nobody can guess them, so no stop string that a client chooses has them."""
NUM_CACHED, NUM_PROMPT, NUM_MIDDLE, NUM_LAST = 6_000_011, 7_000_003, 1_000_007, 8_000_009
"""The numbers of tokens of the example.  They are all different, and so are their sums."""
GAPS = {
    "id": f'"{ID}"',
    "text": f'"{TEXT}"',
    "created": r'(?<="created":)\d+',
    "cached_tokens": rf'(?<=_tokens":){NUM_CACHED}(?=[,}}])',
    "prompt_tokens": rf'(?<=_tokens":){NUM_PROMPT}(?=[,}}])',
    "completion_tokens": rf'(?<=_tokens":){NUM_MIDDLE + NUM_LAST}(?=[,}}])',
    "total_tokens": rf'(?<=_tokens":){NUM_PROMPT + NUM_MIDDLE + NUM_LAST}(?=[,}}])',
}
_GAP = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in GAPS.items()))


class NoExample(Exception):
    """vLLM did not make of the example what it makes of other requests."""


class Template:
    """Bytes with gaps."""

    def __init__(self, example: str) -> None:
        self._pieces: list[bytes] = []
        self._names: list[str] = []
        end = 0
        for match in _GAP.finditer(example):
            assert match.lastgroup is not None
            self._pieces.append(example[end : match.start()].encode())
            self._names.append(match.lastgroup)
            end = match.end()
        self._rest = example[end:].encode()

    def fill(self, values: dict[str, bytes]) -> bytes:
        """Return the bytes with `values`, which are JSON, in the gaps."""
        filled = [part for piece, name in zip(self._pieces, self._names, strict=True) for part in (piece, values[name])]
        return b"".join((*filled, self._rest))

    def around_text(self, values: dict[str, bytes]) -> tuple[bytes, bytes]:
        """Return what comes before and after the one text."""
        before, after = self.fill({**values, "text": b"\0"}).split(b"\0")
        return before, after


class AnswerFrames(msgspec.Struct, frozen=True):
    """What an answer consists of, from the first event to the end.  An answer that is not streamed is all tail."""

    first: Template
    """What comes before the first text; empty for completions."""
    middle: Template
    last: Template
    """The event with the end of the text and the reason why it ends."""
    tail: Template
    """What comes after that: the usage, if it is asked for, and the mark of the end."""


def stream_frames(events: list[str], num_before: int) -> AnswerFrames:
    """Cut up an example: the events of a stream with two texts, of which `num_before` come before the texts.

    Raises NoExample.
    """
    if len(events) < num_before + 3 or [TEXT in event for event in events[: num_before + 3]] != [
        *([False] * num_before),
        True,
        True,
        False,
    ]:
        raise NoExample(f"vLLM's stream of an example has the events {events}")
    first, (middle, last), tail = events[:num_before], events[num_before : num_before + 2], events[num_before + 2 :]
    return AnswerFrames(Template("".join(first)), Template(middle), Template(last), Template("".join(tail)))


def whole_frames(answers: list[str]) -> AnswerFrames:
    """Take the one answer of an example that is not streamed.  Raises NoExample."""
    if len(answers) != 1 or answers[0].count(GAPS["text"]) != 1:
        raise NoExample(f"vLLM's answer to an example is {answers}")
    nothing = Template("")
    return AnswerFrames(nothing, nothing, nothing, Template(answers[0]))


Example = Callable[[str, "int | str | None"], AsyncIterator[str]]
"""Returns vLLM's events of an example that ends for this reason, or its whole answer."""


class FrameCache:
    """The frames of one kind of answer, by how it ends.  Clients choose stop strings, so only some are kept."""

    MOST = 64

    def __init__(self, example: Example, cut: Callable[[list[str]], AnswerFrames]) -> None:
        self._example = example
        self._cut = cut
        self._frames: dict[tuple[str, Any], AnswerFrames] = {}

    async def get(self, finish_reason: str, stop_reason: int | str | None) -> AnswerFrames:
        """Raises NoExample."""
        key = finish_reason, stop_reason
        if (frames := self._frames.get(key)) is None:
            frames = self._cut([part async for part in self._example(finish_reason, stop_reason)])
            if len(self._frames) == self.MOST:
                self._frames.clear()
            self._frames[key] = frames
        return frames


def text_as_json(text: str) -> bytes:
    """Return `text` as vLLM's response models write it: each character is the same as pydantic's."""
    return msgspec.json.encode(text)
